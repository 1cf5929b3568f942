"""Invariants hold in runs of every kind, each is seen when it is broken, and a run that breaks one or diverges stops in one line."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmoe_jax import cli, invariants
from fedmoe_jax.base import NO_EXPERT, Alignment, Cohort, Feedback
from fedmoe_jax.training import divergence, metrics, setup, trainer
from fedmoe_jax.training.config import TrainConfig, to_toml
from fedmoe_jax.training.interrupt import StoppedError

CONFIG = TrainConfig(population=20, cohort=5, experts=4, rounds=2, eval_every=2, aligner="greedy", model_options={"hidden": 16})


def good():
    """Two clients that train and one that is absent: expert 0 and 2, expert 1."""
    held = jnp.array([[0, 2], [1, NO_EXPERT], [NO_EXPERT, NO_EXPERT]])
    cohort = Cohort(jnp.arange(3), jnp.array([True, True, False]), jnp.array([2, 1, 0]), None)
    nothing = jnp.zeros(held.shape)
    tokens = jnp.array([[3, 4], [5, 0], [0, 0]])
    feedback = Feedback(jnp.array([7, 5, 0]), tokens, nothing, nothing, nothing)
    load, of_experts = jnp.array([1, 1, 1, 0]), jnp.array([3.0, 5.0, 4.0, 0.0])
    return dict(
        cohort=cohort, trainees=cohort, alignment=Alignment(held, held[:, :0], nothing, nothing[:, 0]), feedback=feedback, load=load,
        tokens=of_experts, weights={"w": jnp.ones(3)}, groups=1,
    )  # fmt: skip


def held_by(held):
    made = good()
    return {"alignment": dataclasses.replace(made["alignment"], held=jnp.array(held))}


BROKEN = [
    (0, held_by([[0, 4], [1, NO_EXPERT], [NO_EXPERT, NO_EXPERT]])),
    (0, held_by([[2, 2], [1, NO_EXPERT], [NO_EXPERT, NO_EXPERT]])),
    (0, held_by([[0, 2], [1, 3], [NO_EXPERT, NO_EXPERT]])),
    (1, held_by([[0, 2], [1, NO_EXPERT], [3, NO_EXPERT]])),
    (1, {"feedback": dataclasses.replace(good()["feedback"], examples=jnp.array([7, 5, 1]))}),
    (2, {"load": jnp.array([1, 1, 2, 0])}),
    (2, {"load": jnp.array([3, 0, 0, 0])}),
    (3, {"tokens": jnp.array([3.0, 5.0, 3.0, 1.0])}),
    (4, {"weights": {"w": jnp.array([1.0, jnp.nan])}}),
]


def test_a_good_round_holds():
    assert invariants.holding(**good()).tolist() == [True] * len(invariants.NAMES)


@pytest.mark.parametrize("number, change", BROKEN)
def test_what_is_broken_is_seen(number, change):
    assert not invariants.holding(**good() | change)[number]


DEADLINE = {"aligner": "balanced", "availability": 0.5, "profile": "phones", "deadline": 0.1}


@pytest.mark.parametrize("changes", [{}, *(pytest.param(c, marks=pytest.mark.slow) for c in ({"aligner": "full"}, DEADLINE))])
def test_runs_hold(changes):
    built = setup.build(dataclasses.replace(CONFIG, **changes))
    assert len(list(trainer.Run(dataclasses.replace(built, check=True)).blocks())) == CONFIG.rounds


def test_what_is_not_asked_for_is_not_computed():
    built = setup.build(CONFIG)
    algorithm = built.algorithm(5)
    _, info = jax.eval_shape(algorithm.step, algorithm.init(jax.random.key(0), built.population), built.population)
    assert info.invariants is None


def test_a_violation_names_invariant_and_round(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(invariants, "holding", lambda *args: jnp.array([True, True, True, False, True]))
    (tmp_path / "a.toml").write_text(to_toml(CONFIG))
    assert cli.main(["train", str(tmp_path / "a.toml"), "--check", "--out", str(tmp_path / "run")]) == 1
    err = capsys.readouterr().err
    assert err == f"fedmoe train: round 0: it does not hold that {invariants.NAMES[3]}\n"
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("stream", [None, 1])
def test_a_run_that_diverges_goes_back_and_takes_another_way(tmp_path, stream, monkeypatch):
    config = dataclasses.replace(CONFIG, rounds=6, eval_every=1, checkpoint_every=2, on_divergence="rollback", stream=stream)
    check, seen = divergence.check_finite, []

    def poison(state):
        return dataclasses.replace(state, shared=jax.tree.map(lambda leaf: leaf * jnp.nan, state.shared))

    def poisoned(state, infos, results, done, count):
        seen.append((done, np.asarray(jax.random.key_data(state.key)).tolist()))
        check(poison(state) if len(seen) == 4 else state, infos, results, done, count)

    monkeypatch.setattr(divergence, "check_finite", poisoned)
    summary = trainer.train(config, tmp_path / "run")
    assert [done for done, _ in seen] == [0, 1, 2, 3, 2, 3, 4, 5] and summary["rounds"] == 6
    assert [record["round"] for record in metrics.read(tmp_path / "run" / "metrics.jsonl")] == list(range(6))
    assert len({str(key) for _, key in seen[:4]}) == 1 and len({str(key) for _, key in seen[4:]}) == 1 and seen[3][1] != seen[4][1]


def test_a_run_that_always_diverges_goes_back_three_times_and_stops(tmp_path, capsys):
    config = dataclasses.replace(CONFIG, server_lr=1e38, client_lr=1e3, on_divergence="rollback")
    with pytest.raises(StoppedError, match="round 1: training has diverged"):
        trainer.train(config, tmp_path / "run")
    told = capsys.readouterr().out
    assert [f"back to round 0, with other clients ({number} of 3)" in told for number in (1, 2, 3, 4)] == [True, True, True, False]
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_that_diverges_stops_if_it_is_to():
    config = dataclasses.replace(CONFIG, server_lr=1e38, client_lr=1e3, on_divergence="stop")
    with pytest.raises(StoppedError, match="round 1: training has diverged"):
        list(trainer.Run(setup.build(config)).blocks())
