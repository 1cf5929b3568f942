"""`assign.balanced` against the best assignment, in every kind of problem and of transformation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from assignments import CLIENTS, EXPERTS, FAMILIES, best, bounds, check, family, problem
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_jax.alignment import assign, blocks, flow, newton, repair, transport


@pytest.fixture
def few_near(monkeypatch):
    """Repairs look first among eight clients, in programs that are compiled anew."""
    monkeypatch.setattr(repair, "_NEAR", 8)
    monkeypatch.setattr(repair, "_LARGE", 0)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture
def in_blocks(monkeypatch):
    """Called, takes 16 clients a block from then on."""

    def begin():
        monkeypatch.setattr(blocks, "_WHOLE", 0)
        monkeypatch.setattr(blocks, "_BLOCK", EXPERTS * 16)
        jax.clear_caches()

    yield begin
    jax.clear_caches()


def value(mask, fitness):
    return float(np.asarray(fitness, np.float64)[np.asarray(mask)].sum())


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


def test_balanced_is_optimal_with_64_bits():
    rng = np.random.default_rng(0)
    slots = rng.integers(0, 4, 60)
    with jax.enable_x64(True):
        check(family("popular", 60, 8, rng), slots, *bounds("around the mean", int(slots.sum()), 8, rng))


def test_bounds_that_cannot_be_met_are_broken_as_little_as_possible():
    fitness, slots = np.array([[3.0, 2.0, 1.0]] * 4, np.float32), np.ones(4, int)
    found, info = check(fitness, slots, np.array([0, 0, 0]), np.array([1, 1, 1]))
    assert int(info.violation) == 1 and found.sum(0).tolist() == [2, 1, 1]
    found, info = check(fitness, slots, np.array([2, 2, 2]), np.array([4, 4, 4]))
    assert int(info.violation) == 2 and found.sum(0).tolist() == [2, 2, 0]


def test_balanced_works_under_jit_vmap_and_scan():
    together = jax.tree.map(lambda *rows: jnp.stack(rows), *[problem(seed) for seed in range(4)])
    alone = [assign.balanced(*problem(seed)) for seed in range(4)]
    mapped = jax.jit(jax.vmap(lambda p: assign.balanced(*p)))(together)
    _, scanned = jax.lax.scan(lambda carry, p: (carry, assign.balanced(*p)), 0, together)
    np.testing.assert_array_equal(mapped, jnp.stack(alone))
    np.testing.assert_array_equal(scanned, jnp.stack(alone))


def test_a_warm_start_does_not_change_the_quality():
    fitness, slots, lower, upper = problem(3)
    solve = jax.jit(functools.partial(assign.balanced, return_info=True))
    mask, info = solve(fitness, slots, lower, upper)
    for prices in [info.prices, 100 * info.prices, jnp.full(EXPERTS, jnp.nan), jnp.full(EXPERTS, -jnp.inf)]:
        again, info = solve(fitness, slots, lower, upper, prices=prices)
        assert abs(value(again, fitness) - value(mask, fitness)) < 1e-3 and int(info.violation) == 0


@pytest.mark.parametrize("name", ["popular", "groups"])
def test_prices_of_other_clients_serve_and_bad_ones_do_no_harm(name):
    rng = np.random.default_rng(0)
    fitness, slots = jnp.array(family(name, 600, 16, rng)), jnp.full(300, 2)
    lower, upper = jnp.full(16, 34), jnp.full(16, 41)
    _, info = assign.balanced(fitness[300:], slots, lower, upper, return_info=True)
    starts = jnp.stack([0 * info.prices, info.prices, info.prices + 0.5, -info.prices, 1e3 * info.prices])

    def solve(prices):
        return assign.balanced(fitness[:300], slots, lower, upper, prices=prices, return_info=True)

    masks, found = jax.jit(jax.vmap(solve))(starts)
    assert not found.violation.any()
    for prices, mask in zip(starts, masks, strict=True):
        np.testing.assert_array_equal(mask, solve(prices)[0])
        assert value(mask, fitness[:300]) == pytest.approx(value(masks[0], fitness[:300]), rel=1e-5)


def test_parts_of_a_step_tell_clients_apart():
    value = jnp.array(family("popular", 2000, 16, np.random.default_rng(0)).T * 150, jnp.float32)
    bounds = jnp.full(16, 245), jnp.full(16, 255)
    plain = flow.Problem(jnp.floor(value).astype(jnp.int32), jnp.ones(value.shape, bool), jnp.full(2000, 2), *bounds, steps=300)
    surplus = {}
    for name, case in [("plain", plain), ("parts", plain._replace(part=value % 1.0))]:
        plan = flow.plan_at(case, *newton.prices(case))
        surplus[name] = int(flow.surplus(plan))
        worth = case.value - plan.prices[:, None]
        held, free = (jnp.where(plan.mask == held, worth, sign * flow.FAR) for held, sign in ((True, 1), (False, -1)))
        assert (free.max(axis=0) <= held.min(axis=0) + 1).all() and (plan.mask.sum(axis=0) == 2).all()
    assert 2 * surplus["parts"] <= surplus["plain"] > 0


def test_parts_never_outweigh_steps_nor_what_is_forbidden():
    value, allowed = jnp.array([[0], [1000], [10]]), jnp.array([[False], [True], [True]])
    bounds = jnp.zeros(3, jnp.int32), jnp.ones(3, jnp.int32)
    part, beside = jnp.array([[0.999], [0.0], [0.0]]), jnp.array([-0.4999, 0.4999, 0.0])
    for may in (allowed, allowed | True):
        problem = flow.Problem(value, may, jnp.ones(1, jnp.int32), *bounds, steps=1000, part=part)
        np.testing.assert_array_equal(flow.plan_at(problem, jnp.zeros(3, jnp.int32), beside).mask, [[False], [True], [False]])


@pytest.mark.parametrize("seed", range(5))
def test_plans_fill_all_slots_whatever_the_parts(seed):
    rng = np.random.default_rng(seed)
    value = rng.integers(0, 5, (6, 200))
    allowed, part, beside = rng.random((6, 200)) < 0.7, rng.random((6, 200)), rng.random(6) - 0.5
    slots, bounds = np.minimum(rng.integers(0, 7, 200), allowed.sum(axis=0)), (np.zeros(6, int), np.full(6, 200))
    arrays = map(jnp.asarray, (value, allowed, slots, *bounds))
    problem = flow.Problem(*arrays, steps=5, part=jnp.asarray(part, jnp.float32))
    mask = np.asarray(flow.plan_at(problem, jnp.asarray(rng.integers(-2, 3, 6)), jnp.asarray(beside, jnp.float32)).mask)
    np.testing.assert_array_equal(mask.sum(axis=0), slots)
    assert not (mask & ~allowed).any()


def test_one_outlier_does_not_hide_the_differences_of_all_others():
    rng = np.random.default_rng(0)
    fitness = 1e-4 * rng.random((500, 16)).astype(np.float32)
    fitness[0, 0] = 1.0
    slots, bound = np.full(500, 2), np.full(16, 63)
    found, wanted = check(fitness, slots, bound - 10, bound)[0], best(np.minimum(1e4 * fitness, 2), slots, bound - 10, bound)
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
        assert value(tight[:known], fitness[:known]) >= 0.99 * np.sort(fitness[:known], axis=1)[:, -2:].sum()


def test_bad_bounds_stay_finite_inside_jit():
    fitness, slots, lower, upper = problem(4)
    mask, info = jax.jit(lambda *a: assign.balanced(*a, return_info=True))(fitness, slots - 2, upper + 3, lower - 4)
    np.testing.assert_array_equal(mask.sum(1), jnp.maximum(slots - 2, 0))
    assert int(info.violation) > 0 and np.isfinite(float(info.gap))


def test_vmap_over_problems_that_need_different_repairs(few_near):
    """Also where only some of the clients are near a change, and some problems are done before others."""
    rng = np.random.default_rng(0)
    names = ["uniform", "near ties", "rank one", "popular", "groups", "all equal", "forbidden", "negative"]
    fitness = jnp.array(np.stack([family(name, 60, 6, rng) for name in names]))
    slots, bound = jnp.full(60, 2), jnp.full(6, 20)
    together = jax.vmap(lambda values: assign.balanced(values, slots, bound, bound))(fitness)
    for name, mask, values in zip(names, together, fitness, strict=True):
        np.testing.assert_array_equal(mask, assign.balanced(values, slots, bound, bound), err_msg=name)


def an_even_problem(clients):
    """Integers at random, with one pair in ten forbidden, and bounds that must shift many clients."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, flow.STEPS // 2, (EXPERTS, clients)) + np.arange(EXPERTS)[:, None] * (flow.STEPS // 20)
    slots = rng.integers(0, 4, clients)
    lower = jnp.full(EXPERTS, slots.sum() // EXPERTS - 2)
    allowed = jnp.asarray(rng.random(values.shape) < 0.9)
    return flow.Problem(jnp.asarray(values, jnp.int32), allowed, jnp.asarray(slots), lower, lower + 4)


def test_newtons_prices_are_the_same_for_clients_in_blocks(in_blocks):
    """Four blocks, of which the last is not full."""
    alone = newton.prices(an_even_problem(61))
    in_blocks()
    assert blocks.count(EXPERTS, 61) == 4
    whole, part = newton.prices(an_even_problem(61))
    np.testing.assert_allclose(whole + part, alone[0] + alone[1], atol=1e-4 * flow.STEPS)
    assert np.ptp(np.asarray(whole)) > 0.1 * flow.STEPS


def test_clients_in_blocks_get_the_best_too(in_blocks):
    in_blocks()
    rng = np.random.default_rng(0)
    for name in FAMILIES:
        slots = rng.integers(0, EXPERTS + 1, 61)
        check(family(name, 61, EXPERTS, rng), slots, *bounds("around the mean", int(slots.sum()), EXPERTS, rng))
    together = jax.tree.map(lambda *rows: jnp.stack(rows), *[problem(seed) for seed in range(2)])
    mapped = jax.vmap(lambda p: assign.balanced(*p))(together)
    np.testing.assert_array_equal(mapped, jnp.stack([assign.balanced(*problem(seed)) for seed in range(2)]))


@pytest.mark.parametrize(("clients", "experts"), [(10, 300), (300, 100_000), (10_000, 64), (100_000, 64), (1_000_000, 256)])
def test_blocks_hold_all_clients_and_none_is_empty(clients, experts):
    number = blocks.count(experts, clients)
    size = -(-clients // number)
    assert (number - 1) * size < clients <= number * size and (number == 1) == (clients * experts <= 1 << 20 or clients <= experts)


@pytest.mark.parametrize("near", [False, True])
def test_a_repair_stops_after_as_many_moves_as_it_may_take(near, request):
    if near:
        request.getfixturevalue("few_near")
    one = an_even_problem(200)
    plan = flow.plan_at(one, jnp.zeros(EXPERTS, jnp.int32), jnp.zeros(EXPERTS))
    left = [int(flow.surplus(repair.repair(one, plan, most))) for most in (0, 1, 2, flow.FAR)]
    assert left[0] == int(flow.surplus(plan)) > left[2] > left[3] == 0 and left[0] >= left[1] >= left[2]


def test_prices_that_a_few_moves_do_not_mend_are_left_for_newtons_method(monkeypatch):
    monkeypatch.setattr(transport, "_FEW", 1e9)
    monkeypatch.setattr(transport, "_MOVES", 1)
    one = an_even_problem(200)
    asked = []
    monkeypatch.setattr(newton, "prices", lambda found, prices=newton.prices: asked.append(1) or prices(found))
    mask, _ = transport.solve(one, jnp.zeros(EXPERTS))
    load = np.asarray(mask).sum(1)
    assert asked and (load >= one.lower).all() and (load <= one.upper).all()
    best_mask = best(np.where(one.allowed, one.value, -np.inf).T, *map(np.asarray, one[2:5]))
    assert abs(value(mask, one.value) - value(best_mask.T, one.value)) <= 200 * 2


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


def test_bounds_that_must_be_broken_are_broken_least_with_few_clients_near(few_near):
    """Many experts that nobody may hold, or that need more clients than there are, and few clients near a change."""
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
    np.testing.assert_array_equal(info.violation, jax.vmap(assign.least_violation)(*map(jnp.asarray, (slots, lower, upper))))
    for row in range(0, problems, 8):
        load = best(fitness[row], slots[row], lower[row], upper[row]).sum(0)
        assert info.violation[row] == np.abs(load - np.clip(load, lower[row], upper[row])).sum()


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


def test_sorting_tells_the_same_threshold_as_bisection():
    """Also where clients have no slots, or values are forbidden or equal."""
    draw = np.random.default_rng(0)
    worth = draw.integers(-3, 4, (12, 200), np.int32)
    worth[draw.random(worth.shape) < 0.3] = -flow.FAR
    worth, slots = jnp.asarray(worth), jnp.asarray(draw.integers(0, 13, 200), jnp.int32)
    found = flow.sorted_least(worth, slots, flow.FAR)
    np.testing.assert_array_equal(found, flow.bisected_least(worth, slots, flow.FAR))
    np.testing.assert_array_equal(found[slots > 0], -np.sort(-np.asarray(worth), axis=0)[np.asarray(slots) - 1, np.arange(200)][slots > 0])


def test_a_gpu_counts_by_a_product(monkeypatch):
    marked = jnp.asarray(np.random.default_rng(0).random((300, 50)) < 0.9)
    want = np.cumsum(marked, axis=0)
    np.testing.assert_array_equal(flow.counted(marked), want)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    np.testing.assert_array_equal(flow.counted(marked), want)
