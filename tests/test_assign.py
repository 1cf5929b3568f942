"""Rules of assignment: the simple ones against their definitions, and what all of them promise. See also test_balanced."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from assignments import CLIENTS, EXPERTS, family, problem
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_jax.alignment import assign


@pytest.mark.parametrize("rule", [assign.greedy, lambda f, s: assign.random(jax.random.key(0), s, EXPERTS), assign.balanced])
def test_what_is_constant_in_a_jitted_function_is_checked_like_all_else(rule):
    fitness, slots, *bounds = problem(0)
    bounds = bounds if rule is assign.balanced else []
    wanted = rule(fitness, slots, *bounds)
    np.testing.assert_array_equal(jax.jit(lambda fitness: rule(fitness, slots, *bounds))(fitness), wanted)
    wrong = slots.at[0].set(-1)
    with pytest.raises(ValueError, match="slots has a negative entry, -1"):
        jax.jit(lambda fitness: rule(fitness, wrong, *bounds))(fitness)


@pytest.mark.parametrize("rule", ["greedy", "balanced"])
def test_ties_are_broken_by_the_key(rule):
    def choose(key):
        fitness, slots = jnp.ones((CLIENTS, EXPERTS)), jnp.full(CLIENTS, 2)
        if rule == "greedy":
            return assign.greedy(fitness, slots, key=key)
        return assign.balanced(fitness, slots, jnp.full(EXPERTS, 5), jnp.full(EXPERTS, 5), key=key)

    chosen = jax.vmap(choose)(jax.random.split(jax.random.key(0), 200))
    share = np.asarray(chosen.mean(0))
    assert np.abs(share - 2 / EXPERTS).max() < 0.16 and share.std() < 0.06
    np.testing.assert_array_equal(choose(jax.random.key(1)), choose(jax.random.key(1)))


def test_greedy_takes_the_best_allowed():
    rng = np.random.default_rng(0)
    fitness, slots = family("forbidden", CLIENTS, EXPERTS, rng), rng.integers(0, EXPERTS + 2, CLIENTS)
    found = np.asarray(assign.greedy(jnp.array(fitness), jnp.array(slots)))
    for row in range(CLIENTS):
        order = [e for e in np.argsort(-fitness[row], kind="stable") if np.isfinite(fitness[row, e])]
        assert set(np.nonzero(found[row])[0]) == set(order[: slots[row]])
    with_key = assign.greedy(jnp.array(fitness), jnp.array(slots), key=jax.random.key(0))
    np.testing.assert_array_equal(found, with_key)  # no ties, so the key does not matter


def test_random_is_uniform_and_follows_the_client():
    slots = jnp.array([0, 1, 2, 8, 12])
    masks = jax.vmap(lambda key: assign.random(key, slots, EXPERTS))(jax.random.split(jax.random.key(0), 2000))
    np.testing.assert_array_equal(masks.sum(2), jnp.broadcast_to(jnp.minimum(slots, EXPERTS), (2000, 5)))
    assert np.abs(masks.mean(0) - jnp.minimum(slots, EXPERTS)[:, None] / EXPERTS).max() < 0.05
    keys = jax.random.split(jax.random.key(1), 5)
    np.testing.assert_array_equal(assign.random(keys[::-1], slots[::-1], EXPERTS), assign.random(keys, slots, EXPERTS)[::-1])


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), shuffled=st.booleans())
def test_round_robin_deals_evenly_to_the_least_loaded(seed, shuffled):
    rng = np.random.default_rng(seed)
    load, slots = rng.integers(0, 4, EXPERTS), rng.integers(0, EXPERTS + 2, CLIENTS)
    key = jax.random.key(seed) if shuffled else None
    mask = np.asarray(assign.round_robin(jnp.array(load), jnp.array(slots), key=key))
    np.testing.assert_array_equal(mask.sum(1), np.minimum(slots, EXPERTS))
    clients = mask.sum(0)
    assert clients.max() - clients.min() <= 1
    if clients.max() > clients.min():
        assert load[clients == clients.max()].max() <= load[clients == clients.min()].min()


def test_bad_arguments_are_refused():
    fitness, slots, lower, upper = problem(0)
    balanced = inspect.unwrap(assign.balanced)  # without the shape checks of the test run, which come first
    with pytest.raises(ValueError, match="slots has 19 clients and fitness 20"):
        balanced(fitness, slots[1:], lower, upper)
    with pytest.raises(ValueError, match=r"lower has shape \(7,\), fitness has 8 experts"):
        balanced(fitness, slots, lower[1:], upper)
    with pytest.raises(ValueError, match="lower is above upper for expert 2"):
        assign.balanced(fitness, slots, lower.at[2].set(99), upper)
    with pytest.raises(ValueError, match=r"prices has shape \(3,\), fitness has 8 experts"):
        balanced(fitness, slots, lower, upper, prices=jnp.zeros(3))
    with pytest.raises(ValueError, match="prices is NaN for expert 4"):
        balanced(fitness, slots, lower, upper, prices=jnp.zeros(EXPERTS).at[4].set(jnp.nan))
    with pytest.raises(ValueError, match=r"fitness has shape \(0, 8\), it must have a client and an expert"):
        balanced(fitness[:0], slots[:0], lower, upper)
    for call in (
        lambda s: assign.balanced(fitness, s, lower, upper),
        lambda s: assign.greedy(fitness, s),
        lambda s: assign.random(jax.random.key(0), s, EXPERTS),
        lambda s: assign.round_robin(lower, s),
    ):
        with pytest.raises(ValueError, match="slots has a negative entry, -3"):
            call(slots.at[0].set(-3))
    with pytest.raises(ValueError, match=r"key has shape \(3,\)"):
        inspect.unwrap(assign.random)(jax.random.split(jax.random.key(0), 3), slots, EXPERTS)
    with pytest.raises(ValueError, match="num_experts is 0"):
        assign.random(jax.random.key(0), slots, 0)
