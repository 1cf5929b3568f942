"""Nearly optimal prices of experts, by Newton's method on the smoothed dual of the transportation problem."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from fedmoe_jax.alignment import blocks, elimination, flow
from fedmoe_jax.alignment.flow import Problem

_SHRINK = 10.0**-0.4
_SMOOTHING = tuple(0.02 * _SHRINK**level for level in range(17))  # relative to the range of values
_PARTLY = 8.0  # smoothings: below such a price an expert is not quite full, to within a client in 3,000
_NEWTON_STEPS = 10  # at most, for each smoothing
_OFF = 0.2  # times the undecided clients of an expert by which it may be off, or half a client
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
    lower, room = (x.astype(jnp.float32) for x in (problem.lower, problem.upper - problem.lower))
    worth = (value - whole[0][:, None] - whole[1][:, None] + part) / problem.steps
    base = whole[0] / problem.steps

    def shares(prices, worth, slots, thresholds):
        """What clients hold, how that changes with prices, and what is too much for a client and how that changes."""
        hold = jax.nn.sigmoid((worth - prices[:, None] - thresholds) / smoothing)
        slope = hold * (1.0 - hold)
        return hold, slope, hold.sum(axis=0) - slots, slope.sum(axis=0) + 1e-3

    def sums(prices, *block):
        """Over clients: what is held, how much of that wavers, what rows pull at prices, and how prices pull at each other."""
        hold, slope, row, steepness = shares(prices, *block)
        scaled = slope * lax.rsqrt(steepness)
        between = jnp.matmul(scaled, scaled.T, precision=lax.Precision.HIGHEST)
        return hold.sum(axis=1), slope.sum(axis=1), (slope * (row / steepness)).sum(axis=1), between

    def corrected(prices, change, worth, slots, thresholds):
        """The thresholds that fill slots again after a change of the prices."""
        _, slope, row, steepness = shares(prices, worth, slots, thresholds)
        return thresholds + smoothing * jnp.clip((row - (change[:, None] * slope).sum(axis=0)) / steepness, -6.0, 6.0)

    def step(state):
        prices, thresholds, _, _, count = state
        held, wavering, pull, between = blocks.summed(functools.partial(sums, prices), worth, slots, thresholds)
        full = jax.nn.sigmoid((base + prices) / smoothing)
        column, diagonal = held - lower - room * full, wavering + room * full * (1.0 - full)
        damping = 1e-2 + 1e-3 * diagonal.mean()
        solution = elimination.solve(jnp.diag(diagonal + damping) - between, column - pull)
        change = jnp.clip(jnp.nan_to_num(solution), -4.0, 4.0)
        thresholds = blocks.mapped(functools.partial(corrected, prices, change), worth, slots, thresholds)
        return prices + smoothing * change, thresholds, jnp.abs(column).max(), wavering.sum(), count + 1

    def is_off(state):
        _, _, worst, undecided, _ = state
        return ~(worst <= jnp.maximum(_OFF * undecided / lower.shape[0], 0.5))

    def unsettled(state):
        return is_off(state) & (state[-1] < _NEWTON_STEPS)

    ahead = jax.tree.map(lambda now, before: now + _SHRINK * (now - before), now, before)  # it is smooth in the smoothing
    found = lax.while_loop(unsettled, step, (*ahead, jnp.inf, 0.0, 0))
    new, undecided, settled = found[:2], found[3], ~is_off(found)
    rounded = jax.tree.map(lambda x: jnp.round(x * problem.steps).astype(jnp.int32), new)
    new, now = (jax.tree.map(lambda x, n: x - n / problem.steps, each, rounded) for each in (new, now))
    return (jax.tree.map(jnp.add, whole, rounded), new, now), undecided, settled
