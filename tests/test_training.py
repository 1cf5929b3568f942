"""Tests of runs through the API: resume, out of memory, what learns, seeds side by side, and engine options."""

import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmoe_jax.training import compare, metrics, setup, trainer
from fedmoe_jax.training.checkpoint import Checkpoints
from fedmoe_jax.training.config import TrainConfig, UsageError, to_toml
from fedmoe_jax.training.evaluate import global_evaluation

CONFIG = TrainConfig(population=20, cohort=5, experts=4, rounds=4, eval_every=2, checkpoint_every=2, model_options={"hidden": 16})
QUICK = dataclasses.replace(CONFIG, aligner="greedy", client_schedule="constant")  # compiles faster, and once for any rounds
MEASURED = ("wall_seconds", "clients_per_second", "peak_memory_bytes")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run that was killed right after its config.toml was written, then resumed to the end."""
    out = tmp_path_factory.mktemp("uninterrupted")
    (out / "config.toml").write_text(to_toml(CONFIG))
    seen = []
    trainer.train(CONFIG, out, resume=True, callback=lambda state, record: seen.append(record["round"]))
    assert seen == [0, 1, 2, 3]
    return out


def weights(out):
    with np.load(out / "weights.npz") as file:
        return {name: file[name] for name in file.files}


def exact(out):
    """The metrics of a run that do not depend on the machine's speed."""
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in metrics.read(out / "metrics.jsonl")]


def content(out):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.rglob("*") if path.is_file()}


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(uninterrupted, tmp_path):
    class Stop(Exception):
        pass

    def stop(state, record):
        if record["round"] == 2:
            raise Stop

    out = tmp_path / "run"
    with pytest.raises(Stop):
        trainer.train(CONFIG, out, callback=stop)
    assert [line["round"] for line in metrics.read(out / "metrics.jsonl")] == [0, 1, 2]  # one more than the checkpoint knows
    assert not (out / "summary.json").exists()
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"round": 3, "train_lo')
    seen = []
    trainer.train(CONFIG, out, resume=True, callback=lambda state, record: seen.append(record["round"]))
    assert seen == [2, 3]
    assert exact(out) == exact(uninterrupted)
    ours, theirs = weights(out), weights(uninterrupted)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


def test_resume_of_a_finished_run_changes_nothing(uninterrupted):
    before = content(uninterrupted)
    summary = trainer.train(CONFIG, uninterrupted, resume=True, callback=lambda *_: pytest.fail("a round was run"))
    assert summary == json.loads((uninterrupted / "summary.json").read_text())
    assert content(uninterrupted) == before


@pytest.mark.parametrize("field, value", [("rounds", 8), ("seed", 1), ("aligner", "random")])
def test_resume_with_another_configuration_is_refused(uninterrupted, field, value):
    before = content(uninterrupted)
    with pytest.raises(UsageError, match=rf"--resume: {field} differ"):
        trainer.train(dataclasses.replace(CONFIG, **{field: value}), uninterrupted, resume=True)
    assert content(uninterrupted) == before


def test_out_must_be_unused_and_resume_needs_a_run(uninterrupted, tmp_path):
    file = tmp_path / "file"
    file.touch()
    for out in (uninterrupted, file):
        with pytest.raises(UsageError, match=r"--out .* is not empty"):
            trainer.claim(out, CONFIG, resume=False)
    for out in (tmp_path / "absent", tmp_path):
        with pytest.raises(UsageError, match="holds no run to continue"):
            trainer.claim(out, CONFIG, resume=True)
    trainer.claim(tmp_path / "absent", CONFIG, resume=False)
    assert not (tmp_path / "absent").exists()


def test_a_run_whose_data_stay_on_the_host_is_the_same_bit_for_bit(uninterrupted):
    run = trainer.Run(setup.build(dataclasses.replace(CONFIG, stream=1)))
    records = [record for (record,) in run.blocks()]
    assert run.setup.population.x.shape[0] == 1  # the examples are not there
    ours = [{name: value for name, value in json.loads(json.dumps(line)).items() if name not in MEASURED} for line in records]
    assert ours == exact(uninterrupted)


def test_checkpoints_and_evaluations_fall_where_the_configuration_says(uninterrupted):
    assert sorted(path.name for path in (uninterrupted / "checkpoints").iterdir()) == ["2", "4"]
    lines = exact(uninterrupted)
    assert [line["eval_accuracy"] is not None for line in lines] == [False, True, False, True]
    for line in lines:
        assert sum(line["load"]) == CONFIG.cohort * CONFIG.slots and math.isfinite(line["train_loss"])


def failing(message, times):
    """A program that fails as XLA does."""

    def program(*_):
        times.append(1)
        raise jax.errors.JaxRuntimeError(message)

    return program


