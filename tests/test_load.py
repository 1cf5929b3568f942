"""Load: decayed sums against a plain loop; bounds keep their promises for any load and slots."""

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


RULES = {
    (tolerance, gain): jax.jit(load.monitor(tolerance=tolerance, gain=gain).bounds)
    for tolerance, gain in [(0.1, 0.0), (0.0, 1.0), (0.1, 1.0), (3.0, 2.0)]
}


@settings(deadline=None, max_examples=200)
@given(amount=loads, pairs=st.floats(0, 1000, width=32), slots=slots_lists, rule=st.sampled_from(list(RULES)))
def test_bounds_keep_their_promises(amount, pairs, slots, rule):
    _, gain = rule
    state = load.LoadState(jnp.array(amount), jnp.float32(pairs))
    lower, upper = map(np.asarray, RULES[rule](state, jnp.array(slots)))
    total, clients = slots.sum(), (slots > 0).sum()
    assert lower.dtype == upper.dtype == np.int32
    assert (lower >= 0).all() and (lower <= upper).all() and (upper <= clients).all()
    assert lower.sum() <= total <= upper.sum()
    order = np.argsort(amount)
    if gain == 0:
        assert (upper == upper[0]).all() and (lower == lower[0]).all()
    else:  # the more an expert was trained, the less it is given
        assert (np.diff(lower[order]) <= 0).all() and (np.diff(upper[order]) <= 0).all()


@pytest.mark.parametrize(("total", "tolerance", "wanted"), [(25, 0.0, (5, 5)), (25, 0.1, (4, 6)), (25, 0.5, (2, 8)), (24, 0.0, (4, 5))])
def test_bounds_without_history_are_around_the_mean(total, tolerance, wanted):
    slots = jnp.full(25, 1).at[0].set(total - 24)
    lower, upper = load.monitor(tolerance=tolerance).bounds(load.monitor().init(EXPERTS), slots)
    assert (lower == wanted[0]).all() and (upper == wanted[1]).all()


def test_an_expert_that_fell_behind_catches_up():
    state = load.LoadState(jnp.array([40.0, 40.0, 40.0, 40.0, 20.0]), jnp.float32(18.0))  # 10 tokens a pair
    lower, upper = load.monitor(tolerance=0.0).bounds(state, jnp.full(10, 2))
    # mean 4, deficits -0.4 (in clients, 10 tokens a pair) for four experts and 1.6 for the last
    np.testing.assert_array_equal(lower, [3, 3, 3, 3, 5])
    np.testing.assert_array_equal(upper, [4, 4, 4, 4, 6])


@pytest.mark.parametrize("count", ["tokens", "clients"])
def test_update_matches_the_oracle(count):
    rng = np.random.default_rng(0)
    rule = load.monitor(decay=0.8, count=count)
    state, wanted = rule.init(EXPERTS), np.zeros(EXPERTS)
    for _ in range(5):
        held = rng.integers(-1, EXPERTS, (CLIENTS, SLOTS))
        tokens = rng.integers(0, 4, (CLIENTS, SLOTS))
        state = rule.update(state, jnp.array(held), jnp.array(tokens))
        wanted *= 0.8
        for expert, amount in zip(held.ravel(), tokens.ravel(), strict=True):
            if expert != NO_EXPERT and amount:
                wanted[expert] += amount if count == "tokens" else 1
    np.testing.assert_allclose(state.load, wanted, rtol=1e-6)


def test_even_rounds_leave_even_load():
    """Clients of unequal size, dealt out by the bounds alone: tokens come out even."""
    rule, rng = load.monitor(tolerance=0.0), np.random.default_rng(1)
    state, total = rule.init(EXPERTS), np.zeros(EXPERTS)
    bounds = jax.jit(rule.bounds)
    for _ in range(100):
        _, upper = bounds(state, jnp.full(20, 1))
        held = np.repeat(np.arange(EXPERTS), np.asarray(upper))[rng.permutation(int(upper.sum()))[:20]]
        tokens = rng.integers(1, 20, 20) * (4 + held)  # later experts get more tokens of each client
        np.add.at(total, held, tokens)
        state = rule.update(state, jnp.array(held)[:, None], jnp.array(tokens)[:, None])
    assert float(load.coefficient_of_variation(jnp.array(total))) < 0.05


def test_coefficient_of_variation():
    assert load.coefficient_of_variation(jnp.array([3, 3, 3])) == 0
    assert load.coefficient_of_variation(jnp.zeros(4)) == 0
    np.testing.assert_allclose(load.coefficient_of_variation(jnp.array([1.0, 3.0])), 0.5)


@pytest.mark.parametrize(("name", "value"), [("decay", 1.0), ("decay", -0.1), ("tolerance", -1.0), ("gain", float("nan"))])
def test_bad_arguments_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}, it must be"):
        load.monitor(**{name: value})
