"""A least number of clients that hold an expert: left out where there are fewer, and asked for by the bounds of load."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_round import CLIENTS, EXPERTS, KEY, algorithm, aligner, distance, population

from fedmoe_jax import NO_EXPERT, Alignment, Cohort, Feedback, alignment
from fedmoe_jax.alignment import assign, holders, load

SEEDS = st.integers(0, 2**32 - 1)
MONITOR = load.monitor()
LEAST = 6


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(1, 4))
def test_experts_with_too_few_holders_are_left_out(seed, least):
    draw = np.random.default_rng(seed)
    held = np.stack([draw.permutation(6)[:3] for _ in range(5)])
    held[draw.random(held.shape) < 0.4] = NO_EXPERT
    number = np.bincount(held[held >= 0], minlength=6)
    keeps = (held >= 0) & (number[np.maximum(held, 0)] >= least)
    before = Alignment(jnp.asarray(held), jnp.zeros((5, 0), int), jnp.ones((5, 3)), jnp.zeros(5))
    found = holders.leave_out(before, 6, least)
    np.testing.assert_array_equal(found.held, np.where(keeps, held, NO_EXPERT))
    if least > 1:
        np.testing.assert_array_equal(found.fitness, keeps)


@jax.jit
def bounds(state, slots, wanted):
    return holders.at_least(MONITOR, 3).bounds(state, slots, wanted), MONITOR.bounds(state, slots, wanted)


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_bounds_ask_for_enough_holders_or_none(seed):
    draw, experts, least = np.random.default_rng(seed), 6, 3
    slots = jnp.asarray(draw.integers(0, 3, 12) * (draw.random(12) < draw.random()), jnp.int32)
    state = MONITOR.init(experts)
    for _ in range(3):
        held = jnp.asarray(np.stack([draw.permutation(experts)[:2] for _ in range(12)]), jnp.int32)
        state = MONITOR.update(state, held, jnp.asarray(draw.integers(0, 9, held.shape), jnp.int32), jnp.zeros(experts))
    wanted = jnp.full(experts, slots.sum() / experts)
    (lower, upper), plain = bounds(state, slots, wanted)
    total, clients = int(slots.sum()), int((slots > 0).sum())
    number = min(total // least, experts)
    if clients < least or number < int(slots.max()):
        np.testing.assert_array_equal((lower, upper), plain)
        return
    served = np.asarray(upper) > 0
    assert served.sum() == number and (np.asarray(lower)[served] >= least).all() and (np.asarray(lower)[~served] == 0).all()
    assert (lower <= upper).all() and (upper <= clients).all() and lower.sum() <= total <= upper.sum()
    mask = assign.balanced(jnp.asarray(draw.random((12, experts)), jnp.float32), slots, lower, upper)
    loads = np.asarray(mask.sum(0))
    assert loads.sum() == total and ((loads == 0) | (loads >= least)).all()


def test_one_holder_is_always_enough_and_none_is_refused():
    slots, state = jnp.full(4, 2, jnp.int32), MONITOR.init(4)
    wanted = jnp.full(4, 2.0)
    jax.tree.map(
        np.testing.assert_array_equal, holders.at_least(MONITOR, 1).bounds(state, slots, wanted), MONITOR.bounds(state, slots, wanted)
    )
    with pytest.raises(ValueError, match="min_holders is 0, it must be at least 1"):
        holders.at_least(MONITOR, 0)
    with pytest.raises(ValueError, match="min_holders is 0, it must be at least 1"):
        algorithm(min_holders=0)


@functools.cache
def guarded(**options):
    made = alignment.balanced(num_experts=EXPERTS, max_slots=2, load=holders.at_least(load.monitor(), LEAST))
    return algorithm(aligner=made, min_holders=LEAST, cohort_size=CLIENTS, **options)


def test_balanced_gives_every_expert_enough_holders_or_none_in_rounds():
    data, seen = population(), []
    state = guarded().init(KEY, data)
    for _ in range(6):
        state, info = guarded().step(state, data)
        seen.append(np.asarray(info.load))
        assert info.load.sum() == 2 * CLIENTS  # no slot is lost
    seen = np.stack(seen)
    assert ((seen == 0) | (seen >= LEAST)).all() and (seen.sum(0) > 0).all() and (seen == 0).any()


def test_an_expert_of_which_too_few_send_something_keeps_its_weights():
    """Clients whose features are no numbers send nothing."""
    data = population(broken=(0, 1, 2, 3))
    start = guarded().init(KEY, data)
    state, info = guarded().step(start, data)
    assert info.rejected_updates == 4 and info.load.sum() == 2 * CLIENTS
    changed, arrived = np.asarray(state.last_trained) == 0, np.asarray(info.tokens) > 0
    assert (changed <= arrived).all() and arrived.sum() > changed.sum()
    for leaf, before in zip(jax.tree.leaves(state.experts), jax.tree.leaves(start.experts), strict=True):
        same = np.asarray([(leaf[expert] == before[expert]).all() for expert in range(EXPERTS)])
        assert same[~changed].all()


@pytest.mark.parametrize(
    ("least", "sent", "held"), [(1, [1, 1, 0, 0], [1, 1, 1, 1]), (2, [1, 0, 0, 0], [1, 1, 0, 0]), (3, [0] * 4, [1, 0, 0, 0])]
)
def test_what_changes_is_what_enough_send_or_where_that_is_hidden_what_enough_hold(least, sent, held):
    """Expert 0 has three holders of whom two send something, expert 1 two and one, expert 2 one and none, expert 3 one who is late."""
    rows = jnp.asarray([[0, 1], [0, 1], [0, 2], [3, NO_EXPERT]])
    cohort = Cohort(jnp.arange(4), jnp.array([True, True, True, False]), jnp.full(4, 2, jnp.int32))
    slots, tokens = jnp.zeros((4, 2)), jnp.asarray([[5, 3], [2, 0], [0, 0], [0, 0]], jnp.int32)
    told = Feedback(jnp.asarray([4, 4, 0, 0], jnp.int32), tokens, slots, slots, slots)
    aligned = Alignment(rows, rows[:, :0], slots, slots[:, 0])
    for hidden, expected, clients in ((False, sent, 2), (True, held, 3)):
        found, enough = holders.served(cohort, aligned, told, 4, least, hidden=hidden)
        np.testing.assert_array_equal(found, np.array(expected, bool))
        assert bool(enough) == (clients >= least)
    nothing = dataclasses.replace(told, examples=jnp.zeros(4, jnp.int32))
    assert [bool(holders.served(cohort, aligned, nothing, 4, least, hidden=hidden)[1]) for hidden in (False, True)] == [False, True]


@pytest.mark.parametrize("broken", [(0, 1), (0, 1, 2, 3)])
def test_the_server_learns_nothing_of_what_too_few_sent(broken):
    """Neither weights nor what momentum keeps, nor of the shared part where too few clients are left."""
    made = guarded(server_optimizer=optax.sgd(1.0, momentum=0.9))
    start = made.init(KEY, population(broken=broken))
    state, info = made.step(start, population(broken=broken))
    few, (experts, shared) = np.asarray(state.last_trained) < 0, state.optimizer[0].trace
    assert few.any() and (np.asarray(info.tokens)[few] > 0).any()
    for leaf in jax.tree.leaves(experts):
        np.testing.assert_array_equal([float(jnp.abs(leaf[expert]).max()) == 0 for expert in range(EXPERTS)], few)
    enough = CLIENTS - len(broken) >= LEAST
    assert all(bool((leaf != 0).any()) == enough for leaf in jax.tree.leaves(shared))
    assert (distance(start.shared, state.shared) > 0) == enough


@pytest.mark.parametrize("option", [dict(control_variates=True), dict(router="statistics")])
def test_what_single_holders_return_beside_updates_is_refused(option):
    with pytest.raises(ValueError, match="does not go with min_holders above 1"):
        algorithm(aligner=aligner("random"), min_holders=2, **option)
