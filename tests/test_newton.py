"""Newton's method in kernels: the same prices as without, for clients and experts that do not fill them, and several groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmoe_jax import gpu
from fedmoe_jax.alignment import flow, newton, newton_kernels
from fedmoe_jax.alignment.newton_step import Bounds

ANYWHERE = dict(interpret=not gpu.has_kernels())


def case(experts, clients, seed=0):
    """Worth, slots, bounds, smoothing, prices and thresholds: some experts are liked more, and some pairs are not allowed."""
    draw = np.random.default_rng(seed)
    worth = draw.random((experts, clients)) + 0.5 * draw.random((experts, 1))
    worth[draw.random(worth.shape) < 0.05] = -64.0
    slots = draw.integers(0, min(4, experts) + 1, clients)
    mean = slots.sum() / experts
    bounds = Bounds(*(jnp.full(experts, x, jnp.float32) for x in (0.0, 0.9 * mean, 0.2 * mean)))
    blocks = tuple(jnp.asarray(a, jnp.float32)[None] for a in (worth, slots))
    return *blocks, bounds, jnp.float32(0.02), jnp.zeros(experts), jnp.full((1, clients), 0.8)


def both(*args, most=10):
    return newton.converged(*args, most=most), newton_kernels.converged(*args, most=most, **ANYWHERE)


@pytest.mark.parametrize(("experts", "clients"), [(3, 40), (16, 64), (20, 300), (64, 1000)])
@pytest.mark.parametrize("most", [1, 10])
def test_prices_are_those_without_kernels(experts, clients, most):
    for one, other in zip(*both(*case(experts, clients), most=most), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=2e-3)


def test_many_clients_share_programs(monkeypatch):
    monkeypatch.setattr(newton_kernels, "_PROGRAMS", 3)
    for one, other in zip(*both(*case(8, 500)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=2e-3)


def test_several_groups_at_once():
    cases = jax.tree.map(lambda *a: jnp.stack(a), *(case(6, 100, seed) for seed in range(3)))
    for one, other in zip(*jax.vmap(both)(*cases), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=2e-3)


def test_without_a_solution_prices_stay():
    """An expert that has fewer clients the dearer it is: the matrix is not positive definite."""
    *blocks, bounds, smoothing, prices, thresholds = case(4, 50)
    falling = bounds._replace(room=jnp.full(4, -400.0))
    for found in both(*blocks, falling, smoothing, prices, thresholds, most=1):
        np.testing.assert_array_equal(found[0], prices)
        assert np.isfinite(found[1]).all()


@pytest.mark.parametrize("experts", [5, 16])
def test_the_prices_of_a_problem_leave_as_few_out_of_place(experts, monkeypatch):
    """Through all smoothings."""
    draw = np.random.default_rng(0)
    value = jnp.asarray((draw.random((experts, 200)) + draw.random((experts, 1))) * flow.STEPS / 2, jnp.int32)
    bounds = (jnp.full(experts, round(factor * 400 / experts)) for factor in (0.9, 1.1))
    problem = flow.Problem(value, jnp.ones(value.shape, bool), jnp.full(200, 2), *bounds)
    without = newton.prices(problem)
    jax.clear_caches()
    monkeypatch.setattr(gpu, "run", lambda kernel, otherwise, *args, **static: kernel(*args, **static, **ANYWHERE))
    found = newton.prices(problem)
    np.testing.assert_allclose(*(np.float64(whole) + rest for whole, rest in (found, without)), atol=4)
    assert flow.surplus(flow.plan_at(problem, *found)) <= flow.surplus(flow.plan_at(problem, *without)) + 1


def test_it_takes_one_block_and_few_experts():
    assert newton_kernels.takes(jnp.zeros((1, 64, 9)))
    assert not newton_kernels.takes(jnp.zeros((1, 65, 9))) and not newton_kernels.takes(jnp.zeros((2, 64, 9)))
