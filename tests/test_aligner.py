"""Aligners: the same clients get the same experts in any order, bounds hold, absence means nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmoe_jax import alignment
from fedmoe_jax.alignment import assign, fitness, load
from fedmoe_jax.alignment.aligner import held_slots
from fedmoe_jax.base import NO_EXPERT, Alignment, Cohort, Feedback
from fedmoe_jax.experts import held_mask

POPULATION, CLIENTS, EXPERTS, SLOTS, PROBES = 40, 12, 6, 3, 2
NAMES = ["random", "greedy", "load_only", "balanced", "full"]


def make(name):
    learnt = fitness.solo(probes=PROBES)
    if name == "full":
        return alignment.full(num_experts=EXPERTS, fitness=learnt)
    return getattr(alignment, name)(num_experts=EXPERTS, max_slots=SLOTS, fitness=learnt)


def make_cohort(seed):
    rng = np.random.default_rng(seed)
    client = rng.permutation(POPULATION)[:CLIENTS]
    present = rng.random(CLIENTS) < 0.8
    client[~present] = client[0]  # padding repeats a client
    present[0] = True
    return Cohort(jnp.array(client, jnp.int32), jnp.array(present), jnp.array(rng.integers(0, SLOTS + 2, CLIENTS), jnp.int32))


def feedback_for(aligned, cohort, seed):
    """Losses that depend on the client and the expert alone."""
    taste = jax.random.uniform(jax.random.key(seed), (POPULATION, EXPERTS))
    expert = jnp.concatenate([aligned.held, aligned.probed], axis=1)
    loss = taste[cohort.client[:, None], expert]
    held = (aligned.held != NO_EXPERT) & cohort.present[:, None]
    part = jnp.where(held, loss[:, : held.shape[1]], 0.0)
    return Feedback(
        examples=jnp.where(cohort.present, 20, 0),
        tokens=jnp.where(held, 10 + aligned.held, 0),
        correct=part,
        loss=part,
        solo_loss=jnp.where(expert != NO_EXPERT, loss, 0.0),
    )


def play(aligner, rounds):
    """Cohorts and alignments of some rounds, as [round, ...], and the last state."""
    cohorts = jax.tree.map(lambda *rows: jnp.stack(rows), *[make_cohort(seed) for seed in range(rounds)])

    def one_round(state, inputs):
        key, cohort = inputs
        aligned, state = aligner.align(key, state, cohort)
        return aligner.learn(state, cohort, aligned, feedback_for(aligned, cohort, 0)), (aligned, state)

    keys = jax.random.split(jax.random.key(1), rounds)
    state, (aligned, states) = jax.jit(lambda s: jax.lax.scan(one_round, s, (keys, cohorts)))(aligner.init(POPULATION))
    return cohorts, aligned, states, state


@pytest.mark.parametrize("name", NAMES)
def test_permuting_the_cohort_permutes_the_alignment(name):
    aligner = make(name)
    _, _, _, learnt = play(aligner, 5)
    align = jax.jit(aligner.align)
    order = np.random.default_rng(0).permutation(CLIENTS)
    for seed, state in [(7, aligner.init(POPULATION)), (8, learnt)]:
        cohort, key = make_cohort(seed), jax.random.key(seed)
        aligned, after = align(key, state, cohort)
        permuted, after_permuted = align(key, state, jax.tree.map(lambda rows: rows[order], cohort))
        (promised, aligned), (permuted_promise, permuted) = (
            (x.promised, dataclasses.replace(x, promised=None)) for x in (aligned, permuted)
        )
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[order], b), aligned, permuted)
        np.testing.assert_array_equal(promised.slots[order], permuted_promise.slots)
        jax.tree.map(np.testing.assert_array_equal, (promised.lower, promised.upper), (permuted_promise.lower, permuted_promise.upper))
        jax.tree.map(np.testing.assert_array_equal, after, after_permuted)
        feedback = feedback_for(aligned, cohort, 0)
        shuffled = jax.tree.map(lambda rows: rows[order], (cohort, aligned, feedback))
        jax.tree.map(np.testing.assert_array_equal, aligner.learn(after, cohort, aligned, feedback), aligner.learn(after, *shuffled))


@pytest.mark.parametrize("name", NAMES)
def test_alignments_are_well_formed(name):
    aligner = make(name)
    assert aligner.max_slots == (EXPERTS if name == "full" else SLOTS)
    cohorts, aligned, _, _ = play(aligner, 10)
    assert aligned.held.shape == (10, CLIENTS, aligner.max_slots)
    assert aligned.probed.shape == (10, CLIENTS, PROBES if name in ("greedy", "balanced") else 0)
    for row in range(10):
        cohort = jax.tree.map(lambda rows, row=row: np.asarray(rows[row]), cohorts)
        held, probed = np.asarray(aligned.held[row]), np.asarray(aligned.probed[row])
        wanted = np.where(cohort.present, EXPERTS if name == "full" else np.minimum(cohort.slots, SLOTS), 0)
        np.testing.assert_array_equal((held != NO_EXPERT).sum(1), wanted)
        for client in range(CLIENTS):
            experts = held[client][held[client] != NO_EXPERT].tolist()
            tried = probed[client][probed[client] != NO_EXPERT].tolist()
            assert experts == sorted(set(experts)) and held[client].tolist()[: len(experts)] == experts
            assert len(set(tried)) == len(tried) and not set(tried) & set(experts)
            assert set(experts) | set(tried) <= set(range(EXPERTS))
            assert len(tried) == (probed.shape[1] if experts else 0)
        np.testing.assert_array_equal(np.asarray(aligned.fitness[row])[held == NO_EXPERT], 0.0)


def test_balanced_stays_within_bounds_for_50_rounds():
    aligner, monitor = make("balanced"), load.monitor()
    cohorts, aligned, states, last = play(aligner, 50)
    for row in range(50):
        slots = jnp.where(cohorts.present[row], jnp.minimum(cohorts.slots[row], SLOTS), 0)
        before = jax.tree.map(lambda rows, row=row: rows[row], states.load)
        lower, upper = monitor.bounds(before, slots, jnp.zeros(EXPERTS))
        clients = held_mask(aligned.held[row], EXPERTS).sum(0)
        assert ((lower <= clients) & (clients <= upper)).all()
    total = np.asarray(held_mask(aligned.held.reshape(-1, SLOTS), EXPERTS).sum(0) * (10 + jnp.arange(EXPERTS)))
    assert total.std() / total.mean() < 0.03  # tokens over the whole run
    assert np.isfinite(np.asarray(last.prices)).all()


def test_balanced_and_greedy_learn_what_clients_like():
    taste = np.asarray(jax.random.uniform(jax.random.key(0), (POPULATION, EXPERTS)))
    loss = {}
    for name in ("random", "greedy", "balanced"):
        cohorts, aligned, _, _ = play(make(name), 50)
        held, client = np.asarray(aligned.held)[25:], np.asarray(cohorts.client)[25:, :, None]
        loss[name] = taste[client, held][held != NO_EXPERT].mean()
    assert loss["greedy"] < loss["random"] - 0.1 and loss["balanced"] < loss["random"] - 0.1


def test_fitness_of_held_pairs_is_their_score():
    aligner = make("balanced")
    _, _, _, state = play(aligner, 5)
    cohort = make_cohort(11)
    aligned, _ = jax.jit(aligner.align)(jax.random.key(2), state, cohort)
    score = np.asarray(fitness.solo().score(state.fitness, cohort.client))
    for client in range(CLIENTS):
        for slot, expert in enumerate(aligned.held[client].tolist()):
            assert aligned.fitness[client, slot] == (score[client, expert] if expert != NO_EXPERT else 0.0)
    np.testing.assert_allclose(aligned.fitness_mean, np.where(cohort.present, score.mean(1), 0.0), rtol=1e-6)


def test_nobody_present_changes_no_fitness():
    aligner = make("balanced")
    cohort = Cohort(jnp.zeros(CLIENTS, jnp.int32), jnp.zeros(CLIENTS, bool), jnp.full(CLIENTS, SLOTS))
    state = aligner.init(POPULATION)
    aligned, after = jax.jit(aligner.align)(jax.random.key(0), state, cohort)
    assert (aligned.held == NO_EXPERT).all() and (aligned.probed == NO_EXPERT).all()
    learnt = aligner.learn(after, cohort, aligned, feedback_for(aligned, cohort, 0))
    np.testing.assert_array_equal(learnt.fitness.value, state.fitness.value)
    np.testing.assert_array_equal(learnt.load.load, state.load.load)


def test_more_probes_than_experts_leave_empty_places():
    aligner = alignment.balanced(num_experts=2, max_slots=1, fitness=fitness.solo(probes=3))
    cohort = Cohort(jnp.arange(3), jnp.ones(3, bool), jnp.ones(3, jnp.int32))
    aligned, _ = jax.jit(aligner.align)(jax.random.key(0), aligner.init(3), cohort)
    np.testing.assert_array_equal((aligned.probed != NO_EXPERT).sum(1), 1)
    assert (aligned.probed.max(1) == 1 - aligned.held[:, 0]).all()


def test_held_slots_inverts_held_mask():
    mask = jax.random.bernoulli(jax.random.key(0), 0.3, (30, EXPERTS))
    np.testing.assert_array_equal(held_mask(held_slots(mask, EXPERTS), EXPERTS), mask)


def test_align_and_learn_work_under_vmap_over_runs():
    aligner, cohort = make("balanced"), make_cohort(3)
    keys = jax.random.split(jax.random.key(0), 3)
    align = jax.jit(aligner.align)
    together, _ = jax.jit(jax.vmap(align, (0, None, None)))(keys, aligner.init(POPULATION), cohort)
    assert isinstance(together, Alignment)
    for run in range(3):
        alone, _ = align(keys[run], aligner.init(POPULATION), cohort)
        jax.tree.map(lambda a, b, run=run: np.testing.assert_array_equal(a[run], b), together, alone)


@pytest.mark.parametrize("name", ["random", "greedy", "load_only", "balanced"])
def test_impossible_sizes_are_refused(name):
    with pytest.raises(ValueError, match="max_slots is 5, it must be 1 to num_experts, 4"):
        getattr(alignment, name)(num_experts=4, max_slots=5)
    with pytest.raises(ValueError, match="max_slots is 0"):
        getattr(alignment, name)(num_experts=4, max_slots=0)
    with pytest.raises(ValueError, match="num_experts is 0"):
        alignment.full(num_experts=0)


def test_fitness_and_deficit_in_one_objective():
    """Without weight greedy; with it, the experts that fell behind are taken although they suit less."""
    slots = jnp.full(4, 1)
    cohort = Cohort(jnp.arange(4), jnp.ones(4, bool), slots)
    found = {}
    for weight in (0.0, 1.0):
        aligner = alignment.balanced(num_experts=EXPERTS, max_slots=1, objective="fitness+deficit", deficit_weight=weight)
        state = aligner.init(4)
        value = jnp.zeros((4, EXPERTS)).at[:, 0].set(0.5).at[:, 1].set(0.4)
        behind = load.LoadState(
            jnp.full(EXPERTS, 10.0).at[1].set(0.0), jnp.float32(EXPERTS - 1), jnp.zeros(EXPERTS), jnp.zeros(EXPERTS, int)
        )
        state = dataclasses.replace(state, fitness=dataclasses.replace(state.fitness, value=value), load=behind)
        found[weight] = np.asarray(aligner.align(jax.random.key(0), state, cohort)[0].held)[:, 0]
    np.testing.assert_array_equal(found[0.0], [0] * 4)
    np.testing.assert_array_equal(found[1.0], [1] * 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "other"}, "objective is 'other'"),
        ({"deficit_weight": -1.0}, "deficit_weight is -1"),
        ({"download_price": -1.0}, "download_price is -1"),
        ({"least_spread": -0.1}, "least_spread is -0.1"),
    ],
)
def test_options_of_balanced_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        alignment.balanced(num_experts=EXPERTS, max_slots=1, **options)


def test_an_aligner_that_weighs_bytes_prefers_what_clients_have():
    cached = jnp.eye(EXPERTS, dtype=bool)
    cohort = Cohort(jnp.arange(EXPERTS), jnp.ones(EXPERTS, bool), jnp.full(EXPERTS, 1), cached)
    cheap, dear = (alignment.balanced(num_experts=EXPERTS, max_slots=1, download_price=price) for price in (0.0, 0.01))
    held = [np.asarray(aligner.align(jax.random.key(0), aligner.init(EXPERTS), cohort)[0].held)[:, 0] for aligner in (cheap, dear)]
    np.testing.assert_array_equal(held[1], np.arange(EXPERTS))
    assert (held[0] != held[1]).any()
    grouped = alignment.balanced(num_experts=EXPERTS, max_slots=1, download_price=0.01, groups=2)
    both = dataclasses.replace(cohort, cached=jnp.concatenate([cached, cached[:, ::-1]], axis=1))
    aligned, _ = grouped.align(jax.random.key(0), grouped.init(EXPERTS), both)
    np.testing.assert_array_equal(aligned.held, np.stack([np.arange(EXPERTS), 2 * EXPERTS - 1 - np.arange(EXPERTS)], axis=1))


def test_differences_that_are_noise_are_not_followed():
    """Clients that like expert 0 a little best share it out once enough scores tell that it is only a little."""
    aligner = alignment.balanced(num_experts=EXPERTS, max_slots=1, load=load.monitor(tolerance=5.0), least_spread=0.1)
    cohort = Cohort(jnp.arange(CLIENTS), jnp.ones(CLIENTS, bool), jnp.full(CLIENTS, 1))
    state = aligner.init(CLIENTS)
    learnt = dataclasses.replace(state.fitness, value=jnp.full((CLIENTS, EXPERTS), 0.5).at[:, 0].set(0.52))

    def on_the_first(spread, told):
        known = dataclasses.replace(learnt, spread=jnp.float32(spread), told=jnp.int32(told))
        return (aligner.align(jax.random.key(0), dataclasses.replace(state, fitness=known), cohort)[0].held == 0).sum()

    enough = fitness.ROUNDS_TO_TELL
    assert on_the_first(0.11, enough) == on_the_first(0.09, enough - 1) == on_the_first(0.0, 0) == CLIENTS > on_the_first(0.09, enough)


def test_a_fitness_that_tells_no_spread_is_refused():
    plain = fitness.solo()
    own = plain._replace(
        init=lambda clients, experts: {"inside": plain.init(clients, experts)},
        score=lambda state, client: plain.score(state["inside"], client),
    )
    aligner = alignment.balanced(num_experts=EXPERTS, max_slots=1, fitness=own, least_spread=0.1)
    with pytest.raises(ValueError, match=r"least_spread is 0\.1, but the state of this fitness tells no spread"):
        aligner.align(jax.random.key(0), aligner.init(CLIENTS), Cohort(jnp.arange(2), jnp.ones(2, bool), jnp.ones(2, int)))


def test_a_round_tries_the_prices_of_the_last(monkeypatch):
    seen, solve = [], assign.balanced

    def spy(*arguments, prices, **options):
        seen.append(prices)
        return solve(*arguments, prices=prices, **options)

    monkeypatch.setattr(assign, "balanced", spy)
    aligner, key = make("balanced"), jax.random.key(0)
    before = aligner.init(POPULATION)
    taste = dataclasses.replace(before.fitness, value=jax.random.uniform(key, (POPULATION, EXPERTS)) + jnp.arange(EXPERTS))
    _, state = aligner.align(key, dataclasses.replace(before, fitness=taste), make_cohort(0))
    aligner.align(key, state, make_cohort(1))
    assert not (seen[0] != 0).any() and (seen[1] != 0).any()
    np.testing.assert_array_equal(seen[1], state.prices)
