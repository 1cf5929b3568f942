"""Rows of small arrays are packed by dtype and come out as they went in."""

import jax
import jax.numpy as jnp
import numpy as np

from fedmoe_jax import packed


def test_rows_come_out_as_they_went_in():
    draw = np.random.default_rng(0)

    def tree():
        number, whole = jnp.float32(draw.normal()), jnp.asarray(draw.integers(0, 9, 3), jnp.int32)
        return dict(a=number, b=(whole, None), c=jnp.asarray(draw.normal(size=(2, 2)), jnp.float32), d=jnp.asarray(draw.random(4) < 0.5))

    trees = [tree() for _ in range(3)]
    rows = packed.zeros(trees[0], 4)
    assert {name: row.shape for name, row in rows.items()} == dict(float32=(4, 5), int32=(4, 3), bool=(4, 4))
    for index in (2, 0, 1):
        rows = jax.jit(packed.put)(rows, index, trees[index])
    nothing = jax.tree.map(jnp.zeros_like, trees[0])
    wanted = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees, nothing)
    found = packed.rows(rows, trees[0])
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for leaf, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert leaf.dtype == other.dtype
        np.testing.assert_array_equal(leaf, other)
