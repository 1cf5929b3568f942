"""Nearly optimal prices of experts, by Newton's method on the smoothed dual of the transportation problem."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from fedmoe_jax import gpu
from fedmoe_jax.alignment import blocks, elimination, flow, newton_kernels
from fedmoe_jax.alignment.flow import Problem
from fedmoe_jax.alignment.newton_step import MOST, SMOOTHING, Bounds, Level, corrected, excess_worth, is_off, next_level, shares, system

_PARTLY = 8.0  # smoothings: below such a price an expert is not quite full, to within a client in 3,000
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
    value = jnp.where(problem.allowed, problem.value, -flow.FAR)
    least = jnp.where(problem.slots > 0, flow.least(value, problem.slots), value.max(axis=0))
    begin = jnp.where(problem.slots > 0, -0.5, 1.0).astype(jnp.float32) * SMOOTHING[0]
    thresholds = Level(jnp.maximum(least, -4 * problem.steps), begin, begin)  # nothing is allowed: as good as never
    few = jnp.minimum(_UNDECIDED[0] * value.shape[0], _UNDECIDED[1] * problem.slots.sum()).astype(jnp.float32)
    part = jnp.broadcast_to(jnp.asarray(problem.part, jnp.float32), value.shape)
    lower, room = (x.astype(jnp.float32) for x in (problem.lower, problem.upper - problem.lower))
    steps = jnp.asarray(problem.steps, jnp.float32)
    given = (value, part, problem.slots.astype(jnp.float32)), thresholds, lower, room, steps, few
    found = gpu.run(newton_kernels.found, _found, *given) if newton_kernels.takes(value) else _found(*given)
    whole, rest, smoothing = found
    free = (problem.lower < problem.upper) & (jnp.abs(whole) < _PARTLY * smoothing * problem.steps)
    return jnp.where(free, 0, whole), jnp.where(free, 0.0, rest * problem.steps)


def _found(clients, thresholds, lower, room, steps, few):
    """Prices, rounded and what is left, and the last smoothing: of clients by value, its part and slots, until `few` are undecided."""
    num_experts, num_clients = clients[0].shape
    number = blocks.count(num_experts, num_clients)
    clients = tuple(blocks.split(rows, number, fill) for rows, fill in zip(clients, (-flow.FAR, 0, 0), strict=True))
    thresholds = Level(*(blocks.split(x, number) for x in thresholds))

    def level(state):
        number, prices, thresholds, *_ = state
        return number + 1, *_level(clients, (lower, room), (prices, thresholds), smoothing[number], steps)

    def unfinished(state):
        number, *_, undecided, settled = state
        return (number < len(SMOOTHING)) & ~(settled & (undecided <= few))

    smoothing, nothing = jnp.array(SMOOTHING, jnp.float32), jnp.zeros(num_experts, jnp.float32)
    begin = 0, Level(nothing.astype(jnp.int32), nothing, nothing), thresholds, jnp.float32(jnp.inf), jnp.bool_(False)
    last, prices, *_ = lax.while_loop(unfinished, level, begin)
    return prices.whole, prices.last, smoothing[last - 1]


def _level(clients, bounds, levels, smoothing, steps):
    """Newton's method for one smoothing, and where prices and thresholds of the next one begin. In blocks of clients.

    Also returns how many clients are undecided, and whether it has converged, both as of before the last step.
    """
    (value, part, slots), (prices, thresholds) = clients, levels
    worth = jax.vmap(excess_worth, (0, 0, None, 0, None))(value, part, prices.whole, thresholds.whole, steps)
    bounds = Bounds(prices.whole / steps, *bounds)
    *new, worst, undecided = converged(worth, slots, bounds, smoothing, prices.now, thresholds.now)
    begin = (next_level(level._replace(now=now), steps) for level, now in zip(levels, new, strict=True))
    return *begin, undecided, ~is_off(worst, undecided, value.shape[1])


def converged(
    worth: Float[Array, "block expert client"],
    slots: Float[Array, "block client"],
    bounds: Bounds,
    smoothing: Float[Array, ""],
    prices: Float[Array, " expert"],
    thresholds: Float[Array, "block client"],
) -> tuple[Float[Array, " expert"], Float[Array, "block client"], Float[Array, ""], Float[Array, ""]]:
    """Newton's method for one smoothing.

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
        return is_off(worst, undecided, num_experts) & (count < MOST)

    return lax.while_loop(unsettled, step, (prices, thresholds, jnp.float32(jnp.inf), jnp.float32(0), 0))[:-1]
