"""Products and sums in kernels that read groups where they are, against NumPy, however the groups are spread."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmoe_jax import gpu, ragged

EXPERTS, GROUPS = 5, 11
ANYWHERE = dict(interpret=not gpu.is_hopper())
DTYPE, ROUNDING = (jnp.bfloat16, 2**-8) if gpu.is_hopper() else (jnp.float32, 1e-6)
SPREADS = "even", "to one", "some absent", "none"


def index_of(spread):
    even = np.random.default_rng(0).permutation(np.arange(GROUPS) % EXPERTS)
    absent = np.where(even < 2, EXPERTS, even)
    return jnp.int32({"even": even, "to one": np.full(GROUPS, 3), "some absent": absent, "none": np.full(GROUPS, EXPERTS)}[spread])


def normal(*shape, seed, dtype=DTYPE):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def wide(a):
    return np.asarray(a, np.float64)


def product(x, base, index, scale, parts):
    """By NumPy, in float64."""
    kernels = np.concatenate([wide(base), np.zeros((1, *base.shape[1:]))])[np.asarray(index)]
    own = np.asarray(index) < len(base)
    y = np.where(own, wide(scale), 0)[:, None, None] * np.einsum("grd,gdh->grh", np.where(own[:, None, None], wide(x), 0), kernels)
    return y + sum(wide(mix) @ wide(values) for mix, values in parts)


def close(found, want):
    np.testing.assert_allclose(wide(found), want, rtol=0, atol=ROUNDING * max(np.abs(want).max(), 1))


@pytest.mark.parametrize(
    ("rows", "features", "hidden", "others"),
    [(16, 48, 128, (16, 96)), (64, 64, 192, (64,)), (128, 128, 512, (64, 32)), (256, 32, 256, (16,))],
)
@pytest.mark.parametrize("spread", SPREADS)
def test_a_product_with_parts_is_that_of_numpy(rows, features, hidden, others, spread):
    """With tiles of all sizes, several columns of them, and NaNs in groups without an expert, of which nothing is seen."""
    index, base = index_of(spread), normal(EXPERTS, features, hidden, seed=2)
    absent = index >= EXPERTS
    x = jnp.where(absent[:, None, None], jnp.nan, normal(GROUPS, rows, features, seed=1))
    scale = jnp.where(absent, jnp.nan, normal(GROUPS, seed=3, dtype=jnp.float32))
    parts = [(normal(GROUPS, rows, other, seed=4), normal(GROUPS, other, hidden, seed=5)) for other in others]
    for given in (parts, []):
        close(ragged.matmul(x, base, index, scale, given, **ANYWHERE), product(x, base, index, scale, given))


@pytest.mark.parametrize("rows", [16, 64])
def test_what_is_not_finite_in_a_group_is_seen_in_no_other(rows):
    index, x, base = index_of("even"), normal(GROUPS, rows, 48, seed=1), normal(EXPERTS, 48, 128, seed=2)
    parts = [(normal(GROUPS, rows, 16, seed=4), normal(GROUPS, 16, 128, seed=5).at[3].set(jnp.nan))]
    found = ragged.matmul(x.at[5].set(jnp.inf), base, index, jnp.ones(GROUPS), parts, **ANYWHERE)
    np.testing.assert_array_equal(np.isfinite(found).all((1, 2)), ~np.isin(np.arange(GROUPS), (3, 5)))


@pytest.mark.parametrize("rows", [1, 20, 100])
def test_a_product_takes_any_number_of_rows(rows):
    index = index_of("some absent").at[0].set(EXPERTS + 7)
    x, base = normal(GROUPS, rows, 48, seed=1), normal(EXPERTS, 48, 128, seed=2)
    close(ragged.matmul(x, base, index, jnp.ones(GROUPS), **ANYWHERE), product(x, base, jnp.minimum(index, EXPERTS), np.ones(GROUPS), []))


@pytest.mark.parametrize(("rows", "features", "hidden"), [(1, 64, 128), (20, 256, 384), (64, 192, 64)])
@pytest.mark.parametrize("spread", SPREADS)
def test_sums_are_those_of_numpy(rows, features, hidden, spread):
    """Over two steps, with several tiles, and NaNs in groups without an expert."""
    index = index_of(spread)
    absent = (index >= EXPERTS)[:, None, None]
    pairs = [
        tuple(jnp.where(absent, jnp.nan, normal(GROUPS, rows, size, seed=seed + size)) for size in (features, hidden)) for seed in (1, 2)
    ]
    want = np.zeros((EXPERTS, features, hidden))
    for x, y in pairs:
        for g in np.flatnonzero(np.asarray(index) < EXPERTS):
            want[index[g]] += wide(x[g]).T @ wide(y[g])
    found = ragged.outer(pairs, index, EXPERTS, **ANYWHERE)
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5 * max(np.abs(want).max(), 1))


def test_what_is_not_finite_is_seen_in_the_sum_of_its_expert_alone():
    """Its group comes first of all, and no expert's rows fill what is multiplied at once."""
    index, x, y = index_of("even"), normal(GROUPS, 20, 64, seed=1), normal(GROUPS, 20, 64, seed=2)
    first = int(jnp.argmin(index))
    found = ragged.outer([(x, y.at[first].set(jnp.nan))], index, EXPERTS, **ANYWHERE)
    np.testing.assert_array_equal(np.isfinite(found).all((1, 2)), np.arange(EXPERTS) > 0)


