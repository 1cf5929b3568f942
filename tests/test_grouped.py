"""Products of groups with the weights of their experts, against NumPy, however the groups are spread."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmoe_jax import grouped

EXPERTS, GROUPS, ROWS, FEATURES, HIDDEN = 8, 64, 3, 5, 4
SPREADS = {
    "even": [8] * EXPERTS,
    "to within the room": [9, 9, 9, 9, 7, 7, 7, 7],
    "unevenly": [14, 12, 10, 9, 8, 6, 5, 0],
    "to one": [0, 0, 64, 0, 0, 0, 0, 0],
    "to two": [33, 0, 0, 0, 0, 0, 0, 31],
}
CHOSEN = {"even": 0, "to within the room": 0, "unevenly": 1, "to one": 2, "to two": 2}


def index_of(counts, seed=0):
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts)).astype(np.int32)


def draw(*shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture
def chosen(monkeypatch):
    """Which of `sizes` were laid out, as far as the program got."""
    seen = []

    def lay_out(index, num_experts, *size, real=grouped.lay_out):
        jax.debug.callback(lambda: seen.append(size))
        return real(index, num_experts, *size)

    monkeypatch.setattr(grouped, "lay_out", lay_out)
    return seen


@pytest.mark.parametrize("spread", SPREADS)
def test_products_and_sums_are_those_of_numpy(spread, chosen):
    index, x, y = index_of(SPREADS[spread]), draw(GROUPS, ROWS, FEATURES, seed=1), draw(GROUPS, ROWS, HIDDEN, seed=2)
    base, weight = draw(EXPERTS, FEATURES, HIDDEN, seed=3), draw(GROUPS, ROWS, seed=4)
    np.testing.assert_allclose(grouped.matmul(x, base, index), np.einsum("grd,gdh->grh", x, base[index]), rtol=1e-5, atol=1e-5)
    jax.effects_barrier()
    assert chosen == [grouped.sizes(GROUPS, EXPERTS)[CHOSEN[spread]]]
    index[:5] = EXPERTS  # left out, and not finite
    y[:5] = np.nan
    rows = [grouped.Rows(*(jnp.asarray(a[:, part]) for a in (x, y, weight))) for part in (slice(0, 1), slice(1, 3))]
    expected = np.zeros((EXPERTS, FEATURES, HIDDEN))
    for g in range(5, GROUPS):
        expected[index[g]] += x[g].T @ (weight[g][:, None] * y[g])
    np.testing.assert_allclose(grouped.outer(rows, jnp.asarray(index), EXPERTS), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grouped.outer(rows, jnp.where(index == EXPERTS, 1, 0), 1)[0], expected.sum(0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("groups", "experts"), [(9, 8), (40, 8), (64, 3), (100, 17)])
def test_each_group_has_a_place_of_its_own_in_a_tile_of_its_expert(groups, experts, seed):
    rng = np.random.default_rng(seed)
    index = rng.choice(experts, groups, p=rng.dirichlet(np.full(experts, 0.1 + seed))).astype(np.int32)
    counts = np.bincount(index, minlength=experts)
    for size, spare in grouped.sizes(groups, experts):
        if np.maximum(-(-counts // size) - 1, 0).sum() > spare:
            continue
        layout = jax.tree.map(np.asarray, grouped.lay_out(jnp.asarray(index), experts, size, spare))
        expert = np.concatenate([np.arange(experts), layout.owner])
        np.testing.assert_array_equal(layout.group.ravel()[layout.place], np.arange(groups))
        assert layout.filled.ravel()[layout.place].all() and layout.filled.sum() == groups
        np.testing.assert_array_equal(expert[layout.place // size], index)
    size, spare = grouped.sizes(groups, experts)[-1]
    assert np.maximum(-(-counts // size) - 1, 0).sum() <= spare
