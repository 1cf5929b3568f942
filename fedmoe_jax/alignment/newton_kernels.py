"""Newton's method for prices in two kernels a step, on NVIDIA GPUs, where it would be many small ones."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas
from jaxtyping import Array, Float

from fedmoe_jax import gpu
from fedmoe_jax.alignment import elimination
from fedmoe_jax.alignment.newton_step import Bounds, corrected, is_off, shares, system

_CLIENTS = 64  # that a program looks at together
_PROGRAMS = 128  # at most: about as many as a GPU has processors
_NEVER = -1e6  # what is worth so little is not held


def takes(worth: Float[Array, "block expert client"]) -> bool:
    """Whether `converged` takes so many experts, and clients in one block."""
    return worth.shape[0] == 1 and worth.shape[1] <= elimination.MOST and worth.size > 0


def converged(
    worth: Float[Array, "block expert client"],
    slots: Float[Array, "block client"],
    bounds: Bounds,
    smoothing: Float[Array, ""],
    prices: Float[Array, " expert"],
    thresholds: Float[Array, "block client"],
    *,
    most: int,
    interpret: bool = False,
) -> tuple[Float[Array, " expert"], Float[Array, "block client"], Float[Array, ""], Float[Array, ""]]:
    """As `newton.converged`. A step's thresholds are corrected at the beginning of the next one, and after the last.

    `interpret` runs it anywhere, slowly.
    """
    (_, experts, clients), padded = worth.shape, max(1 << (worth.shape[1] - 1).bit_length(), 16)
    parts = -(-clients // _CLIENTS)
    each = -(-parts // _PROGRAMS)
    programs = -(-parts // each)
    more, others = padded - experts, programs * each * _CLIENTS - clients
    worth = jnp.pad(worth[0], ((0, more), (0, others)), constant_values=_NEVER)
    slots, start = (jnp.pad(a[0], (0, others)) for a in (slots, thresholds))
    bounds, prices = jax.tree.map(lambda a: jnp.pad(a, (0, more)), (bounds, prices))

    def summed(prices, change, thresholds, told):
        return _summed((worth, slots, thresholds), (prices, change), smoothing[None], told, programs, interpret)

    def step(state):
        prices, change, _, told = state
        thresholds, *sums = summed(*state)
        prices, change, told = _solved(sums, bounds, (prices, change), smoothing[None], told, experts, interpret)
        return prices, change, thresholds, told

    def unsettled(state):
        worst, undecided, count = state[-1]
        return is_off(worst, undecided, experts) & (count < most)

    begin = prices, jnp.zeros(padded, jnp.float32), start, jnp.array([jnp.inf, 0.0, 0.0], jnp.float32)
    found = lax.while_loop(unsettled, step, begin)
    prices, change, _, told = found
    return (prices + smoothing * change)[:experts], summed(*found)[0][None, :clients], told[0], told[1]


def _summed(clients, prices, smoothing, told, programs, interpret):
    """Thresholds of clients, corrected after the last change of prices if there was a step before, and sums of each program over its
    clients after it: what is held, how much of that wavers, what rows pull at prices, and how prices pull at each other."""
    experts, number = clients[0].shape
    each = number // (programs * _CLIENTS)

    def newton_sums(worth, slots, thresholds, prices, change, smoothing, told, new, *outs):
        program, width = pallas.program_id(0), smoothing[0]
        before, moved = prices[...], change[...]
        now = before + width * moved

        def add(part, total):
            own = pallas.ds((program * each + part) * _CLIENTS, _CLIENTS)
            given, old = (worth[:, own], slots[own]), thresholds[own]
            threshold = jnp.where(told[2] > 0, corrected(before, moved, width, *given, old), old)
            new[own] = threshold
            hold, slope, row, steepness = shares(now, width, *given, threshold)
            scaled = slope * lax.rsqrt(steepness)[None, :]
            between = lax.dot_general(scaled, scaled, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST)
            sums = hold.sum(1), slope.sum(1), (slope * (row / steepness)[None, :]).sum(1), between
            return tuple(a + b for a, b in zip(total, sums, strict=True))

        for out, total in zip(outs, lax.fori_loop(0, each, add, _nothing(experts)), strict=True):
            out[program] = total

    shapes = [(number,), *[(programs, experts)] * 3, (programs, experts, experts)]
    outs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return gpu.call(newton_sums, outs, warps=8, interpret=interpret, grid=(programs,))(*clients, *prices, smoothing, told)


def _solved(sums, bounds, prices, smoothing, told, number, interpret):
    """Prices after their last change, the next one in smoothings, and as floats by how many clients the worst of `number` experts is off,
    how many are undecided, and the number of the step. All numbers are finite: a GPU does not tell the largest of others."""
    programs, experts = sums[0].shape

    def newton_solve(held, wavering, pull, between, base, lower, room, prices, change, smoothing, told, now, next_change, tell):
        def add(program, total):
            return tuple(a + part[program] for a, part in zip(total, (held, wavering, pull, between), strict=True))

        total = lax.fori_loop(0, programs, add, _nothing(experts))
        price = prices[...] + smoothing[0] * change[...]
        equations = system(Bounds(base[...], lower[...], room[...]), price, smoothing[0], total[0], total[1], total[3], number)
        found = elimination.reduced(equations[0], equations[1] - total[2])
        now[...] = price
        next_change[...] = jnp.clip(jnp.where(found == found, found, 0.0), -4.0, 4.0)  # 0 where there is no solution
        tell[0], tell[1], tell[2] = jnp.abs(equations[1]).max(), total[1].sum(), told[2] + 1

    outs = [jax.ShapeDtypeStruct((size,), jnp.float32) for size in (experts, experts, 3)]
    return gpu.call(newton_solve, outs, warps=8, interpret=interpret)(*sums, *bounds, *prices, smoothing, told)


def _nothing(experts):
    none = jnp.zeros(experts, jnp.float32)
    return none, none, none, jnp.zeros((experts, experts), jnp.float32)
