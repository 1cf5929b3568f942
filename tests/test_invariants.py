"""Invariants hold in runs of every kind, each is seen when it is broken, and a run that breaks one or diverges stops in one line."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_round

from fedmoe_jax import alignment, cli, invariants, mass
from fedmoe_jax.alignment import assign, holders
from fedmoe_jax.base import NO_EXPERT, Alignment, Cohort, Feedback, LoadMonitor
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
        tokens=of_experts, weights={"w": jnp.ones(3)}, groups=1, kept=jnp.bool_(True), conserved=jnp.bool_(True),
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
    (5, {"kept": jnp.bool_(False)}),
    (6, {"conserved": jnp.bool_(False)}),
]


def test_a_good_round_holds():
    assert invariants.holding(**good()).tolist() == [True] * len(invariants.NAMES)


@pytest.mark.parametrize("number, change", BROKEN)
def test_what_is_broken_is_seen(number, change):
    assert not invariants.holding(**good() | change)[number]


SLOTS = Cohort(jnp.arange(9), jnp.arange(9) != 4, jnp.array([2, 1, 2, 0, 2, 2, 1, 2, 5]))
ALIGNERS = ("random", "greedy", "load_only", "balanced", "full")


def aligned(name, min_holders=1, groups=1, changed=lambda held: held, **options):
    """Whether an aligner of 4 experts keeps what it promises to nine clients, who have some slots, after its assignment was changed."""
    most = {} if name == "full" else dict(max_slots=2)
    made = getattr(alignment, name)(num_experts=4, groups=groups, **most, **options)
    assignment, _ = made.align(jax.random.key(1), made.init(9), SLOTS)
    assignment = dataclasses.replace(assignment, held=changed(assignment.held))
    kept = holders.leave_out(assignment, 4 * groups, min_holders)
    return bool(invariants.as_promised(assignment, kept, min_holders, groups, 4 * groups))


@pytest.mark.parametrize("name", ALIGNERS)
def test_aligners_keep_what_they_promise_and_empty_slots_are_seen(name):
    assert aligned(name) and aligned(name, min_holders=4)
    assert not aligned(name, changed=lambda held: held.at[0, 0].set(NO_EXPERT))


@pytest.mark.parametrize("name", ["load_only", "balanced", "full"])
def test_each_group_keeps_what_it_promises(name):
    assert aligned(name, groups=2)
    assert not aligned(name, groups=2, changed=lambda held: held.at[0, 2:].set(NO_EXPERT))


@pytest.mark.parametrize("name", ["load_only", "balanced"])
def test_an_assignment_outside_of_its_bounds_is_seen(name):
    assert aligned("random", changed=crowded) and not aligned(name, changed=crowded)


def beyond(lower, upper):
    """A monitor of these bounds for each expert."""
    given = alignment.load.monitor()
    return LoadMonitor(given.init, lambda *_: (jnp.full(4, lower), jnp.full(4, upper)), given.update, given.deficit)


def crowded(held):
    """All on the first two experts."""
    return jnp.where(held == NO_EXPERT, held, jnp.arange(2))


@pytest.mark.parametrize("bounds", [(5, 9), (0, 1), (-3, -1)])
def test_bounds_that_cannot_be_met_are_broken_no_more_than_need_be(bounds):
    assert aligned("balanced", load=beyond(*bounds))
    assert bounds[1] < 0 or not aligned("balanced", load=beyond(*bounds), changed=crowded)


def test_bounds_that_are_broken_without_need_are_seen_though_that_is_told(monkeypatch):
    right = assign.balanced

    def wrong(fitness, slots, lower, upper, **options):
        mask = jnp.arange(fitness.shape[1]) < slots[:, None]
        load = mask.sum(axis=0)
        violation = jnp.abs(load - jnp.clip(load, lower, upper)).sum()
        return mask, right(fitness, slots, lower, upper, **options)[1]._replace(violation=violation)

    monkeypatch.setattr(assign, "balanced", wrong)
    assert not aligned("balanced")


def test_an_aligner_that_goes_by_fitness_alone_is_seen(monkeypatch):
    right = assign.balanced

    def greedy(fitness, slots, *args, **options):
        return assign.greedy(fitness, slots), right(fitness, slots, *args, **options)[1]

    monkeypatch.setattr(assign, "balanced", greedy)
    assert not aligned("balanced")


@pytest.mark.parametrize("held", [[[0, 1], [1, 2], [1, NO_EXPERT]], [[NO_EXPERT, 1], [1, NO_EXPERT], [NO_EXPERT, NO_EXPERT]]])
def test_experts_lose_their_holders_only_where_they_have_too_few(held):
    nothing = jnp.zeros((3, 2))
    made = Alignment(jnp.array([[0, 1], [1, 2], [1, NO_EXPERT]]), jnp.zeros((3, 0), int), nothing, nothing[:, 0])
    assert invariants.as_promised(made, holders.leave_out(made, 3, 2), 2, 1, 3)
    assert not invariants.as_promised(made, dataclasses.replace(made, held=jnp.array(held)), 2, 1, 3)


DEADLINE = {"aligner": "balanced", "availability": 0.5, "profile": "phones", "deadline": 0.1}


@pytest.mark.parametrize("changes", [{}, *(pytest.param(c, marks=pytest.mark.slow) for c in ({"aligner": "full"}, DEADLINE))])
def test_runs_hold(changes):
    built = setup.build(dataclasses.replace(CONFIG, **changes))
    assert len(list(trainer.Run(dataclasses.replace(built, check=True)).blocks())) == CONFIG.rounds


def test_what_is_not_asked_for_is_not_computed(monkeypatch):
    for module, name in ((invariants, "holding"), (invariants, "as_promised"), (mass, "of_update"), (mass, "conserved")):
        monkeypatch.setattr(module, name, None)
    built = setup.build(CONFIG)
    algorithm = built.algorithm(5)
    _, info = jax.eval_shape(algorithm.step, algorithm.init(jax.random.key(0), built.population), built.population)
    assert info.invariants is None


@pytest.mark.parametrize("name", ["load_only", "balanced"])
def test_a_promise_costs_nothing_where_nobody_looks(name):
    """The program is that of an aligner that tells by how much it misses its bounds, which each round reports, and no more."""
    made, data = getattr(alignment, name)(num_experts=4, max_slots=2), small_round.population()

    def silent(*args):
        given, state = made.align(*args)
        told = alignment.Promise(jnp.zeros_like(given.promised.slots), violation=given.promised.violation)
        return dataclasses.replace(given, promised=told), state

    def program(aligner):
        built = small_round.algorithm(aligner=aligner)
        return built.step.lower(built.init(small_round.KEY, data), data).as_text()

    assert program(made) == program(made._replace(align=silent))


def test_a_violation_names_invariant_and_round(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(invariants, "holding", lambda *args: jnp.arange(len(invariants.NAMES)) != 3)
    (tmp_path / "a.toml").write_text(to_toml(CONFIG))
    assert cli.main(["train", str(tmp_path / "a.toml"), "--check", "--out", str(tmp_path / "run")]) == 1
    err = capsys.readouterr().err
    assert err == f"fedmoe train: round 0: it does not hold that {invariants.NAMES[3]}\n"
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("stream", [None, pytest.param(1, marks=pytest.mark.slow)])
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


@pytest.mark.slow
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