def test_products_of_bfloat16_are_summed_in_float32():
    index, scale = index_of("even"), normal(GROUPS, seed=3, dtype=jnp.float32)
    x, base = (normal(*shape, seed=1, dtype=jnp.bfloat16) for shape in ((GROUPS, 32, 64), (EXPERTS, 64, 128)))
    parts = [(normal(GROUPS, 32, 32, seed=4, dtype=x.dtype), normal(GROUPS, 32, 128, seed=5, dtype=x.dtype))]
    found = ragged.matmul(x, base, index, scale, parts, **ANYWHERE)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(wide(found), product(x, base, index, scale, parts), rtol=2**-8, atol=1e-4)
    assert ragged.outer([(x, parts[0][1])], index, EXPERTS, **ANYWHERE).dtype == jnp.float32


@pytest.mark.parametrize("rows", [16, 20, 256])
@pytest.mark.parametrize("spread", SPREADS)
def test_kernels_are_told_rows_and_experts_that_are_there(rows, spread):
    """Each row is in one tile, of its expert, and tiles of rows without one make no product."""
    index = index_of(spread)
    for height in (64, 128):
        tiles = jax.tree.map(np.asarray, ragged._tiles(index, EXPERTS, rows, height))
        assert tiles.row.min() >= 0 and tiles.row.max() < GROUPS * rows and tiles.expert.min() >= 0 and tiles.expert.max() < EXPERTS
        kept = tiles.kept > 0
        np.testing.assert_array_equal(np.sort(tiles.row[kept]), np.arange(GROUPS * rows))
        of_tile = np.where(tiles.work == 2, tiles.expert, EXPERTS)
        np.testing.assert_array_equal(np.broadcast_to(of_tile[:, None], kept.shape)[kept], np.asarray(index)[tiles.row[kept] // rows])
        np.testing.assert_array_equal(tiles.work > 0, kept.any(1))


def zeros(*shape, dtype=jnp.bfloat16):
    return jnp.zeros(shape, dtype)


def test_kernels_take_bfloat16_and_widths_that_tiles_divide(monkeypatch):
    monkeypatch.setattr(gpu, "is_hopper", lambda: True)
    x, base = zeros(4, 3, 48), zeros(2, 48, 128)
    assert ragged.takes_matmul(x, base)
    for dtype in (jnp.float32, jnp.float16):
        assert not ragged.takes_matmul(x.astype(dtype), base) and not ragged.takes_matmul(x, base.astype(dtype))
    assert not ragged.takes_matmul(x[..., :40], base[:, :40]) and not ragged.takes_matmul(x, base[..., :100])
    assert not ragged.takes_matmul(x[:0], base)
    pairs = [(zeros(4, 3, 512), zeros(4, 3, 1024))]
    assert ragged.takes_outer(pairs, 4) and not ragged.takes_outer(pairs, 3)
    assert not ragged.takes_outer([*pairs, tuple(a[:, :2] for a in pairs[0])], 4)
    assert not ragged.takes_outer([(zeros(4, 3, 1040), pairs[0][1])], 4)
    assert not ragged.takes_outer([(pairs[0][0], pairs[0][1].astype(jnp.float32))], 4)
    monkeypatch.setattr(gpu, "is_hopper", lambda: False)
    assert not ragged.takes_matmul(x, base) and not ragged.takes_outer(pairs, 4)


def test_kernels_take_what_32_bits_can_tell_the_places_of(monkeypatch):
    monkeypatch.setattr(gpu, "is_hopper", lambda: True)

    def taken(function, *shapes):
        found = []
        jax.eval_shape(lambda: found.append(function(*(zeros(*shape) for shape in shapes))))
        return found[0]

    def outer(x, y):
        return ragged.takes_outer([(x, y)], 4)

    def part(mix, values):
        return ragged.takes_parts([(mix, values)])

    assert taken(part, (2**10, 64, 256), (2**10, 256, 1024)) and not taken(part, (2**10, 64, 256), (2**10, 256, 2**13))
    assert not taken(part, (2**13, 2**10, 256), (2**13, 256, 64)) and not taken(part, (4, 16, 0), (4, 0, 64))
    many = 2**16, 2**8
    assert taken(ragged.takes_matmul, (*many, 64), (2, 64, 64))
    assert not taken(ragged.takes_matmul, (*many, 64), (2, 64, 128))
    assert not taken(ragged.takes_matmul, (*many, 128), (2, 128, 64))
    assert not taken(ragged.takes_matmul, (1, 1, 2**15), (2, 2**15, 2**15))
    assert taken(outer, (2**10, 2**8, 1024), (2**10, 2**8, 1024))
    assert not taken(outer, (2**13, 2**8, 1024), (2**13, 2**8, 512)) and not taken(outer, (2**13, 2**8, 512), (2**13, 2**8, 1024))


def test_parts_have_a_power_of_two_of_rows():
    def part(rows, others, dtype=jnp.bfloat16):
        return zeros(4, rows, others), zeros(4, others, 128, dtype=dtype)

    assert ragged.takes_parts([]) and ragged.takes_parts([part(16, 48), part(16, 16)]) and ragged.takes_parts([part(128, 16)])
    assert not ragged.takes_parts([part(16, 48), part(16, 40)])
    assert not ragged.takes_parts([part(8, 16)]) and not ragged.takes_parts([part(24, 16)])
    assert not ragged.takes_parts([part(16, 16, jnp.float32)])
