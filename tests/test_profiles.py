"""Files of client profiles: what they may hold, whose row is whose, and one line for each mistake."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from fedmoe_jax import cli
from fedmoe_jax.training import machine, profiles, setup
from fedmoe_jax.training.config import TrainConfig

CONFIG = TrainConfig(population=20, cohort=5, experts=4, rounds=2, fitness="usage", model_options={"hidden": 8})
TINY = ["--population", "20", "--cohort", "5", "--experts", "4", "--rounds", "2", "--fitness", "usage", "--model_options", "hidden=8"]
FIELDS = ("flops_per_second", "memory_bytes", "downlink_bytes_per_second", "uplink_bytes_per_second")


def client(number=1.0, **changes):
    """A client as `fedmoe profile` prints it, with its links filled in."""
    return dict(zip(FIELDS, (1e10 * number, 1e9 * number, 1e6 * number, 5e5 * number), strict=True)) | {"device": "cpu"} | changes


def lines(rows):
    return "\n".join(map(json.dumps, rows))


def columns(profile):
    return np.stack([np.asarray(getattr(profile, name)) for name in FIELDS], axis=1)


ROWS = [client(number) for number in range(1, 21)]


FORMS = {
    "lines": lines(ROWS),
    "empty line at the end": lines(ROWS) + "\n\n",
    "empty lines": lines(ROWS).replace("\n", "\n\n"),
    "byte order mark": "\ufeff" + lines(ROWS),
    "list": json.dumps(ROWS),
    "list over lines": json.dumps(ROWS, indent=2),
}


@pytest.mark.parametrize("text", FORMS.values(), ids=FORMS)
def test_every_form_holds_the_same_clients(text, tmp_path):
    path = tmp_path / "clients.json"
    path.write_text(text, encoding="utf-8")
    np.testing.assert_allclose(columns(profiles.read(path)), [[row[name] for name in FIELDS] for row in ROWS])


def test_with_a_row_for_each_client_it_is_his(tmp_path):
    path = tmp_path / "clients.jsonl"
    path.write_text(lines(ROWS))
    made = setup.build(dataclasses.replace(CONFIG, profile=str(path)))
    for population in (made.population, made.holdout):
        np.testing.assert_array_equal(columns(population.profile), columns(profiles.read(path)))


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_otherwise_rows_are_drawn_by_the_seed(tmp_path, rows):
    path = tmp_path / "clients.jsonl"
    path.write_text(lines([client(number) for number in range(1, rows + 1)]))
    one, same, other = (
        columns(setup.build(dataclasses.replace(CONFIG, profile=str(path), seed=seed)).population.profile) for seed in (0, 0, 1)
    )
    known = {tuple(row) for row in columns(profiles.read(path))}
    assert len(one) == 20 and {tuple(row) for row in one} <= known
    np.testing.assert_array_equal(one, same)
    assert rows == 1 or (one != other).any()


@pytest.mark.parametrize("source", ["tiers", "phones"])
def test_sources_are_drawn_by_the_seed(source):
    one, same, other = (
        columns(setup.build(dataclasses.replace(CONFIG, profile=source, seed=seed)).population.profile) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


def test_what_fedmoe_profile_prints_is_a_file_once_the_links_are_known(tmp_path, capsys, monkeypatch):
    measured = machine.measure()
    monkeypatch.setattr(machine, "measure", lambda: measured)
    assert cli.main(["profile"]) == 0
    printed = capsys.readouterr().out
    path = tmp_path / "clients.jsonl"
    path.write_text(printed * 2)
    with pytest.raises(ValueError, match=r"clients\.jsonl, line 1: downlink_bytes_per_second is null"):
        profiles.read(path)
    path.write_text((printed * 2).replace("null", "1e6"))
    profile = profiles.read(path)
    assert len(profile.memory_bytes) == 2
    np.testing.assert_allclose(profile.flops_per_second, measured["flops_per_second"], rtol=1e-6)


def test_a_client_of_the_file_that_is_too_slow_is_left_out(tmp_path):
    path = tmp_path / "clients.json"
    path.write_text(json.dumps([client(uplink_bytes_per_second=1.0), *ROWS[1:]]))
    made = setup.build(dataclasses.replace(CONFIG, profile=str(path), deadline=10.0))
    cohort = made.admit(jnp.arange(20), 1.0, made.cost())
    assert not cohort.present[0] and cohort.present[1:].all() and (cohort.slots[1:] == 2).all()


def test_real_phones_hold_none_one_or_two_experts_with_the_deadline_of_the_readme():
    made = setup.build(TrainConfig(profile="phones", deadline=0.15))
    cohort = made.admit(jnp.arange(100), 1.0, made.cost())
    counts = np.bincount(np.asarray(cohort.slots)[np.asarray(cohort.present)], minlength=3)
    assert counts.sum() > 90 and (counts > 10).all()


def without(name):
    return {key: value for key, value in client().items() if key != name}


MISTAKES = {
    "": "holds no client",
    "[]": "holds no client",
    " \n": "holds no client",
    "{": "line 1: not JSON",
    lines([client()]) + "\nnonsense": "line 2: not JSON",
    "[" + lines([client()]): "not JSON",
    "[" + lines([client(), client()]) + "]": "line 2: not JSON",
    "[" * 100_000: "not JSON",
    '{"memory_bytes": ' + "9" * 5000 + "}": "not JSON",
    lines([client(), 3]): "line 2: expected an object with flops_per_second",
    lines([client()] * 2 + [client(uplink_bytes_per_second=None)]): "line 3: uplink_bytes_per_second is null; write the speed",
    lines([client(), without("downlink_bytes_per_second")]): "line 2: downlink_bytes_per_second is missing; write the speed",
    json.dumps([client(), without("memory_bytes")], indent=1): "line 9: memory_bytes is missing; write the client's memory in bytes",
    lines([client(flops_per_second=0)]): "flops_per_second must be a positive finite number, got 0",
    lines([client(flops_per_second=-1.5)]): "flops_per_second must be a positive finite number, got -1.5",
    lines([client(memory_bytes=float("inf"))]): "memory_bytes must be a positive finite number, got inf",
    lines([client(memory_bytes=float("nan"))]): "memory_bytes must be a positive finite number, got nan",
    lines([client(memory_bytes=10**400)]): "memory_bytes must be a positive finite number",
    lines([client(memory_bytes=1e39)]): "memory_bytes must be a positive finite number, got 1e+39",
    lines([client(uplink_bytes_per_second="1e6")]): "uplink_bytes_per_second must be a positive finite number, got '1e6'",
    lines([client(uplink_bytes_per_second=True)]): "uplink_bytes_per_second must be a positive finite number, got True",
    lines([client(uplink_bytes_per_second=[1] * 99)]): "uplink_bytes_per_second must be a positive finite number",
}


def refused(capsys, path, *named):
    assert cli.main(["train", *TINY, "--profile", str(path), "--out", str(path.parent / "run")]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith(f"fedmoe train: profile: {path}") and err.endswith("\n") and err.count("\n") == 1
    assert all(text in err for text in named), err
    assert not (path.parent / "run").exists() and len(err) < len(str(path)) + 250


@pytest.mark.parametrize(("text", "message"), MISTAKES.items(), ids=[message[:40] for message in MISTAKES.values()])
def test_a_mistake_is_one_line_that_names_file_line_and_field(text, message, tmp_path, capsys):
    path = tmp_path / "clients.jsonl"
    path.write_text(text)
    refused(capsys, path, message)


def test_a_file_must_be_there_and_be_text(tmp_path, capsys):
    refused(capsys, tmp_path / "absent.json", "cannot be read")
    (tmp_path / "folder.json").mkdir()
    refused(capsys, tmp_path / "folder.json", "cannot be read")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    refused(capsys, tmp_path / "bytes.json", "not JSON")


def test_an_unknown_profile_names_what_there_is(capsys, tmp_path):
    assert cli.main(["train", *TINY, "--profile", "phone", "--out", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert "profile: 'phone' is unknown, did you mean 'phones'; expected uniform, tiers, phones, a file that ends in .json or .jsonl" in err
