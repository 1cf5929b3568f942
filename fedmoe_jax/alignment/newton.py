"""Nearly optimal prices of experts, by Newton's method on the smoothed dual of the transportation problem."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from fedmoe_jax.alignment import flow
from fedmoe_jax.alignment.flow import Problem

_SHRINK = 10.0**-0.5
_SMOOTHING = tuple(0.1 * _SHRINK**level for level in range(1, 15))  # relative to the range of values
_PARTLY = 8.0  # smoothings: below such a price an expert is not quite full, to within a client in 3,000
_NEWTON_STEPS = 10  # at most, for each smoothing
_OFF = 0.1  # times the undecided clients of an expert by which it may be off, or half a client
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
    value = jnp.where(problem.allowed, problem.value, -flow.FAR)
    start = jnp.zeros(value.shape[0], jnp.int32)
    least = jnp.where(problem.slots > 0, flow.least(value, problem.slots), value.max(axis=0))
    thresholds = jnp.maximum(least, -4 * problem.steps)  # nothing is allowed: as good as never
    ahead = jnp.zeros(start.shape), jnp.where(problem.slots > 0, -0.5, 1.0) * smoothing[0]

    def level(state):
        number, carry, *_ = state
        return number + 1, *_level(problem, value, carry, smoothing[number])

    def unfinished(state):
        number, _, undecided, settled = state
        return (number < len(_SMOOTHING)) & ~(settled & (undecided <= few))

    few = jnp.minimum(_UNDECIDED[0] * value.shape[0], _UNDECIDED[1] * problem.slots.sum())
    begin = 0, ((start, thresholds), ahead, ahead), jnp.inf, jnp.bool_(False)
    last, (whole, rest, _), *_ = lax.while_loop(unfinished, level, begin)
    free = (problem.lower < problem.upper) & (jnp.abs(whole[0]) < _PARTLY * smoothing[last - 1] * problem.steps)
    return jnp.where(free, 0, whole[0]), jnp.where(free, 0.0, rest[0] * problem.steps)


def _level(problem: Problem, value: Int[Array, "expert client"], carry, smoothing):
    """Newton's method for one smoothing, from where the last two point to.

    The carry holds prices and thresholds: integer parts, and what is left beside them, in units of the range of values,
    after the last smoothing and after the one before it. Also returns how many clients are undecided, and whether it has converged,
    both as of before the last step.
    """
    whole, now, before = carry
    slots, lower, room = (x.astype(jnp.float32) for x in (problem.slots, problem.lower, problem.upper - problem.lower))
    worth, base = (value - whole[0][:, None] - whole[1] + problem.part) / problem.steps, whole[0] / problem.steps

    def step(state):
        prices, thresholds, _, _, count = state
        hold = jax.nn.sigmoid((worth - prices[:, None] - thresholds) / smoothing)
        full = jax.nn.sigmoid((base + prices) / smoothing)
        row, column = hold.sum(axis=0) - slots, hold.sum(axis=1) - lower - room * full
        slope = hold * (1.0 - hold)
        steepness = slope.sum(axis=0) + 1e-3
        scaled = slope * lax.rsqrt(steepness)
        diagonal = slope.sum(axis=1) + room * full * (1.0 - full)
        damping = 1e-2 + 1e-3 * diagonal.mean()
        hessian = jnp.diag(diagonal + damping) - jnp.matmul(scaled, scaled.T, precision=lax.Precision.HIGHEST)
        solution = jax.scipy.linalg.solve(hessian, column - (slope * (row / steepness)).sum(axis=1), assume_a="pos")
        change = jnp.clip(jnp.nan_to_num(solution), -4.0, 4.0)
        correction = jnp.clip((row - (change[:, None] * slope).sum(axis=0)) / steepness, -6.0, 6.0)
        return prices + smoothing * change, thresholds + smoothing * correction, jnp.abs(column).max(), slope.sum(), count + 1

    def is_off(state):
        _, _, worst, undecided, _ = state
        return ~(worst <= jnp.maximum(_OFF * undecided / value.shape[0], 0.5))

    def unsettled(state):
        return is_off(state) & (state[-1] < _NEWTON_STEPS)

    ahead = jax.tree.map(lambda now, before: now + _SHRINK * (now - before), now, before)  # it is smooth in the smoothing
    found = lax.while_loop(unsettled, step, (*ahead, jnp.inf, 0.0, 0))
    new, undecided, settled = found[:2], found[3], ~is_off(found)
    rounded = jax.tree.map(lambda x: jnp.round(x * problem.steps).astype(jnp.int32), new)
    new, now = (jax.tree.map(lambda x, n: x - n / problem.steps, part, rounded) for part in (new, now))
    return (jax.tree.map(jnp.add, whole, rounded), new, now), undecided, settled
