"""Tests of keyed permutations: bijections, uniform enough, and indifferent to what they are asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_jax.sampling import cohort, inverse, of_round, of_those_here, permutation, walked, walked_in_a_kernel

MOST = 64
_padded = jax.jit(lambda key, size: permutation(key, jnp.arange(MOST), size))
_those_here, _of_round = jax.jit(of_those_here, static_argnums=3), jax.jit(of_round, static_argnums=(2, 3))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), size=st.integers(1, MOST))
def test_it_is_a_permutation(seed, size):
    values = np.asarray(_padded(jax.random.key(seed), size))
    assert sorted(values[:size]) == list(range(size))
    np.testing.assert_array_equal(values, values[np.arange(MOST) % size])  # later positions wrap around


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), here=st.lists(st.booleans(), min_size=7, max_size=7), size=st.integers(1, 7))
def test_a_cohort_of_those_who_are_here(seed, here, size):
    key, here = jax.random.key(seed), np.array(here)
    found = np.asarray(_those_here(key, jnp.int32(3), jnp.asarray(here), size))
    order = np.asarray(_of_round(key, jnp.int32(3), 7, 7))
    assert len(set(found)) == size and here[found].sum() == min(size, here.sum())
    assert list(found[here[found]]) == list(order[here[order]][:size])
    np.testing.assert_array_equal(_those_here(key, jnp.int32(3), jnp.ones(7, bool), size), _of_round(key, jnp.int32(3), 7, size))


def test_an_inverse_undoes_an_order():
    order = np.random.default_rng(0).permutation(50).astype(np.int32)
    np.testing.assert_array_equal(inverse(jnp.asarray(order)), np.argsort(order))


@pytest.mark.parametrize(("size", "shape"), [(1, (3,)), (60, (3, 20)), (1000, (100,)), (1_000_003, (2, 1100))])
def test_a_kernel_walks_as_the_loop_does(size, shape):
    def both(round_keys):
        given = jnp.arange(np.prod(shape), dtype=jnp.uint32).reshape(shape) % size, jnp.uint32(size), jnp.uint32(10), round_keys
        return walked(*given), walked_in_a_kernel(*given, interpret=True)

    in_a_loop, in_a_kernel = jax.vmap(both)(jax.random.bits(jax.random.key(5), (2, 6), jnp.uint32))
    np.testing.assert_array_equal(in_a_kernel, in_a_loop)


def test_no_positions():
    assert permutation(jax.random.key(0), jnp.arange(0), 5).shape == (0,)


def test_size_zero_is_taken_as_one():
    assert (np.asarray(_padded(jax.random.key(0), 0)) == 0).all()


def test_large_sizes_stay_injective():
    values = np.asarray(permutation(jax.random.key(3), jnp.arange(20_000), 1_000_003))
    assert len(np.unique(values)) == 20_000
    assert values.min() >= 0 and values.max() < 1_000_003
    assert abs(values.mean() / 1_000_003 - 0.5) < 0.02


def test_traced_and_batched_calls_agree_with_single_ones():
    sizes = jnp.array([1, 5, 17, 64])
    keys = jax.random.split(jax.random.key(1), 4)
    together = jax.vmap(lambda key, size: permutation(key, jnp.arange(8), size))(keys, sizes)
    for row, key, size in zip(together, keys, sizes, strict=True):
        np.testing.assert_array_equal(row, permutation(key, jnp.arange(8), int(size)))
    grid = permutation(keys[0], jnp.arange(8).reshape(2, 4), 17)
    np.testing.assert_array_equal(grid.reshape(-1), permutation(keys[0], jnp.arange(8), 17))


@pytest.mark.parametrize("size", [3, 10, 16])
def test_every_value_is_as_likely_at_every_position(size):
    keys = jax.random.split(jax.random.key(0), 6000)
    values = np.asarray(jax.vmap(lambda key: permutation(key, jnp.arange(size), size))(keys))
    counts = np.stack([np.bincount(values[:, position], minlength=size) for position in range(size)])
    chi2 = ((counts - 6000 / size) ** 2 / (6000 / size)).sum()
    freedom = (size - 1) ** 2
    assert chi2 < freedom + 5 * np.sqrt(2 * freedom)


def test_all_orders_of_three_appear():
    keys = jax.random.split(jax.random.key(0), 3000)
    values = np.asarray(jax.vmap(lambda key: permutation(key, jnp.arange(3), 3))(keys))
    orders, counts = np.unique(values, axis=0, return_counts=True)
    assert len(orders) == 6
    assert ((counts - 500) ** 2 / 500).sum() < 25  # chi-square with 5 degrees of freedom, p = 1e-4


def test_cohort_is_a_sample_without_replacement():
    key = jax.random.key(7)
    sample = np.asarray(cohort(key, 50, 20))
    assert len(set(sample.tolist())) == 20 and sample.min() >= 0 and sample.max() < 50
    np.testing.assert_array_equal(sample, cohort(key, 50, 20))
    assert (sample != np.asarray(cohort(jax.random.key(8), 50, 20))).any()
    assert sorted(np.asarray(cohort(key, 20, 20))) == list(range(20))


def test_a_larger_cohort_starts_with_the_smaller_one():
    key = jax.random.key(2)
    np.testing.assert_array_equal(cohort(key, 1000, 5), cohort(key, 1000, 30)[:5])
