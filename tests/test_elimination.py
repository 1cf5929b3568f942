"""Tests of small linear systems: elimination, Cholesky's factors and NumPy agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmoe_jax.alignment.elimination import factorised, swept


def system(size, seed=0):
    """A Laplacian of a graph with weak links and a little more, as prices pull at each other."""
    draw = np.random.default_rng(seed)
    links = np.triu(10.0 ** draw.uniform(-3, 1, (size, size)), 1)
    links += links.T
    return (np.diag(links.sum(1) + 0.05) - links).astype(np.float32), draw.standard_normal(size).astype(np.float32)


@pytest.mark.parametrize("size", [2, 6, 16, 40, 64])
def test_both_ways_solve(size):
    matrix, vector = system(size)
    want = np.linalg.solve(matrix.astype(np.float64), vector.astype(np.float64))
    matrix, vector = jnp.asarray(matrix), jnp.asarray(vector)
    for found in (swept(matrix, vector), factorised(matrix, vector)):
        np.testing.assert_allclose(found, want, rtol=1e-3, atol=1e-3 * np.abs(want).max())


def test_it_solves_for_several_groups_at_once():
    each = [system(6, seed) for seed in range(3)]
    matrices, vectors = (jnp.asarray(np.stack(column)) for column in zip(*each, strict=True))
    found = jax.vmap(swept)(matrices, vectors)
    np.testing.assert_allclose(found, jax.vmap(factorised)(matrices, vectors), rtol=1e-3, atol=1e-3)


def test_a_matrix_that_is_not_positive_definite_has_no_solution():
    matrix = jnp.diag(jnp.array([1.0, -1.0, 2.0, 1.0]))
    for found in (swept(matrix, jnp.ones(4)), factorised(matrix, jnp.ones(4))):
        assert jnp.isnan(found).all()
