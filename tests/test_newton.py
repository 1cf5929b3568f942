"""Newton's method: prices that leave few clients to move, and the same in kernels, whatever fills them, and for several groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from assignments import family

from fedmoe_jax import gpu
from fedmoe_jax.alignment import flow, newton, newton_kernels
from fedmoe_jax.alignment.newton_step import SMOOTHING, Level, next_level

KERNELS = dict(interpret=not gpu.has_kernels())
CLOSE = 5e-4 * flow.STEPS  # rounding may decide which level is the last


def problem(experts, clients, seed=0):
    """Some experts are liked more, some pairs are not allowed, and some clients have no slots."""
    draw = np.random.default_rng(seed)
    value = (draw.random((experts, clients)) + draw.random((experts, 1))) * flow.STEPS / 2
    slots = draw.integers(0, min(4, experts) + 1, clients)
    bounds = (jnp.full(experts, int(factor * slots.sum() / experts)) for factor in (0.9, 1.2))
    allowed = draw.random(value.shape) > 0.05
    return flow.Problem(jnp.asarray(value, jnp.int32), jnp.asarray(allowed), jnp.asarray(slots), *bounds, part=draw.random(value.shape))


@pytest.fixture
def both(monkeypatch):
    """Prices without kernels and with them."""

    def found(*args, prices=newton.prices):
        with gpu.portable():
            without = prices(*args)
        jax.clear_caches()
        monkeypatch.setattr(gpu, "run", lambda kernel, otherwise, *args: kernel(*args, **KERNELS))
        return [np.float64(whole) + rest for whole, rest in (without, prices(*args))]

    return found


def test_it_leaves_few_clients_too_many_for_small_cohorts():
    for clients in (20, 100, 1000):
        value = jnp.array(family("popular", clients, 64, np.random.default_rng(0)).T * flow.STEPS / 2, jnp.int32)
        between = (jnp.full(64, round(factor * 4 * clients / 64)) for factor in (0.8, 1.25))
        given = flow.Problem(value, jnp.ones(value.shape, bool), jnp.full(clients, 4), *between)
        assert flow.surplus(flow.plan_at(given, *newton.prices(given))) < 16


@pytest.mark.parametrize(("experts", "clients"), [(3, 40), (16, 64), (20, 300), (64, 1000)])
def test_prices_are_those_without_kernels(experts, clients, both):
    given = problem(experts, clients)
    without, found = both(given)
    np.testing.assert_allclose(found, without, atol=CLOSE)
    excess = [flow.surplus(flow.plan_at(given, jnp.int32(price), jnp.zeros(experts))) for price in (found, without)]
    assert excess[0] <= excess[1] + 1 and excess[0] < experts


def test_many_clients_share_programs(both, monkeypatch):
    monkeypatch.setattr(newton_kernels, "_PROGRAMS", 3)
    np.testing.assert_allclose(*both(problem(8, 500)), atol=CLOSE)


def test_several_groups_at_once(both):
    groups = jax.tree.map(lambda *a: jnp.stack(a), *(problem(6, 100, seed) for seed in range(3)))
    np.testing.assert_allclose(*both(groups, prices=jax.vmap(newton.prices)), atol=CLOSE)


@pytest.mark.parametrize("steps", [1, 5])
def test_the_host_may_look_more_often(steps, both, monkeypatch):
    monkeypatch.setattr(newton_kernels, "_STEPS", steps)
    np.testing.assert_allclose(*both(problem(6, 100)), atol=CLOSE)


def test_64_bits_change_nothing(both):
    """What is found is of 32 bits all the same."""
    want = newton.prices(problem(6, 100))
    with jax.enable_x64(True):
        for found in both(problem(6, 100)):
            np.testing.assert_allclose(found, np.float64(want[0]) + want[1], atol=CLOSE)


def test_without_a_solution_prices_stay(both):
    """An expert that has fewer clients the dearer it is: the matrix is not positive definite."""
    given = problem(4, 50)
    falling = given._replace(upper=given.lower - 400)
    for found in both(falling):
        assert not found.any()


def test_a_level_ends_after_its_last_step(both, monkeypatch):
    for module in (newton, newton_kernels):
        monkeypatch.setattr(module, "MOST", 1)
    np.testing.assert_allclose(*both(problem(6, 100)), atol=CLOSE)


def test_nothing_is_lost_between_levels():
    """The next level begins at the sum of this one's integers and rests, and goes on by as much less as its smoothing shrinks."""
    level = Level(jnp.array([7, -3]), jnp.array([0.25, 0.5]), jnp.array([0.5, 0.25]))
    after = next_level(level, jnp.float32(8.0))
    shrink = SMOOTHING[1] / SMOOTHING[0]
    np.testing.assert_allclose(after.whole / 8 + after.last, [7 / 8 + 0.5, -3 / 8 + 0.25])
    np.testing.assert_allclose(after.now - after.last, shrink * np.array([0.25, -0.25]), rtol=1e-6)


def test_it_takes_few_experts():
    assert newton_kernels.takes(jnp.zeros((64, 9), int)) and not newton_kernels.takes(jnp.zeros((65, 9), int))
    assert not newton_kernels.takes(jnp.zeros((3, 0), int))
