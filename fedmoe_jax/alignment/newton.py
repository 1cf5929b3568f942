"""Nearly optimal prices of experts, by Newton's method on the smoothed dual of the transportation problem."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from fedmoe_jax.alignment import flow
from fedmoe_jax.alignment.flow import Problem

_UNITS = 1 << 18  # of an integer to a value of 1
_SHRINK = 10.0**-0.5
_SMOOTHING = tuple(0.1 * _SHRINK**level for level in range(11))  # relative to the range of values
_PARTLY = 8.0  # smoothings: below such a price an expert is not quite full, to within a client in 3,000
_NEWTON_STEPS = 10  # at most, for each smoothing


def prices(problem: Problem, start: Int[Array, " expert"]) -> Int[Array, " expert"]:
    """Nearly optimal prices: those of a problem in which clients waver within `smoothing` of their threshold.

    A client holds sigmoid((value - price - threshold) / smoothing) of an expert, its threshold being such that it fills
    its slots; an expert has lower + (upper - lower) sigmoid(price / smoothing) clients. Newton's method solves for
    prices and thresholds, eliminating the thresholds, while the smoothing shrinks.
    """
    value = jnp.where(problem.allowed, problem.value / problem.steps, -1e3)
    slots, lower, room = (x.astype(jnp.float32) for x in (problem.slots, problem.lower, problem.upper - problem.lower))
    prices = _anneal(value, slots, lower, room, jnp.clip(start / problem.steps, -1.0, 1.0))
    free = (problem.lower < problem.upper) & (jnp.abs(prices) < _PARTLY * _SMOOTHING[-1])
    return jnp.round(jnp.where(free, 0.0, prices) * problem.steps).astype(jnp.int32)


def _anneal(value, slots, lower, room, prices) -> Float[Array, " expert"]:
    """Newton's method for one smoothing after the other, from prices near those of the first."""

    def step(smoothing, state):
        prices, thresholds, _, count = state
        hold = jax.nn.sigmoid((value - prices[:, None] - thresholds) / smoothing)
        full = jax.nn.sigmoid(prices / smoothing)
        row, column = hold.sum(axis=0) - slots, hold.sum(axis=1) - lower - room * full
        slope = hold * (1.0 - hold)
        steepness = slope.sum(axis=0) + 1e-3
        part = slope * lax.rsqrt(steepness)
        diagonal = slope.sum(axis=1) + room * full * (1.0 - full)
        damping = 1e-2 + 1e-3 * diagonal.mean()
        hessian = jnp.diag(diagonal + damping) - jnp.matmul(part, part.T, precision=lax.Precision.HIGHEST)
        solution = jax.scipy.linalg.solve(hessian, column - (slope * (row / steepness)).sum(axis=1), assume_a="pos")
        change = jnp.clip(jnp.nan_to_num(solution), -4.0, 4.0)
        correction = jnp.clip((row - (change[:, None] * slope).sum(axis=0)) / steepness, -6.0, 6.0)
        return prices + smoothing * change, thresholds + smoothing * correction, jnp.abs(column).max(), count + 1

    def unsettled(state):
        _, _, worst, count = state
        return (worst > tolerance) & (count < _NEWTON_STEPS)

    def level(carry, smoothing):
        last, before = carry
        ahead = jax.tree.map(lambda now, then: now + _SHRINK * (now - then), last, before)  # the solution is smooth in the smoothing
        new = lax.while_loop(unsettled, functools.partial(step, smoothing), (*ahead, jnp.inf, 0))[:2]
        return (new, last), None

    tolerance = jnp.maximum(0.01 * slots.sum() / value.shape[0], 0.5)  # clients that an expert may be off
    worth = value - prices[:, None]
    least = flow.least((worth * _UNITS).astype(jnp.int32), slots.astype(jnp.int32)) / _UNITS
    start = prices, jnp.where(slots > 0, least - 0.5 * _SMOOTHING[0], worth.max(axis=0) + _SMOOTHING[0])
    ((prices, _), _), _ = lax.scan(level, (start, start), jnp.array(_SMOOTHING, jnp.float32))
    return prices
