"""Tests of products that are corrected in one pass: a kernel, a pass for each part, and NumPy agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmoe_jax import gpu
from fedmoe_jax.corrected import Part, Tiles, _fits, corrected, in_a_kernel, one_by_one

TILES, GROUPS, ROWS, HIDDEN, OTHERS = 7, 5, 16, 128, (16, 32)


def case(dtype):
    """Tiles in any order, the last group without one, and two parts."""
    draw = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(draw.standard_normal(shape), dtype)

    filled = jnp.arange(GROUPS) < GROUPS - 1
    tiles = Tiles(normal(TILES, ROWS, HIDDEN).at[6].set(jnp.nan), jnp.array([3, 0, 5, 1, 6]), filled)
    parts = tuple(Part(normal(GROUPS, ROWS, other), normal(GROUPS, other, HIDDEN)) for other in OTHERS)
    return tiles, jnp.asarray(draw.standard_normal(GROUPS), jnp.float32), parts


@pytest.fixture(autouse=True)
def float32():
    """Else a GPU multiplies in TF32."""
    with jax.default_matmul_precision("float32"):
        yield


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_all_ways_agree(dtype):
    tiles, scale, parts = case(dtype)
    product, place = np.asarray(tiles.product, np.float64), np.asarray(tiles.place)
    want = np.where(np.asarray(tiles.filled)[:, None, None], np.asarray(scale, np.float64)[:, None, None] * product[place], 0)
    for part in parts:
        want = want + np.asarray(part.mix, np.float64) @ np.asarray(part.values, np.float64)
    for found in (
        in_a_kernel(tiles, scale, parts, interpret=not gpu.has_kernels()),
        one_by_one(tiles, scale, parts),
        corrected(tiles, scale, parts),
    ):
        assert found.dtype == dtype
        np.testing.assert_allclose(np.asarray(found, np.float64), want, atol=1e-4 if dtype == jnp.float32 else 0.2)


def test_kernels_take_small_powers_of_two():
    tiles, _, parts = case(jnp.float32)
    assert _fits(tiles, parts)
    assert not _fits(tiles._replace(product=tiles.product[..., :100]), parts)
    assert not _fits(tiles._replace(product=tiles.product[:, :15]), parts)
    assert not _fits(tiles, [Part(part.mix[..., :12], part.values[:, :12]) for part in parts])
