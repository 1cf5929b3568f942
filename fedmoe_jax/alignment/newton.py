"""Nearly optimal prices of experts, by Newton's method on the smoothed dual of the transportation problem."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from fedmoe_jax import gpu
from fedmoe_jax.alignment import blocks, elimination, flow, newton_kernels
from fedmoe_jax.alignment.flow import Problem
from fedmoe_jax.alignment.newton_step import Bounds, corrected, is_off, shares, system

_SHRINK = 10.0**-0.4
_SMOOTHING = tuple(0.02 * _SHRINK**level for level in range(17))  # relative to the range of values
_PARTLY = 8.0  # smoothings: below such a price an expert is not quite full, to within a client in 3,000
_NEWTON_STEPS = 10  # at most, for each smoothing
_UNDECIDED = 0.3, 0.02  # with fewer clients of an expert, as a sum of hold (1 - hold), and fewer of all slots it is told who gets what


def prices(problem: Problem) -> tuple[Int[Array, " expert"], Float[Array, " expert"]]:
    """Nearly optimal prices: those of a problem in which clients waver within `smoothing` of their threshold.

    A client holds sigmoid((value - price - threshold) / smoothing) of an expert, its threshold being such that it fills
    its slots; an expert has lower + (upper - lower) sigmoid(price / smoothing) clients. Newton's method solves for
    prices and thresholds, eliminating the thresholds, while the smoothing shrinks until few clients waver. Floats hold
    only what is left beside integers, so that the last smoothings are not lost in rounding.

    Returns:
      The prices rounded to integers, and what they are more than these.
    """
    smoothing = jnp.array(_SMOOTHING, jnp.float32)
    num_experts, num_clients = problem.value.shape
    value = jnp.where(problem.allowed, problem.value, -flow.FAR)
    least = jnp.where(problem.slots > 0, flow.least(value, problem.slots), value.max(axis=0))
    thresholds = jnp.maximum(least, -4 * problem.steps)  # nothing is allowed: as good as never
    number = blocks.count(num_experts, num_clients)
    start = jnp.zeros(num_experts, jnp.int32), blocks.split(thresholds, number)
    ahead = jnp.zeros(num_experts), blocks.split(jnp.where(problem.slots > 0, -0.5, 1.0), number) * smoothing[0]
    part = blocks.split(jnp.broadcast_to(problem.part, value.shape), number)
    clients = blocks.split(value, number, -flow.FAR), part, blocks.split(problem.slots.astype(jnp.float32), number)

    def level(state):
        number, carry, *_ = state
        return number + 1, *_level(problem, clients, carry, smoothing[number])

    def unfinished(state):
        number, _, undecided, settled = state
        return (number < len(_SMOOTHING)) & ~(settled & (undecided <= few))

    few = jnp.minimum(_UNDECIDED[0] * num_experts, _UNDECIDED[1] * problem.slots.sum())
    begin = 0, (start, ahead, ahead), jnp.inf, jnp.bool_(False)
    last, (whole, rest, _), *_ = lax.while_loop(unfinished, level, begin)
    free = (problem.lower < problem.upper) & (jnp.abs(whole[0]) < _PARTLY * smoothing[last - 1] * problem.steps)
    return jnp.where(free, 0, whole[0]), jnp.where(free, 0.0, rest[0] * problem.steps)


def _level(problem: Problem, clients, carry, smoothing):
    """Newton's method for one smoothing, from where the last two point to.

    The carry holds prices and thresholds: integer parts, and what is left beside them, in units of the range of values,
    after the last smoothing and after the one before it. Also returns how many clients are undecided, and whether it has converged,
    both as of before the last step. Values and their parts, slots and thresholds are in blocks of clients.
    """
    whole, now, before = carry
    value, part, slots = clients
    worth = (value - whole[0][:, None] - whole[1][:, None] + part) / problem.steps
    bounds = Bounds(whole[0] / problem.steps, *(x.astype(jnp.float32) for x in (problem.lower, problem.upper - problem.lower)))
    ahead = jax.tree.map(lambda now, before: now + _SHRINK * (now - before), now, before)  # it is smooth in the smoothing
    given = worth, slots, bounds, smoothing, *ahead
    if newton_kernels.takes(worth):
        *new, worst, undecided = gpu.run(newton_kernels.converged, converged, *given, most=_NEWTON_STEPS)
    else:
        *new, worst, undecided = converged(*given, most=_NEWTON_STEPS)
    new = tuple(new)
    rounded = jax.tree.map(lambda x: jnp.round(x * problem.steps).astype(jnp.int32), new)
    new, now = (jax.tree.map(lambda x, n: x - n / problem.steps, each, rounded) for each in (new, now))
    return (jax.tree.map(jnp.add, whole, rounded), new, now), undecided, ~is_off(worst, undecided, worth.shape[1])


def converged(
    worth: Float[Array, "block expert client"],
    slots: Float[Array, "block client"],
    bounds: Bounds,
    smoothing: Float[Array, ""],
    prices: Float[Array, " expert"],
    thresholds: Float[Array, "block client"],
    *,
    most: int,
) -> tuple[Float[Array, " expert"], Float[Array, "block client"], Float[Array, ""], Float[Array, ""]]:
    """Newton's method for one smoothing: `most` steps at most.

    Returns:
      Prices and thresholds; by how many clients the worst expert was off before the last step, and how many were undecided then.
    """
    num_experts = worth.shape[1]

    def sums(prices, *block):
        """Over clients: what is held, how much of that wavers, what rows pull at prices, and how prices pull at each other."""
        hold, slope, row, steepness = shares(prices, smoothing, *block)
        scaled = slope * lax.rsqrt(steepness)
        between = jnp.matmul(scaled, scaled.T, precision=lax.Precision.HIGHEST)
        return hold.sum(axis=1), slope.sum(axis=1), (slope * (row / steepness)).sum(axis=1), between

    def step(state):
        prices, thresholds, _, _, count = state
        held, wavering, pull, between = blocks.summed(functools.partial(sums, prices), worth, slots, thresholds)
        matrix, column = system(bounds, prices, smoothing, held, wavering, between, num_experts)
        change = jnp.clip(jnp.nan_to_num(elimination.factorised(matrix, column - pull)), -4.0, 4.0)
        thresholds = blocks.mapped(functools.partial(corrected, prices, change, smoothing), worth, slots, thresholds)
        return prices + smoothing * change, thresholds, jnp.abs(column).max(), wavering.sum(), count + 1

    def unsettled(state):
        *_, worst, undecided, count = state
        return is_off(worst, undecided, num_experts) & (count < most)

    return lax.while_loop(unsettled, step, (prices, thresholds, jnp.array(jnp.inf), jnp.zeros(()), 0))[:-1]