def test_out_of_memory_halves_the_chunk_and_resume_keeps_it(tmp_path):
    build, notes, times = setup.build(QUICK), [], []
    run = trainer.Run(build, note=notes.append)
    assert run.chunk == QUICK.cohort
    run.program = failing("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes", times)
    with Checkpoints(tmp_path) as checkpoints:
        records = [record for (record,) in run.blocks(checkpoints)]
    assert (run.chunk, len(times), len(records), run.done) == (3, 1, 4, 4)
    assert notes == ["out of device memory: training 3 clients at once from here on"]
    shutil.rmtree(tmp_path / "4")
    with Checkpoints(tmp_path) as checkpoints:
        resumed = trainer.Run(build)
        resumed.restore(checkpoints)
        assert (resumed.done, resumed.chunk) == (2, 3)
        assert all(leaf.committed for leaf in jax.tree.leaves(resumed.state))  # else the next block would compile again
        again = list(resumed.blocks())
    assert [record["load"] for (record,) in again] == [record["load"] for record in records[2:]]
    jax.tree.map(np.testing.assert_array_equal, run.state.experts, resumed.state.experts)


def test_a_run_is_traced_once_and_donates_its_state(monkeypatch):
    traces, real = [], trainer.rounds
    monkeypatch.setattr(trainer, "rounds", lambda step, most: real(lambda *args: (traces.append(1), step(*args))[1], most))
    run = trainer.Run(setup.build(dataclasses.replace(QUICK, rounds=5)))
    blocks = run.blocks()
    next(blocks)
    count, before = len(traces), run.state
    assert len(list(blocks)) == 3 + 1 and run.done == 5
    assert len(traces) == count  # also the block of one round
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.experts))


@pytest.mark.parametrize(
    ("changes", "counts"),
    [
        (dict(rounds=6, eval_every=2), [None] * 3),
        (dict(rounds=5, eval_every=2), [2, 2, 1]),
        (dict(rounds=3, eval_every=9), [None]),
        (dict(rounds=4, eval_every=4, checkpoint_every=2), [None] * 2),
        (dict(rounds=6, eval_every=3, checkpoint_every=2), [2, 1, 1, 2]),
    ],
)
def test_blocks_of_one_length_are_all_rounds_of_a_program(changes, counts):
    run = trainer.Run(setup.build(dataclasses.replace(QUICK, **(dict(checkpoint_every=100) | changes))))
    assert [count for _, count, _ in run._windows()] == counts


def test_an_error_inside_a_round_is_no_mistake_of_the_user():
    run = trainer.Run(setup.build(QUICK))

    def program(*_):
        raise ValueError("shapes disagree")

    run.program = program
    with pytest.raises(RuntimeError, match="round 0 failed: shapes disagree"):
        next(run.blocks())


@pytest.mark.parametrize("message, chunk", [("RESOURCE_EXHAUSTED: Out of memory", 1), ("INTERNAL: broken", 4)])
def test_other_failures_are_raised(message, chunk):
    run = trainer.Run(setup.build(dataclasses.replace(QUICK, chunk=chunk)), note=pytest.fail)
    run.program = failing(message, [])
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        next(run.blocks())
    assert run.done == 0


PERSONAL = {"router": "personal", "dtype": "bfloat16", "router_prior": 1.0, "profile": "tiers"}


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"aligner": "full"}, PERSONAL], ids=["full", "personal"])
def test_full_and_personal_and_bfloat16_runs_stay_finite(changes):
    config = dataclasses.replace(QUICK, rounds=2, **changes)
    run = trainer.Run(setup.build(config))
    records = [record for (record,) in run.blocks()]
    for line in records:
        assert math.isfinite(line["train_loss"])
    for name in ("eval_loss", "eval_accuracy", "client_accuracy_mean", "client_accuracy_p10"):
        assert records[-1][name] is not None and math.isfinite(records[-1][name])
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((run.state.experts, run.state.shared)))
    if config.aligner == "full":
        assert records[0]["load"] == [config.cohort] * config.experts
    if config.router == "personal":
        assert all(leaf.shape[0] == config.population for leaf in jax.tree.leaves(run.state.personal))


@pytest.mark.slow
def test_seeds_side_by_side_are_those_one_after_the_other():
    first = setup.build(QUICK)
    setups = [setup.variant(first, dataclasses.replace(QUICK, seed=seed)) for seed in (0, 1)]
    together = trainer.Run(*setups)
    columns = list(zip(*together.blocks(), strict=True))
    alone = trainer.Run(first)
    for made, ours in zip(setups, columns, strict=True):
        alone.start(made)
        theirs = [record for (record,) in alone.blocks()]
        assert len(ours) == len(theirs) == CONFIG.rounds
        for a, b in zip(ours[:2], theirs[:2], strict=True):  # later, rounding may change an assignment
            assert a["load"] == b["load"] and a["bytes_down"] == b["bytes_down"]
            assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)
        assert ours[1]["eval_accuracy"] == pytest.approx(theirs[1]["eval_accuracy"], abs=0.01)
        assert ours[1]["client_accuracy_mean"] == pytest.approx(theirs[1]["client_accuracy_mean"], abs=0.02)
    assert columns[0][0]["train_loss"] != columns[1][0]["train_loss"]


