"""The plan of local training in words: `fedmoe train --explain` and `algorithm.plan`."""

import inspect

import pytest
from test_cli import TINY

from fedmoe_jax import cli, federated_moe
from fedmoe_jax.training import setup
from fedmoe_jax.training.config import TrainConfig

NO_FACTOR = "not a factor of one product or looked up once, or only in a transformation"


def explained(capsys, tmp_path, monkeypatch, *flags):
    """Engine and reason of each weight."""
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert cli.main(["train", "--explain", *TINY, *flags]) == 0
    first, head, *rows = capsys.readouterr().out.splitlines()
    assert not list(tmp_path.iterdir()) and "5 of 5 clients" in first
    weight, engine, why = (
        slice(head.index(a), head.index(b) if b else None) for a, b in [("weight", "engine"), ("engine", "primal"), ("why", "")]
    )
    return {row[weight].strip(): (row[engine].strip(), row[why].strip()) for row in rows}


def test_every_weight_is_explained(capsys, tmp_path, monkeypatch):
    found = explained(capsys, tmp_path, monkeypatch, "--engine", "dual")
    kernels = {name: row for name, row in found.items() if row[0] == "dual"}
    assert len(kernels) >= 3 and {why for _, why in kernels.values()} == {"asked for"}
    assert {why for engine, why in found.values() if engine == "primal"} == {NO_FACTOR}
    assert {name.split()[0] for name in found} == {"experts", "shared"}


@pytest.mark.parametrize(
    ("flags", "why"), [(["--engine", "auto", "--client_optimizer", "adam"], "not linear"), (["--engine", "primal"], "asked for")]
)
def test_why_the_primal_engine_trains(flags, why, capsys, tmp_path, monkeypatch):
    found = explained(capsys, tmp_path, monkeypatch, *flags)
    assert {engine for engine, _ in found.values()} == {"primal"} and any(why in reason for _, reason in found.values())


def test_auto_is_the_default(capsys, tmp_path, monkeypatch):
    wide = ["--model_options", "hidden=128", "expert_hidden=128"]
    assert "dual" in {engine for engine, _ in explained(capsys, tmp_path, monkeypatch, *wide).values()}
    assert inspect.signature(federated_moe).parameters["engine"].default == "auto"


def test_auto_says_what_costs_less(capsys, tmp_path, monkeypatch):
    wide = ["--engine", "auto", "--model_options", "hidden=128", "expert_hidden=128"]
    reasons = {("dual", "costs less"), ("primal", "would cost more in the dual engine"), ("primal", NO_FACTOR)}
    assert set(explained(capsys, tmp_path, monkeypatch, *wide).values()) == reasons
    many = explained(capsys, tmp_path, monkeypatch, *wide, "--local_steps", "9")
    assert {engine for engine, _ in many.values()} == {"primal"}


def test_the_dual_engine_leaves_memory_for_more_clients():
    wide = dict(population=40, cohort=20, batch_size=2, local_epochs=1, model_options={"hidden": 256, "expert_hidden": 512})
    primal, dual = (setup.build(TrainConfig(engine=engine, **wide)) for engine in ("primal", "dual"))
    memory = 10e6
    assert 3 * primal.fitting(memory) <= dual.fitting(memory)
    many = setup.build(TrainConfig(engine="dual", **wide | dict(local_epochs=8)))  # rows of more steps
    assert many.fitting(memory) < dual.fitting(memory)
