"""Products of groups with the weights of their experts, against NumPy, however the groups are spread."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_round

from fedmoe_jax import gpu, grouped, ragged

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


def matmul(*args):
    return grouped.matmul(*map(jnp.asarray, args))


def draw(*shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def interpreted(monkeypatch):
    """Kernels of a GPU, wherever this is, and of any dtype."""
    if jax.__version_info__ >= (0, 11):  # which keeps what was traced without them
        jax.clear_caches()
    monkeypatch.setattr(gpu, "run", lambda kernel, otherwise, *args, **static: kernel(*args, interpret=True, **static))
    for name in ("takes_matmul", "takes_parts", "takes_outer"):
        monkeypatch.setattr(ragged, name, lambda *args: True)


def spied(monkeypatch, name):
    """What a function of `ragged` is given from here on, in its calls."""
    told, real = [], getattr(ragged, name)
    monkeypatch.setattr(ragged, name, lambda *args, **options: told.append(args) or real(*args, **options))
    return told


@pytest.fixture
def chosen(monkeypatch):
    """The sizes of the layouts that were used, in their order; branches not taken do not appear."""
    seen = []
    if jax.__version_info__ >= (0, 11):  # which keeps what was traced with another `lay_out`
        jax.clear_caches()

    def lay_out(index, counts, *size, real=grouped.lay_out):
        jax.debug.callback(lambda: seen.append(size))
        return real(index, counts, *size)

    monkeypatch.setattr(grouped, "lay_out", lay_out)
    return seen


def sums(x, y, weight, index, dtype=jnp.float32):
    """`outer` of two steps of unequal rows, and the same by NumPy."""
    rows = [grouped.Rows(*(jnp.asarray(a[:, part], dtype) for a in (x, y, weight))) for part in (slice(0, 1), slice(1, 3))]
    expected = np.zeros((EXPERTS, FEATURES, HIDDEN))
    for g in np.flatnonzero(index < EXPERTS):
        expected[index[g]] += x[g].T @ (weight[g][:, None] * y[g])
    return jax.jit(lambda *args: grouped.outer(*args, EXPERTS))(rows, jnp.asarray(index)), expected


@pytest.mark.parametrize("spread", SPREADS)
def test_products_and_sums_are_those_of_numpy(spread, chosen):
    index, x, y = index_of(SPREADS[spread]), draw(GROUPS, ROWS, FEATURES, seed=1), draw(GROUPS, ROWS, HIDDEN, seed=2)
    base, weight = draw(EXPERTS, FEATURES, HIDDEN, seed=3), draw(GROUPS, ROWS, seed=4)
    found = jax.jit(lambda *args: matmul(*args))(x, base, index)
    np.testing.assert_allclose(found, np.einsum("grd,gdh->grh", x, base[index]), rtol=1e-5, atol=1e-5)
    found, expected = sums(x, y, weight, index)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    jax.effects_barrier()
    assert chosen == 2 * [grouped.sizes(GROUPS, EXPERTS)[CHOSEN[spread]]]


@pytest.mark.parametrize("absent", [5, GROUPS // 2, GROUPS])
def test_groups_without_an_expert_take_no_place_and_give_nothing(absent, chosen):
    index, x, y = index_of([8] * EXPERTS), draw(GROUPS, ROWS, FEATURES, seed=1), draw(GROUPS, ROWS, HIDDEN, seed=2)
    index[:absent], y[:absent] = EXPERTS, np.nan
    found, expected = sums(x, y, draw(GROUPS, ROWS, seed=4), index)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    x[:absent] = np.nan
    base = draw(EXPERTS, FEATURES, HIDDEN, seed=3)
    right = np.where((index < EXPERTS)[:, None, None], np.einsum("grd,gdh->grh", x, base[index % EXPERTS]), 0)
    np.testing.assert_allclose(matmul(x, base, index), right, rtol=1e-5, atol=1e-5)
    jax.effects_barrier()
    assert chosen == 2 * [grouped.sizes(GROUPS, EXPERTS)[0]]


def test_one_expert_and_more_experts_than_groups():
    x, y, weight = draw(GROUPS, ROWS, FEATURES, seed=1), draw(GROUPS, ROWS, HIDDEN, seed=2), draw(GROUPS, ROWS, seed=4)
    index = (np.arange(GROUPS) % 5 == 0).astype(np.int32)  # 1 is left out
    rows = [grouped.Rows(*map(jnp.asarray, (x, y, weight)))]
    kept = index == 0
    expected = np.einsum("grd,gr,grh->dh", x[kept], weight[kept], y[kept])
    np.testing.assert_allclose(grouped.outer(rows, jnp.asarray(index), 1)[0], expected, rtol=1e-4, atol=1e-4)
    few = [grouped.Rows(*(a[:3] for a in rows[0]))]
    found = grouped.outer(few, jnp.array([6, 0, EXPERTS]), EXPERTS)
    for expert, g in ((6, 0), (0, 1)):
        np.testing.assert_allclose(found[expert], x[g].T @ (weight[g][:, None] * y[g]), rtol=1e-5, atol=1e-5)
    assert np.count_nonzero(np.abs(found).sum((1, 2))) == 2
    base = draw(EXPERTS, FEATURES, HIDDEN, seed=3)
    np.testing.assert_allclose(matmul(x[:2], base, jnp.array([6, 0])), x[:2] @ base[[6, 0]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spread", ["even", "unevenly"])
def test_products_of_bfloat16_are_summed_in_float32(spread):
    index, x, y = index_of(SPREADS[spread]), draw(GROUPS, ROWS, FEATURES, seed=1), draw(GROUPS, ROWS, HIDDEN, seed=2)
    x, y, weight = (np.asarray(jnp.asarray(a, jnp.bfloat16), np.float32) for a in (x, y, np.ones((GROUPS, ROWS))))
    found, expected = sums(x, y, weight, index, jnp.bfloat16)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
    base = jnp.asarray(draw(EXPERTS, FEATURES, HIDDEN, seed=3), jnp.bfloat16)
    assert matmul(jnp.asarray(x, jnp.bfloat16), base, index).dtype == jnp.bfloat16


def test_clients_and_models_under_vmap_take_one_branch():
    """All clients' groups come together, and several models the layout that does for all of them."""
    spreads = [index_of(SPREADS[name]) for name in ("even", "unevenly")]
    x = draw(2, GROUPS, ROWS, FEATURES, seed=1)
    bases, index = draw(2, EXPERTS, FEATURES, HIDDEN, seed=3), np.stack(spreads)
    of_models = jax.vmap(matmul)
    right = np.einsum("mgrd,mgdh->mgrh", x, np.stack([base[own] for base, own in zip(bases, index, strict=True)]))
    np.testing.assert_allclose(of_models(x, bases, index), right, rtol=1e-5, atol=1e-5)
    assert " cond[" in str(jax.make_jaxpr(of_models)(x, bases, index))
    of_clients = jax.vmap(matmul, (0, None, 0))
    right = np.einsum("cgrd,cgdh->cgrh", x, bases[0][index])
    np.testing.assert_allclose(of_clients(x, bases[0], index), right, rtol=1e-5, atol=1e-5)
    for axes, args in (((None, None, 0), (x[0], bases[0], index)), ((0, None, None), (x, bases[0], index[0]))):
        right = np.stack([matmul(*(a if axis is None else a[c] for a, axis in zip(args, axes, strict=True))) for c in range(2)])
        np.testing.assert_allclose(jax.vmap(matmul, axes)(*args), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("option", range(3))
@pytest.mark.parametrize(("groups", "experts"), [(40, 8), (64, 3), (100, 17)])
def test_each_group_has_a_place_of_its_own_in_a_tile_of_its_expert(groups, experts, option):
    size, spare = grouped.sizes(groups, experts)[option]
    rng, done = np.random.default_rng(option), 0
    while done < 8:
        index = rng.permutation(np.arange(groups) % experts)
        again = rng.random(groups) < [0.0, 0.3, 1.0][option]
        index[again] = rng.choice(experts, again.sum(), p=rng.dirichlet(np.ones(experts)))
        index[rng.random(groups) < 0.1 * done] = experts
        counts = np.bincount(index, minlength=experts + 1)[:experts]
        if sum(max(-(-n // size) - 1, 0) for n in counts) > spare:
            assert option == 1
            continue
        done += 1
        layout = jax.tree.map(np.asarray, grouped.lay_out(*map(jnp.int32, (index, counts)), size, spare))
        expert, here = np.concatenate([np.arange(experts), layout.owner]), np.flatnonzero(index < experts)
        place = layout.place[here]
        np.testing.assert_array_equal(layout.group.ravel()[place], here)
        assert layout.filled.ravel()[place].all() and layout.filled.sum() == len(here)
        np.testing.assert_array_equal(expert[place // size], index[here])


@pytest.mark.parametrize("in_kernels", [False, True])
def test_what_is_added_is_added_to_the_products_of_all(in_kernels, monkeypatch):
    """Of clients, and of several models with clients, of which some groups have no expert."""
    models, clients, slots, rows, features, hidden, others = 2, 4, 8, 16, 32, 64, 32
    if in_kernels:
        interpreted(monkeypatch)
    index = index_of([4] * EXPERTS).reshape(clients, slots)
    index[0, :3] = index[2, 5] = EXPERTS
    x, base = draw(clients, slots, rows, features, seed=1), draw(models, EXPERTS, features, hidden, seed=3)
    mix, values = draw(models, clients, slots, rows, others, seed=4), draw(models, clients, slots, others, hidden, seed=5)
    scale = draw(clients, seed=6)

    def product(base, mix, values, x, index, scale):
        return grouped.matmul(x, base, index, scale, [grouped.Part(mix, values)])

    of_clients = jax.vmap(product, (None, 0, 0, 0, 0, 0))
    of_models = jax.vmap(of_clients, (0, 0, 0, None, None, None))
    kernel = np.concatenate([base, np.zeros_like(base[:, :1])], axis=1)[:, index]
    want = scale[:, None, None, None] * np.einsum("csrd,mcsdh->mcsrh", x, kernel) + mix @ values
    np.testing.assert_allclose(jax.jit(of_models)(base, mix, values, x, index, scale), want, atol=1e-4)
    np.testing.assert_allclose(jax.jit(of_clients)(base[0], mix[0], values[0], x, index, scale), want[0], atol=1e-4)


@pytest.mark.parametrize("rows", [16, 3])
def test_parts_that_a_kernel_does_not_take_are_added_after_it(rows, monkeypatch):
    interpreted(monkeypatch)
    monkeypatch.setattr(ragged, "takes_parts", lambda parts: rows == 16)
    told = spied(monkeypatch, "matmul")
    index, x, base = index_of([8] * EXPERTS), draw(GROUPS, rows, 16, seed=1), draw(EXPERTS, 16, 64, seed=2)
    mix, values = draw(GROUPS, rows, 16, seed=3), draw(GROUPS, 16, 64, seed=4)
    found = jax.jit(lambda *args: grouped.matmul(*args[:3], 0.5, [grouped.Part(*args[3:])]))(x, base, index, mix, values)
    np.testing.assert_allclose(found, 0.5 * x @ base[index] + mix @ values, atol=1e-4)
    assert [len(args[4]) for args in told] == [int(rows == 16)]


@pytest.mark.parametrize("absent", [0, 40])
def test_sums_in_kernels_weigh_the_narrower_side(absent, monkeypatch):
    interpreted(monkeypatch)
    told = spied(monkeypatch, "outer")
    index, weight = index_of([8] * EXPERTS), draw(GROUPS, 2, seed=4)
    index[:absent] = EXPERTS
    x, y = draw(GROUPS, 2, 64, seed=1), draw(GROUPS, 2, 128, seed=2)
    want = np.zeros((EXPERTS, 64, 128))
    for g in np.flatnonzero(index < EXPERTS):
        want[index[g]] += x[g].T @ (weight[g][:, None] * y[g])
    for a, b, right in ((x, y, want), (y, x, want.swapaxes(1, 2))):
        rows = [grouped.Rows(*map(jnp.asarray, (a, b, weight)))]
        np.testing.assert_allclose(grouped.outer(rows, jnp.asarray(index), EXPERTS), right, atol=1e-4)
    (((_, first),), *_), (((second, _),), *_) = told
    np.testing.assert_array_equal(first, y)
    np.testing.assert_array_equal(second, y)


def test_a_round_with_kernels_is_that_without(monkeypatch):
    """Of clients with unequal examples and steps, and one whose examples are NaN."""
    data = small_round.population(sizes=(40, 16, 30, 5), broken=[2])
    of = small_round.model(hidden=64, expert_hidden=64, top_k=2)
    options = dict(of=of, engine="dual", batch_size=16, aligner=small_round.aligner("random", max_slots=3), cohort_size=4)
    plain, _ = small_round.run(small_round.algorithm(**options), data)
    interpreted(monkeypatch)
    products, sums = (spied(monkeypatch, name) for name in ("matmul", "outer"))
    found, info = small_round.run(small_round.algorithm(**options), data)
    assert any(len(args[4]) > 1 for args in products) and sums and int(info.rejected_updates) == 1
    assert small_round.distance(small_round.weights(found), small_round.weights(plain)) < 1e-4


@pytest.mark.parametrize("size", grouped.sizes(GROUPS, EXPERTS))
def test_all_places_are_there(size):
    index = index_of([8] * EXPERTS)
    index[:40] = EXPERTS
    layout = grouped.lay_out(jnp.asarray(index), jnp.bincount(jnp.asarray(index), length=EXPERTS).astype(jnp.int32), *size)
    assert layout.place.min() >= 0 and layout.place.max() < layout.group.size