def test_seeds_run_side_by_side_on_accelerators_with_enough_memory(monkeypatch):
    first = setup.build(QUICK)
    setups = [setup.variant(first, dataclasses.replace(QUICK, seed=seed)) for seed in (0, 1)]
    assert compare.one_program(setups) and not compare.side_by_side(setups, 1e12)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert compare.side_by_side(setups, 1e12)
    assert not compare.side_by_side(setups[:1], 1e12)
    assert not compare.side_by_side(setups, 1e3)
    other = dataclasses.replace(setups[1], parts=first.parts._replace(rest=jax.tree.map(lambda leaf: leaf + 1, first.parts.rest)))
    assert not compare.one_program([first, other])


@pytest.mark.slow
def test_a_run_of_one_block_can_be_traced(tmp_path):
    run = trainer.Run(setup.build(dataclasses.replace(QUICK, rounds=2)))
    list(run.blocks())  # compiles, of which a trace is large
    run.start(run.setup)
    assert len(list(run.blocks(trace=str(tmp_path)))) == 2
    assert [path for path in tmp_path.rglob("*") if path.is_file()]


def text(path):
    """Three natural clients whose texts repeat a word of their own."""
    words = np.array([[0, 1, 2, 3], [3, 2, 1, 0], [1, 1, 0, 0]], np.int32)
    stream = np.concatenate([np.tile(word, (16, 3)) for word in words])
    np.savez(path, x=stream[:, :8], y=stream[:, 1:9], client_ids=np.repeat(np.arange(3), 16))
    return str(path)


@pytest.mark.parametrize("model", ["resnet", pytest.param("transformer", marks=pytest.mark.slow)])
def test_every_model_trains(model, tmp_path):
    options = {"resnet": dict(widths=[8, 8]), "transformer": dict(layers=2, features=16, heads=2, expert_hidden=16, token_capacity=2.0)}
    small = dict(model=model, model_options=options[model], experts=4, cohort=3, rounds=4, eval_every=4, shared_experts=1, top_k=2)
    small |= dict(aligner="greedy", fitness="accuracy", augment=model == "resnet")
    if model == "transformer":
        small |= dict(data=text(tmp_path / "text.npz"), split="natural", client_lr=0.5)
    run = trainer.Run(setup.build(TrainConfig(**small)))
    records = [record for (record,) in run.blocks()]
    assert run.setup.population.num_clients == (3 if model == "transformer" else 100)
    assert all(math.isfinite(line["train_loss"]) and line["rejected_updates"] == 0 for line in records)
    assert math.isfinite(records[-1]["eval_loss"]) and records[-1]["client_accuracy_mean"] is not None
    if model == "transformer":
        assert records[-1]["train_loss"] < 0.8 * records[0]["train_loss"]


def test_label_priors_are_part_of_the_loss_of_a_run(tmp_path):
    small = dict(
        split="classes", population=20, cohort=4, rounds=3, eval_every=3, loss="balanced_softmax", prox=0.1, prox_on="shared", agreement=0.2
    )
    small |= dict(aligner="random", fitness="usage", model_options={"hidden": 8, "expert_hidden": 8})
    run = trainer.Run(setup.build(TrainConfig(**small)))
    (first,), *_ = run.blocks()
    assert np.abs(run.setup.population.label_prior).max() > 1 and run.setup.holdout.label_prior is None
    assert first["train_loss"] < 0.8 * np.log(10)  # two classes of ten are known from the start
    with pytest.raises(ValueError, match="loss: balanced_softmax does not go with stream"):
        setup.build(TrainConfig(**small, stream=2))


def test_a_model_that_does_not_fit_the_data_is_refused(tmp_path):
    file = text(tmp_path / "text.npz")
    with pytest.raises(ValueError, match="model: mlp does not fit data"):
        trainer.train(TrainConfig(data=file, split="natural", cohort=3), tmp_path / "run")
    with pytest.raises(ValueError, match=r"augment: .*text.npz has examples of shape \(\d+,\), only images can be"):
        setup.build(TrainConfig(data=file, split="natural", cohort=3, model="transformer", augment=True))
    with pytest.raises(ValueError, match=r"cohort: must be at most the number of clients \(3\), got 4"):
        setup.build(TrainConfig(data=file, split="natural", cohort=4, model="transformer"))
    with pytest.raises(ValueError, match="eval_every: must be at least 1"):
        trainer.train(dataclasses.replace(CONFIG, eval_every=0), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_experts_do_the_work():
    run = trainer.Run(setup.build(dataclasses.replace(QUICK, rounds=60)))
    accuracy = list(run.blocks())[-1][0]["eval_accuracy"]

    def silenced(path, value):
        return jnp.zeros_like(value) if "w_out" in jax.tree_util.keystr(path) or "b_out" in jax.tree_util.keystr(path) else value

    experts = jax.tree_util.tree_map_with_path(silenced, run.state.experts)
    without = global_evaluation(run.setup)(dataclasses.replace(run.state, experts=experts))["eval_accuracy"]
    assert accuracy >= 0.5
    assert accuracy - without >= 0.2
