"""Load: decayed sums against a plain loop; bounds keep their promises for any load and slots."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedmoe_jax.alignment import load
from fedmoe_jax.base import NO_EXPERT

CLIENTS, EXPERTS, SLOTS = 7, 5, 3
loads = hnp.arrays(np.float32, EXPERTS, elements=st.floats(0, 1e5, width=32))
slots_lists = hnp.arrays(np.int32, CLIENTS, elements=st.integers(0, EXPERTS))


NOTHING = jnp.zeros(EXPERTS)
RULES = {
    (tolerance, gain, demand): jax.jit(load.monitor(tolerance=tolerance, gain=gain, demand=demand).bounds)
    for tolerance, gain, demand in [(0.1, 0.0, 0.0), (0.0, 1.0, 0.0), (0.1, 1.0, 0.0), (3.0, 2.0, 0.0), (0.1, 1.0, 0.7), (0.0, 0.0, 1.0)]
}


def state_of(amount, pairs=0.0, asked=NOTHING, idle=0):
    return load.LoadState(jnp.array(amount), jnp.float32(pairs), asked, jnp.full(EXPERTS, idle))


@settings(deadline=None, max_examples=200)
@given(
    amount=loads,
    pairs=st.floats(0, 1000, width=32),
    idle=st.integers(0, 2),
    asked=hnp.arrays(np.float32, EXPERTS, elements=st.floats(0, 40, width=32)),
    slots=slots_lists,
    rule=st.sampled_from(list(RULES)),
)
def test_bounds_keep_their_promises(amount, pairs, idle, asked, slots, rule):
    _, gain, demand = rule
    state = state_of(amount, pairs, jnp.array(asked), idle)
    lower, upper = map(np.asarray, RULES[rule](state, jnp.array(slots), jnp.array(asked)))
    total, clients = slots.sum(), (slots > 0).sum()
    assert lower.dtype == upper.dtype == np.int32
    assert (lower >= 0).all() and (lower <= upper).all() and (upper <= clients).all()
    assert lower.sum() <= total <= upper.sum()
    order = np.argsort(amount)
    if idle >= max(1, math.ceil(EXPERTS / max(total, 1))) and total >= EXPERTS:
        assert (lower >= 1).all()
    if demand or idle:
        return
    if gain == 0:
        assert (upper == upper[0]).all() and (lower == lower[0]).all()
    else:  # the more an expert was trained, the less it is given
        assert (np.diff(lower[order]) <= 0).all() and (np.diff(upper[order]) <= 0).all()


@pytest.mark.parametrize(("total", "tolerance", "wanted"), [(25, 0.0, (5, 5)), (25, 0.1, (4, 6)), (25, 0.5, (2, 8)), (24, 0.0, (4, 5))])
def test_bounds_without_history_are_around_the_mean(total, tolerance, wanted):
    slots = jnp.full(25, 1).at[0].set(total - 24)
    lower, upper = load.monitor(tolerance=tolerance).bounds(load.monitor().init(EXPERTS), slots, NOTHING)
    assert (lower == wanted[0]).all() and (upper == wanted[1]).all()


def test_an_expert_that_fell_behind_catches_up():
    state = state_of([40.0, 40.0, 40.0, 40.0, 20.0], 18.0)  # 10 tokens a pair
    rule = load.monitor(tolerance=0.0)
    np.testing.assert_allclose(rule.deficit(state), [-0.4, -0.4, -0.4, -0.4, 1.6], rtol=1e-5)
    lower, upper = rule.bounds(state, jnp.full(10, 2), NOTHING)
    # mean 4, deficits -0.4 (in clients, 10 tokens a pair) for four experts and 1.6 for the last
    np.testing.assert_array_equal(lower, [3, 3, 3, 3, 5])
    np.testing.assert_array_equal(upper, [4, 4, 4, 4, 6])


def test_bounds_follow_demand():
    asked = jnp.array([10.0, 4.0, 2.0, 2.0, 2.0])
    state = state_of([50.0, 20.0, 10.0, 10.0, 10.0], 20.0, 5 * asked)  # trained as much as was asked for
    for demand, gain, wanted in [(1.0, 1.0, [10, 4, 2, 2, 2]), (0.5, 0.0, [7, 4, 3, 3, 3]), (0.0, 1.0, [0, 3, 5, 5, 5])]:
        lower, _ = load.monitor(demand=demand, gain=gain, tolerance=0.0).bounds(state, jnp.full(10, 2), asked)
        np.testing.assert_array_equal(lower, wanted)
    np.testing.assert_allclose(load.monitor(demand=1.0).deficit(state), NOTHING, atol=1e-5)


@pytest.mark.parametrize("demand", [0.25, 0.75])
def test_no_expert_falls_below_its_part_of_an_even_share(demand):
    for seed in range(20):
        asked = jnp.asarray(np.random.default_rng(seed).dirichlet(np.full(5, 0.1)) * 400, jnp.float32)
        lower, _ = load.monitor(demand=demand, tolerance=0.0).bounds(load.monitor().init(5), jnp.full(200, 2), asked)
        assert (lower >= np.floor((1 - demand) * 400 / 5)).all()


def test_experts_that_waited_too_long_come_first_but_no_more_than_there_are_slots():
    state = load.LoadState(NOTHING, jnp.float32(0), NOTHING, jnp.array([5, 1, 3, 4, 2]))
    lower, upper = load.monitor().bounds(state, jnp.array([1, 1, 0]), NOTHING)  # 2 slots serve 5 experts in 3 rounds
    np.testing.assert_array_equal(lower, [1, 0, 0, 1, 0])
    assert upper.sum() >= 2


@pytest.mark.parametrize("demand", [0.0, 0.75, 1.0])
@pytest.mark.parametrize(("experts", "total", "liked"), [(256, 40, 8), (64, 3, 3), (64, 40, 8), (8, 40, 1)])
def test_no_expert_waits_longer_however_few_are_wanted(demand, experts, total, liked):
    """All clients want the same few experts, and get what the bounds leave of them."""
    monitor = load.monitor(demand=demand)
    slots, wanted = jnp.ones(total, jnp.int32), jnp.where(jnp.arange(experts) < liked, total / liked, 0.0)

    def one(state, _):
        lower, upper = monitor.bounds(state, slots, wanted)
        room = jnp.cumsum(upper - lower)  # the liked come first
        given = lower + jnp.diff(jnp.minimum(room, total - lower.sum()), prepend=0)
        held = jnp.repeat(jnp.arange(experts), given, total_repeat_length=total)[:, None]
        state = monitor.update(state, held, jnp.full((total, 1), 10), wanted)
        return state, (state.idle.max(), given.sum())

    _, (idle, filled) = jax.lax.scan(one, monitor.init(experts), length=200)
    assert (filled == total).all() and idle.max() <= math.ceil(experts / total)


@settings(deadline=None, max_examples=50)
@given(score=hnp.arrays(np.float32, (CLIENTS, EXPERTS), elements=st.sampled_from([0.0, 0.5, 1.0])), slots=slots_lists)
def test_wanted_is_what_greedy_choice_fills(score, slots):
    counts = np.zeros(EXPERTS)
    for row, count in zip(score, slots, strict=True):
        left = count
        for value in np.unique(row)[::-1]:
            equal = row == value
            counts[equal] += min(left / equal.sum(), 1.0)
            left = max(left - equal.sum(), 0)
    np.testing.assert_allclose(load.wanted(jnp.array(score), jnp.array(slots)), counts, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", ["tokens", "clients"])
def test_update_matches_the_oracle(count):
    rng = np.random.default_rng(0)
    rule = load.monitor(decay=0.8, count=count, demand=0.5)
    state, wanted, idle, asked = rule.init(EXPERTS), np.zeros(EXPERTS), np.zeros(EXPERTS), np.zeros(EXPERTS)
    for _ in range(5):
        held = rng.integers(-1, EXPERTS, (CLIENTS, SLOTS))
        tokens = rng.integers(0, 4, (CLIENTS, SLOTS))
        state = rule.update(state, jnp.array(held), jnp.array(tokens), jnp.arange(5.0))
        wanted *= 0.8
        asked = 0.8 * asked + np.arange(5)
        trained = {expert for expert, amount in zip(held.ravel(), tokens.ravel(), strict=True) if amount}
        idle = np.array([0 if expert in trained else idle[expert] + 1 for expert in range(EXPERTS)])
        for expert, amount in zip(held.ravel(), tokens.ravel(), strict=True):
            if expert != NO_EXPERT and amount:
                wanted[expert] += amount if count == "tokens" else 1
    np.testing.assert_allclose(state.load, wanted, rtol=1e-6)
    np.testing.assert_allclose(state.asked, asked, rtol=1e-6)
    np.testing.assert_array_equal(state.idle, idle)


def test_even_rounds_leave_even_load():
    """Clients of unequal size, dealt out by the bounds alone: tokens come out even."""
    rule, rng = load.monitor(tolerance=0.0), np.random.default_rng(1)
    state, total = rule.init(EXPERTS), np.zeros(EXPERTS)
    bounds = jax.jit(rule.bounds)
    for _ in range(100):
        _, upper = bounds(state, jnp.full(20, 1), NOTHING)
        held = np.repeat(np.arange(EXPERTS), np.asarray(upper))[rng.permutation(int(upper.sum()))[:20]]
        tokens = rng.integers(1, 20, 20) * (4 + held)  # later experts get more tokens of each client
        np.add.at(total, held, tokens)
        state = rule.update(state, jnp.array(held)[:, None], jnp.array(tokens)[:, None], NOTHING)
    assert float(load.coefficient_of_variation(jnp.array(total))) < 0.05


def test_coefficient_of_variation():
    assert load.coefficient_of_variation(jnp.array([3, 3, 3])) == 0
    assert load.coefficient_of_variation(jnp.zeros(4)) == 0
    np.testing.assert_allclose(load.coefficient_of_variation(jnp.array([1.0, 3.0])), 0.5)


@pytest.mark.parametrize("values", [[1.0, 2.0, 5.0], [3.0, 3.0, 3.0], [0.0, 0.0, 7.0], [4.0]])
def test_gini_and_entropy_match_their_definitions(values):
    x = np.array(values)
    gini = np.abs(x[:, None] - x).sum() / (2 * len(x) ** 2 * x.mean())
    share = x[x > 0] / x.sum()
    entropy = -(share * np.log(share)).sum() / np.log(len(x)) if len(x) > 1 else 1.0
    np.testing.assert_allclose(load.gini(jnp.array(values)), gini, atol=1e-6)
    np.testing.assert_allclose(load.normalized_entropy(jnp.array(values)), entropy, atol=1e-6)


def test_nothing_trained_is_even():
    assert load.gini(jnp.zeros(4)) == 0 and load.normalized_entropy(jnp.zeros(4)) == 1


@pytest.mark.parametrize(("demand", "wanted"), [(0.0, (9, 11)), (1.0, (7, 13))])
def test_tolerance_is_wider_where_bounds_follow_demand(demand, wanted):
    lower, upper = load.monitor(demand=demand).bounds(load.monitor().init(EXPERTS), jnp.full(10 * EXPERTS, 1), NOTHING)
    np.testing.assert_array_equal(lower, wanted[0])
    np.testing.assert_array_equal(upper, wanted[1])


@pytest.mark.parametrize(("name", "value"), [("decay", 1.1), ("decay", -0.1), ("demand", 1.5), ("tolerance", -1.0), ("gain", float("nan"))])
def test_bad_arguments_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}, it must be"):
        load.monitor(**{name: value})
