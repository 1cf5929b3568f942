"""Assignment: `balanced` against an exact min-cost flow, the simple rules against their definitions."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_jax.alignment import assign, repair

CLIENTS, EXPERTS = 20, 8


def exact(fitness, slots, lower, upper):
    """The best assignment by OR-tools; a client outside the bounds costs more than all fitness."""
    flow = pytest.importorskip("ortools.graph.python.min_cost_flow").SimpleMinCostFlow()
    allowed, scale = np.isfinite(fitness), 1e6
    clients, experts = fitness.shape
    rows = np.minimum(slots, allowed.sum(1))
    fine = int(scale * (experts + 2) * (1 + np.ptp(fitness[allowed]))) if allowed.any() else 1
    first, source, sink = clients, clients + experts, clients + experts + 1
    client, expert = np.nonzero(allowed)
    pairs = flow.add_arcs_with_capacity_and_unit_cost(
        client, first + expert, np.ones_like(client), np.round(-scale * fitness[allowed].astype(np.float64)).astype(int)
    )
    flow.add_arcs_with_capacity_and_unit_cost(np.full(clients, source), np.arange(clients), rows, np.zeros(clients, int))
    columns = first + np.arange(experts)
    for room, cost in [(lower, -fine), (upper - lower, 0), (np.full(experts, clients), fine)]:
        flow.add_arcs_with_capacity_and_unit_cost(columns, np.full(experts, sink), room, np.full(experts, cost))
    flow.set_node_supply(source, int(rows.sum()))
    flow.set_node_supply(sink, -int(rows.sum()))
    assert flow.solve() == flow.OPTIMAL
    mask = np.zeros(fitness.shape, bool)
    mask[client, expert] = flow.flows(pairs) > 0
    return mask


def violation(mask, lower, upper):
    load = mask.sum(0)
    return int(np.maximum(load - upper, 0).sum() + np.maximum(lower - load, 0).sum())


def value(mask, fitness):
    return float(np.where(mask, fitness, 0.0).astype(np.float64).sum())


def family(name, clients, experts, rng):
    """Kinds of fitness that differ in what makes them hard."""
    uniform = rng.random((clients, experts))
    forbidden = np.where(rng.random((clients, experts)) < 0.4, -np.inf, uniform)
    return {
        "uniform": uniform,
        "popular": uniform + 0.5 * rng.random(experts),
        "very popular": uniform + 2.0 * rng.random(experts),
        "groups": rng.random((4, experts))[rng.integers(0, 4, clients)] + 0.1 * uniform,
        "near ties": np.round(2 * uniform) / 2 + 1e-6 * rng.random((clients, experts)),
        "rank one": rng.standard_normal((clients, 1)) * rng.standard_normal(experts),
        "all equal": np.ones((clients, experts)),
        "forbidden": forbidden,
        "nothing allowed": np.full((clients, experts), np.nan),
        "negative": -1e3 * uniform,
        "outlier": np.where(np.arange(clients * experts).reshape(clients, experts) == 3, 50.0, uniform),
    }[name].astype(np.float32)


FAMILIES = [
    "uniform", "popular", "very popular", "groups", "near ties", "rank one",
    "all equal", "forbidden", "nothing allowed", "negative", "outlier",
]  # fmt: skip


def bounds(kind, total, experts, rng):
    mean = total / experts
    if kind == "around the mean":
        return np.full(experts, int(0.9 * mean)), np.full(experts, int(np.ceil(1.1 * mean)))
    if kind == "equal":
        lower = np.full(experts, total // experts)
        lower[: total % experts] += 1
        return lower, lower
    if kind == "no lower":
        return np.zeros(experts, int), np.full(experts, int(np.ceil(1.1 * mean)))
    lower = rng.integers(0, 9, experts)  # often not feasible
    return lower, lower + rng.integers(0, 9, experts)


def check(fitness, slots, lower, upper, key=None, tolerance=1e-4):
    found, info = assign.balanced(*map(jnp.array, (fitness, slots, lower, upper)), key=key, return_info=True)
    found, wanted = np.asarray(found), exact(fitness, slots, lower, upper)
    allowed = np.isfinite(fitness)
    assert not (found & ~allowed).any()
    np.testing.assert_array_equal(found.sum(1), np.minimum(slots, allowed.sum(1)))
    assert violation(found, lower, upper) == violation(wanted, lower, upper) == int(info.violation)
    best = value(wanted, fitness)
    loss = (best - value(found, fitness)) / max(np.abs(np.where(found, fitness, 0)).sum(), 1e-9)
    assert loss <= tolerance
    assert -1e-6 <= float(info.gap) <= tolerance and loss <= float(info.gap) + 1e-6
    return found, info


@pytest.mark.parametrize("name", FAMILIES)
@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 2**31), kind=st.sampled_from(["around the mean", "equal", "no lower", "random"]))
def test_balanced_is_optimal(name, seed, kind):
    rng = np.random.default_rng(seed)
    fitness = family(name, CLIENTS, EXPERTS, rng)
    slots = rng.integers(0, EXPERTS + 2, CLIENTS)
    rows = np.minimum(slots, np.isfinite(fitness).sum(1))
    check(fitness, slots, *bounds(kind, int(rows.sum()), EXPERTS, rng), key=jax.random.key(seed))


@pytest.mark.parametrize("shape", [(1, 5), (6, 1), (1, 1), (3, 40), (200, 16), (1000, 64)])
def test_balanced_is_optimal_at_other_sizes(shape):
    clients, experts = shape
    for name in ["popular", "groups"]:
        rng = np.random.default_rng(clients)
        slots = rng.integers(0, min(experts, 4) + 1, clients)
        check(family(name, clients, experts, rng), slots, *bounds("around the mean", int(slots.sum()), experts, rng))


def test_bounds_that_cannot_be_met_are_broken_as_little_as_possible():
    fitness, slots = np.array([[3.0, 2.0, 1.0]] * 4, np.float32), np.ones(4, int)
    found, info = check(fitness, slots, np.array([0, 0, 0]), np.array([1, 1, 1]))
    assert int(info.violation) == 1 and found.sum(0).tolist() == [2, 1, 1]
    found, info = check(fitness, slots, np.array([2, 2, 2]), np.array([4, 4, 4]))
    assert int(info.violation) == 2 and found.sum(0).tolist() == [2, 2, 0]


def problem(seed, name="popular"):
    rng = np.random.default_rng(seed)
    slots = rng.integers(0, 4, CLIENTS)
    lower, upper = bounds("around the mean", int(slots.sum()), EXPERTS, rng)
    return [jnp.array(a) for a in (family(name, CLIENTS, EXPERTS, rng), slots, lower, upper)]


def test_balanced_works_under_jit_vmap_and_scan():
    together = jax.tree.map(lambda *rows: jnp.stack(rows), *[problem(seed) for seed in range(4)])
    alone = [assign.balanced(*problem(seed)) for seed in range(4)]
    mapped = jax.jit(jax.vmap(lambda p: assign.balanced(*p)))(together)
    _, scanned = jax.lax.scan(lambda carry, p: (carry, assign.balanced(*p)), 0, together)
    np.testing.assert_array_equal(mapped, jnp.stack(alone))
    np.testing.assert_array_equal(scanned, jnp.stack(alone))


def test_a_warm_start_does_not_change_the_quality():
    fitness, slots, lower, upper = problem(3)
    mask, info = assign.balanced(fitness, slots, lower, upper, return_info=True)
    for prices in [info.prices, 100 * info.prices, jnp.full(EXPERTS, jnp.nan), jnp.full(EXPERTS, -jnp.inf)]:
        again, info = assign.balanced(fitness, slots, lower, upper, prices=prices, return_info=True)
        assert abs(value(again, fitness) - value(mask, fitness)) < 1e-3 and int(info.violation) == 0


def test_one_outlier_does_not_hide_the_differences_of_all_others():
    rng = np.random.default_rng(0)
    fitness = 1e-4 * rng.random((500, 16)).astype(np.float32)
    fitness[0, 0] = 1.0
    slots, bound = np.full(500, 2), np.full(16, 63)
    found, wanted = check(fitness, slots, bound - 10, bound)[0], exact(1e4 * fitness, slots, bound - 10, bound)
    fitness[0, 0] = 0.0
    assert found[0, 0] and value(found, fitness) >= (1 - 1e-4) * value(wanted, fitness)


@pytest.mark.parametrize("known", [0, 1, 100])
def test_clients_of_whom_nothing_is_known_are_spread_at_random(known):
    """Most pairs have the prior. Beside them those with a score of their own are told apart well."""
    rng = np.random.default_rng(known)
    fitness = np.full((2000, 16), 1.0, np.float32)
    fitness[:known] = 0.01 + 0.003 * rng.random((known, 16))
    slots, none = np.full(2000, 2), np.zeros(16, int)
    loose, _ = check(fitness, slots, none, none + 2000, key=jax.random.key(1))
    assert np.abs(loose.sum(0) / 250 - 1).max() < 0.3  # five standard deviations
    tight, _ = check(fitness, slots, none + 250, none + 250, key=jax.random.key(1))
    assert np.ptp(tight.sum(0)) == 0
    if known:
        best = np.sort(fitness[:known], axis=1)[:, -2:].sum()
        assert value(tight[:known], fitness[:known]) >= 0.99 * best


@pytest.mark.parametrize("rule", [assign.greedy, lambda f, s: assign.random(jax.random.key(0), s, EXPERTS), assign.balanced])
def test_what_is_constant_in_a_jitted_function_is_checked_like_all_else(rule):
    fitness, slots, *bounds = problem(0)
    bounds = bounds if rule is assign.balanced else []
    wanted = rule(fitness, slots, *bounds)
    np.testing.assert_array_equal(jax.jit(lambda fitness: rule(fitness, slots, *bounds))(fitness), wanted)
    wrong = slots.at[0].set(-1)
    with pytest.raises(ValueError, match="slots has a negative entry, -1"):
        jax.jit(lambda fitness: rule(fitness, wrong, *bounds))(fitness)


def test_bad_bounds_stay_finite_inside_jit():
    fitness, slots, lower, upper = problem(4)
    mask, info = jax.jit(lambda *a: assign.balanced(*a, return_info=True))(fitness, slots - 2, upper + 3, lower - 4)
    np.testing.assert_array_equal(mask.sum(1), jnp.maximum(slots - 2, 0))
    assert int(info.violation) > 0 and np.isfinite(float(info.gap))


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


def test_vmap_over_problems_that_need_different_repairs(monkeypatch):
    """Also where only some of the clients are near a change, and some problems are done before others."""
    monkeypatch.setattr(repair, "_NEAR", 8)
    jax.clear_caches()
    rng = np.random.default_rng(0)
    names = ["uniform", "near ties", "rank one", "popular", "groups", "all equal", "forbidden", "negative"]
    fitness = jnp.array(np.stack([family(name, 60, 6, rng) for name in names]))
    slots, bound = jnp.full(60, 2), jnp.full(6, 20)
    together = jax.vmap(lambda values: assign.balanced(values, slots, bound, bound))(fitness)
    for name, mask, values in zip(names, together, fitness, strict=True):
        np.testing.assert_array_equal(mask, assign.balanced(values, slots, bound, bound), err_msg=name)
    jax.clear_caches()


def test_fitness_at_the_end_of_float32_is_as_good_as_any_large_number():
    values = jnp.where(jnp.arange(40)[:, None] % 2 == jnp.arange(2), 3e38, -3e38)
    mask, info = assign.balanced(values, jnp.ones(40, int), jnp.full(2, 20), jnp.full(2, 20), return_info=True)
    np.testing.assert_array_equal(mask, values > 0)
    assert info.violation == 0 and info.gap <= 1e-5


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e36])
def test_fitness_of_any_size(scale):
    values = jnp.array(np.random.default_rng(0).random((1200, 3)) * scale, jnp.float32)
    mask, info = assign.balanced(values, jnp.ones(1200, int), jnp.full(3, 400), jnp.full(3, 400), return_info=True)
    assert (mask.sum(0) == 400).all() and info.violation == 0
    if scale == 0:
        assert info.gap == 0
    else:
        assert np.asarray(values / scale)[np.asarray(mask)].mean() > 0.7


def test_bounds_that_must_be_broken_are_broken_least_with_few_clients_near(monkeypatch):
    """Many experts that nobody may hold, or that need more clients than there are, and few clients near a change."""
    monkeypatch.setattr(repair, "_NEAR", 8)
    problems, clients, experts = 64, 300, 10
    rng = np.random.default_rng(7)
    fitness = (rng.random((problems, clients, experts)) + 2 * rng.random((problems, 1, experts))).astype(np.float32)
    slots = rng.integers(0, 4, (problems, clients))
    lower = np.where(rng.random((problems, experts)) < 0.3, rng.integers(0, clients + 1, (problems, experts)), 0)
    upper = lower + clients * rng.integers(0, 2, (problems, experts))
    solve = jax.jit(jax.vmap(lambda f, s, low, up: assign.balanced(f, s, low, up, return_info=True)))
    masks, info = solve(*map(jnp.asarray, (fitness, slots, lower, upper)))
    np.testing.assert_array_equal(masks.sum(2), slots)
    reach = masks.sum(1)
    np.testing.assert_array_equal(info.violation, np.abs(reach - np.clip(reach, lower, upper)).sum(1))
    for problem in range(0, problems, 8):
        best = exact(fitness[problem], slots[problem], lower[problem], upper[problem])
        load = best.sum(0)
        assert info.violation[problem] == np.abs(load - np.clip(load, lower[problem], upper[problem])).sum()


@pytest.mark.parametrize("most", [10**9, 2**31 - 1])
def test_huge_bounds_are_no_bounds_whatever_the_prices(most):
    rng = np.random.default_rng(0)
    fitness = jnp.array(rng.random((CLIENTS, EXPERTS)), jnp.float32)
    slots, lower, upper = jnp.full(CLIENTS, 2), jnp.zeros(EXPERTS, jnp.int32), jnp.full(EXPERTS, most, jnp.int32)
    prices = jnp.array(100 * rng.normal(size=EXPERTS), jnp.float32)
    mask, info = assign.balanced(fitness, slots, lower, upper, prices=prices, return_info=True)
    assert (mask == assign.greedy(fitness, slots)).mean() > 0.99 and info.violation == 0 and info.gap < 1e-3
    _, info = assign.balanced(fitness, slots, upper, upper, return_info=True)
    assert info.violation == 2**30
