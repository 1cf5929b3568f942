"""Tests of products that are corrected in one pass: a kernel, a pass for each part, and NumPy agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmoe_jax import gpu
from fedmoe_jax.corrected import Part, Tiles, _fits, corrected, in_a_kernel, one_by_one

TILES, GROUPS, ROWS, HIDDEN, OTHERS = 7, 5, 16, 128, (16, 32)


def case(dtype):
    """Tiles in any order, the last group without one and a place that is none, and two parts."""
    draw = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(draw.standard_normal(shape), dtype)

    filled = jnp.arange(GROUPS) < GROUPS - 1
    tiles = Tiles(normal(TILES, ROWS, HIDDEN).at[6].set(jnp.nan), jnp.array([3, 0, 5, 1, 99]), filled)
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
    place = np.minimum(place, TILES - 1)
    want = np.where(np.asarray(tiles.filled)[:, None, None], np.asarray(scale, np.float64)[:, None, None] * product[place], 0)
    for part in parts:
        want = want + np.asarray(part.mix, np.float64) @ np.asarray(part.values, np.float64)
    found = in_a_kernel(tiles, scale, parts, interpret=not gpu.has_kernels())
    assert found.dtype == dtype
    np.testing.assert_allclose(np.asarray(found, np.float64), want, rtol=0 if dtype == jnp.float32 else 2**-8, atol=1e-4)
    for found in (one_by_one(tiles, scale, parts), corrected(tiles, scale, parts)):  # which round after each part
        assert found.dtype == dtype
        np.testing.assert_allclose(np.asarray(found, np.float64), want, atol=1e-4 if dtype == jnp.float32 else 0.2)


def test_without_places_each_group_has_its_own():
    tiles, scale, parts = case(jnp.float32)
    own = Tiles(tiles.product[:GROUPS], None, tiles.filled)
    np.testing.assert_array_equal(one_by_one(own, scale, parts), one_by_one(own._replace(place=jnp.arange(GROUPS)), scale, parts))
    np.testing.assert_allclose(in_a_kernel(own, scale, parts, interpret=not gpu.has_kernels()), one_by_one(own, scale, parts), atol=1e-4)


def test_kernels_take_small_powers_of_two():
    tiles, _, parts = case(jnp.bfloat16)
    assert _fits(tiles, parts)
    assert not _fits(tiles._replace(product=tiles.product[..., :100]), parts)
    assert not _fits(tiles._replace(product=tiles.product[:, :15]), parts)
    assert not _fits(tiles, [Part(part.mix[..., :12], part.values[:, :12]) for part in parts])
    assert _fits(tiles._replace(product=jnp.zeros((1, 128, 128), jnp.bfloat16)), parts)
    assert not _fits(tiles._replace(product=jnp.zeros((1, 256, 128), jnp.bfloat16)), parts)


def test_kernels_leave_large_tiles_of_float32_and_those_in_full_precision_alone():
    tiles, _, parts = case(jnp.float32)
    large = tiles._replace(product=jnp.zeros((1, 128, 128)))
    assert not _fits(tiles, parts)
    with jax.default_matmul_precision("high"):
        assert _fits(tiles, parts) and not _fits(large, parts)


def test_a_kernel_is_told_places_that_are_there(monkeypatch):
    tiles, scale, parts = case(jnp.bfloat16)
    told = []
    monkeypatch.setattr(gpu, "call", lambda *_, **__: lambda product, places, *others: told.append(places) or product[:GROUPS])
    in_a_kernel(tiles, scale, parts)
    assert int(told[0].max()) < TILES and tiles.place.max() >= TILES
