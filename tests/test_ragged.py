"""Products and sums in kernels that read groups where they are, against NumPy, however the groups are spread."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmoe_jax import gpu, ragged
from fedmoe_jax.ragged import Part

EXPERTS, GROUPS, FEATURES, HIDDEN = 5, 11, 48, 128
ANYWHERE = dict(interpret=not gpu.has_kernels())


def index_of(spread):
    draw = np.random.default_rng(0)
    even = draw.permutation(np.arange(GROUPS) % EXPERTS)
    return jnp.int32(
        {"even": even, "to one": np.full(GROUPS, 3), "some absent": np.where(even < 2, EXPERTS, even), "none": np.full(GROUPS, EXPERTS)}[
            spread
        ]
    )


def normal(*shape, seed, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def product(x, base, index, scale, parts):
    """By NumPy, in float64."""
    x, base, scale = (np.asarray(a, np.float64) for a in (x, base, scale))
    kernels = np.concatenate([base, np.zeros_like(base[:1])])[np.asarray(index)]
    own = np.asarray(index) < len(base)
    y = scale[:, None, None] * np.einsum("grd,gdh->grh", np.where(own[:, None, None], x, 0), kernels)
    return y + sum(np.asarray(part.mix, np.float64) @ np.asarray(part.values, np.float64) for part in parts)


@pytest.fixture(autouse=True)
def float32():
    """Else a GPU multiplies in TF32."""
    with jax.default_matmul_precision("float32"):
        yield


@pytest.mark.parametrize("rows", [16, 64, 256])
@pytest.mark.parametrize("spread", ["even", "to one", "some absent", "none"])
def test_a_product_with_parts_is_that_of_numpy(rows, spread):
    """The groups without an expert have NaNs, of which nothing is seen."""
    index, others = index_of(spread), (16, 96)
    x, base = normal(GROUPS, rows, FEATURES, seed=1), normal(EXPERTS, FEATURES, HIDDEN, seed=2)
    x = jnp.where((index < EXPERTS)[:, None, None], x, jnp.nan)
    scale = normal(GROUPS, seed=3)
    parts = [Part(normal(GROUPS, rows, other, seed=4), normal(GROUPS, other, HIDDEN, seed=5)) for other in others]
    for given in (parts, []):
        found = ragged.matmul(x, base, index, scale, given, **ANYWHERE)
        np.testing.assert_allclose(found, product(x, base, index, scale, given), atol=2e-4)


@pytest.mark.parametrize("rows", [16, 64])
def test_what_is_not_finite_in_a_group_is_seen_in_no_other(rows):
    index, x, base = index_of("even"), normal(GROUPS, rows, FEATURES, seed=1), normal(EXPERTS, FEATURES, HIDDEN, seed=2)
    parts = [Part(normal(GROUPS, rows, 16, seed=4), normal(GROUPS, 16, HIDDEN, seed=5).at[3].set(jnp.nan))]
    found = ragged.matmul(x.at[5].set(jnp.inf), base, index, jnp.ones(GROUPS), parts, **ANYWHERE)
    np.testing.assert_array_equal(np.isfinite(found).all((1, 2)), ~np.isin(np.arange(GROUPS), (3, 5)))


@pytest.mark.parametrize("rows", [1, 20, 100])
def test_products_and_sums_take_any_number_of_rows(rows):
    index = index_of("some absent")
    x, base = normal(GROUPS, rows, FEATURES, seed=1), normal(EXPERTS, FEATURES, HIDDEN, seed=2)
    found = ragged.matmul(x, base, index, jnp.ones(GROUPS), **ANYWHERE)
    np.testing.assert_allclose(found, product(x, base, index, np.ones(GROUPS), []), atol=1e-4)


@pytest.mark.parametrize("rows", [1, 20, 64])
@pytest.mark.parametrize("spread", ["even", "to one", "some absent", "none"])
def test_sums_are_those_of_numpy(rows, spread):
    """Over two steps; groups without an expert have NaNs."""
    index = index_of(spread)
    own = (index < EXPERTS)[:, None, None]
    pairs = [tuple(jnp.where(own, normal(GROUPS, rows, size, seed=seed + size), jnp.nan) for size in (64, HIDDEN)) for seed in (1, 2)]
    want = np.zeros((EXPERTS, 64, HIDDEN))
    for x, y in pairs:
        for g in np.flatnonzero(np.asarray(index) < EXPERTS):
            want[index[g]] += np.asarray(x[g], np.float64).T @ np.asarray(y[g], np.float64)
    np.testing.assert_allclose(ragged.outer(pairs, index, EXPERTS, **ANYWHERE), want, atol=2e-4)


def test_products_of_bfloat16_are_summed_in_float32():
    index, scale = index_of("even"), normal(GROUPS, seed=3)
    x, base = (normal(*shape, seed=1, dtype=jnp.bfloat16) for shape in ((GROUPS, 32, FEATURES), (EXPERTS, FEATURES, HIDDEN)))
    parts = [Part(normal(GROUPS, 32, 32, seed=4, dtype=x.dtype), normal(GROUPS, 32, HIDDEN, seed=5, dtype=x.dtype))]
    found = ragged.matmul(x, base, index, scale, parts, **ANYWHERE)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float64), product(x, base, index, scale, parts), rtol=2**-8, atol=1e-4)
    wide = ragged.outer([(jnp.repeat(x, 2, axis=2)[..., :64], parts[0].values)], index, EXPERTS, **ANYWHERE)
    assert wide.dtype == jnp.float32


def test_kernels_take_16_bits_and_widths_that_tiles_divide(monkeypatch):
    monkeypatch.setattr(gpu, "is_hopper", lambda: True)
    x, base = jnp.zeros((4, 3, 48), jnp.bfloat16), jnp.zeros((2, 48, 128))
    assert ragged.has_matmul(x, base)
    assert not ragged.has_matmul(x.astype(jnp.float32), base)
    assert not ragged.has_matmul(x[..., :40], base[:, :40])
    assert not ragged.has_matmul(x, base[..., :100])
    taken = []
    jax.eval_shape(lambda: taken.append(ragged.has_matmul(jnp.zeros((2**16, 2**9, 48), x.dtype), base)))
    assert taken == [False]

    def part(rows, others):
        return Part(jnp.zeros((4, rows, others)), jnp.zeros((4, others, 128)))

    assert ragged.takes([]) and ragged.takes([part(16, 48), part(128, 16)])
    assert not ragged.takes([part(16, 48), part(16, 40)])
    assert not ragged.takes([part(8, 16)]) and not ragged.takes([part(24, 16)])
    pairs = [(jnp.zeros((4, 3, 512), jnp.bfloat16), jnp.zeros((4, 3, 1024), jnp.bfloat16))]
    assert ragged.has_outer(pairs, 4) and not ragged.has_outer(pairs, 3)
    assert not ragged.has_outer([*pairs, tuple(a[:, :2] for a in pairs[0])], 4)
