"""The README's Python blocks run as printed."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from fedmoe_jax import cli
from fedmoe_jax.training import metrics
from fedmoe_jax.training.checkpoint import Checkpoints
from fedmoe_jax.training.config import TrainConfig, to_toml
from fedmoe_jax.training.setup import build

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL)


def block(*words):
    """The one block that holds these words."""
    (found,) = (text for text in BLOCKS if all(word in text for word in words))
    return found


def test_functional_api_runs_and_learns_also_from_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(BLOCKS[0], "README", "exec"), names)
    losses = np.asarray(names["info"].train_loss)
    assert losses.shape == (10,) and losses[-1] < losses[0]
    assert np.asarray(names["info"].load[-1]).sum() == 40
    plain = names["info"]
    exec(compile(block("Stream.from_arrays"), "README", "exec"), names)
    np.testing.assert_allclose(names["info"].train_loss, losses[5:], rtol=1e-5)
    exec(compile(block("on_mesh = "), "README", "exec"), names)
    np.testing.assert_allclose(names["info"].train_loss, losses[0], rtol=1e-5)
    exec(compile(block("compressed = "), "README", "exec"), names)
    assert names["info"].bytes_up < 0.1 * plain.bytes_up[0] and names["info"].bytes_down < 0.3 * plain.bytes_down[0]
    exec(compile(block("guarded = "), "README", "exec"), names)
    assert names["guarded"].plan(names["population"])[0].reason == "the aggregator needs deltas of each client"
    served(tmp_path / "client-3", names)
    exec(compile(block("private = "), "README", "exec"), names)
    assert names["private"].plan(names["population"])[0].reason == "the aggregator needs deltas of each client"
    exec(compile(block("secure.secure_sum"), "README", "exec"), names)
    expected = names["values"][names["survived"]].sum(0)
    np.testing.assert_allclose(names["point"].decode(names["total"]), expected, atol=1e-4)
    client = dict.fromkeys(("flops_per_second", "memory_bytes", "downlink_bytes_per_second", "uplink_bytes_per_second"), 1e9)
    (tmp_path / "clients.jsonl").write_text(json.dumps(client))
    exec(compile(block("profiles.read"), "README", "exec"), names)
    assert (names["population"].profile.memory_bytes == 1e9).all() and names["population"].num_clients == 50


def served(folder, names):
    """Runs the block on exports, on one of a client's experts."""
    run = folder.parent / "run"
    config = TrainConfig(population=6, cohort=4, aligner="greedy")
    setup = build(config)
    run.mkdir()
    (run / "config.toml").write_text(to_toml(config))
    with Checkpoints(run / "checkpoints") as checkpoints:
        checkpoints.save(1, setup.algorithm(4).init(jax.random.key(0), setup.population))
    assert cli.main(["export", str(run), "--client", "3", "--out", str(folder)]) == 0
    exec(compile(block("export.load"), "README", "exec"), names)
    assert names["odds"].shape == (5, 10) and len(names["served"].config["held"]) == 2


def test_accounts_of_privacy_are_those_that_it_tells(capsys):
    pytest.importorskip("dp_accounting", reason="accounts need the extra privacy")
    exec(compile(block("accountant.epsilon"), "README", "exec"), {})
    assert [f"{float(word):.3g}" for word in capsys.readouterr().out.split()] == ["223", "10.4"]


def test_own_model_is_accepted():
    import fedmoe_jax as fm

    names = {"__name__": "mymodel"}
    exec(compile(block("class Net"), "README", "exec"), names)
    model = names["make"](input_shape=(8, 8, 1), num_classes=10, num_experts=4, top_k=1, seed=0, dtype=None)
    assert fm.partition(model).experts["moe"]["w_in"].shape[0] == 4


def test_own_model_trains_by_name(tmp_path, monkeypatch):
    (tmp_path / "mymodel.py").write_text(block("class Net"))
    monkeypatch.chdir(tmp_path)
    small = ["--population", "20", "--cohort", "5", "--experts", "4", "--rounds", "2", "--eval_every", "2", "--aligner", "greedy"]
    assert cli.main(["train", "--model", "mymodel:make", *small, "--out", "runs/mine"]) == 0
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()


def test_own_data_and_aligner_train_by_name(tmp_path, monkeypatch):
    (tmp_path / "mydata.py").write_text(block("def blobs"))
    (tmp_path / "myaligner.py").write_text(block("def fixed"))
    monkeypatch.chdir(tmp_path)
    small = ["--population", "20", "--cohort", "5", "--experts", "4", "--rounds", "20", "--eval_every", "20"]
    assert cli.main(["train", "--data", "mydata:blobs", "--aligner", "myaligner:fixed", *small, "--out", "runs/blobs"]) == 0
    run = tmp_path / "runs" / "blobs"
    last = metrics.read_json(run / "summary.json")["last"]
    assert last["eval_accuracy"] > 0.5 and last["client_accuracy_mean"] is not None and (run / "report.html").is_file()
    load = metrics.read(run / "metrics.jsonl")[0]["load"]
    assert sum(load) == 10 and load[0] == load[1] and load[2] == load[3]  # the clients hold the experts in pairs
