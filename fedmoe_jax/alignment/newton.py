"""Nearly optimal prices of experts, by Newton's method on the smoothed dual of the transportation problem."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from fedmoe_jax.alignment import blocks, flow
from fedmoe_jax.alignment.flow import Problem

_SHRINK = 10.0**-0.4
_SMOOTHING = tuple(0.02 * _SHRINK**level for level in range(17))  # relative to the range of values
_PARTLY = 8.0  # smoothings: below such a price an expert is not quite full, to within a client in 3,000
_NEWTON_STEPS = 10  # at most, for each smoothing
_OFF = 0.4  # times the undecided clients of an expert by which it may be off, or half a client
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
    value, slots = blocks.split(value, number, -flow.FAR), blocks.split(problem.slots.astype(jnp.float32), number)

    def worth(whole):
        """What experts are worth to clients beyond prices and thresholds, in units of the range of values."""
        return (value - whole[0][:, None] - whole[1][:, None] + part) / problem.steps

    def step(state):
        """One of Newton's steps, and where it converged the next smoothing, from where the last two point to."""
        level, tried, whole, beyond, now, before, _ = state
        now, worst, undecided = _step(problem, beyond, slots, whole[0], now, smoothing[level])
        settled = worst <= jnp.maximum(_OFF * undecided / num_experts, 0.5)
        onward = settled | (tried + 1 >= _NEWTON_STEPS)
        rounded = jax.tree.map(lambda x: jnp.round(x * problem.steps).astype(jnp.int32), now)
        now, before = (jax.tree.map(lambda x, n: x - n / problem.steps, each, rounded) for each in (now, before))
        ahead = jax.tree.map(lambda now, before: now + _SHRINK * (now - before), now, before)  # it is smooth in the smoothing
        now, before = (jax.tree.map(functools.partial(jnp.where, onward), new, old) for new, old in ((ahead, now), (now, before)))
        level, tried = level + onward, jnp.where(onward, 0, tried + 1)
        last = onward & ((settled & (undecided <= few)) | (level == len(_SMOOTHING)))
        whole = jax.tree.map(jnp.add, whole, rounded)
        return level, tried, whole, worth(whole), now, before, last

    few = jnp.minimum(_UNDECIDED[0] * num_experts, _UNDECIDED[1] * problem.slots.sum())
    begin = jnp.int32(0), jnp.int32(0), start, worth(start), ahead, ahead, jnp.bool_(False)
    level, _, whole, _, _, rest, _ = lax.while_loop(lambda state: ~state[-1], step, begin)
    free = (problem.lower < problem.upper) & (jnp.abs(whole[0]) < _PARTLY * smoothing[level - 1] * problem.steps)
    return jnp.where(free, 0, whole[0]), jnp.where(free, 0.0, rest[0] * problem.steps)


def _step(problem: Problem, worth, slots, whole, rest, smoothing):
    """Prices and thresholds after a step of Newton's method for one smoothing, and how far off they were before it.

    These are integers, of which `whole` are those of the prices, and what is left beside them, in units of the range of values;
    only the rest changes. Also returns by how many clients the worst expert was off, and how many clients were undecided.
    `worth`, slots and thresholds are in blocks of clients.
    """
    prices, thresholds = rest
    lower, room = (x.astype(jnp.float32) for x in (problem.lower, problem.upper - problem.lower))

    def shares(worth, slots, thresholds):
        """What clients hold, how that changes with prices, and what is too much for a client and how that changes."""
        hold = jax.nn.sigmoid((worth - prices[:, None] - thresholds) / smoothing)
        slope = hold * (1.0 - hold)
        return hold, slope, hold.sum(axis=0) - slots, slope.sum(axis=0) + 1e-3

    def sums(*block):
        """Over clients: what is held, how much of that wavers, what rows pull at prices, and how prices pull at each other."""
        hold, slope, row, steepness = shares(*block)
        scaled = slope * lax.rsqrt(steepness)
        between = jnp.matmul(scaled, scaled.T, precision=lax.Precision.HIGHEST)
        return hold.sum(axis=1), slope.sum(axis=1), (slope * (row / steepness)).sum(axis=1), between

    def corrected(*block):
        """The thresholds that fill slots again after a change of the prices."""
        _, slope, row, steepness = shares(*block)
        return block[-1] + smoothing * jnp.clip((row - (change[:, None] * slope).sum(axis=0)) / steepness, -6.0, 6.0)

    rows = worth, slots, thresholds
    held, wavering, pull, between = blocks.summed(sums, *rows)
    full = jax.nn.sigmoid((whole / problem.steps + prices) / smoothing)
    column, diagonal = held - lower - room * full, wavering + room * full * (1.0 - full)
    damping = 1e-2 + 1e-3 * diagonal.mean()
    solution = jax.scipy.linalg.solve(jnp.diag(diagonal + damping) - between, column - pull, assume_a="pos")
    change = jnp.clip(jnp.nan_to_num(solution), -4.0, 4.0)
    return (prices + smoothing * change, blocks.mapped(corrected, *rows)), jnp.abs(column).max(), wavering.sum()
