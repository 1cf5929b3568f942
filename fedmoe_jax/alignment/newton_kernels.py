"""Newton's method for prices in two kernels a step, on NVIDIA GPUs: else it would be many, and the host would wait after each step.

All is told to the next kernel by arrays that it changes in place, so that the host looks once in some steps whether prices are found.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas
from jaxtyping import Array, Float, Int

from fedmoe_jax import gpu
from fedmoe_jax.alignment import elimination, flow
from fedmoe_jax.alignment.newton_step import MOST, SMOOTHING, Bounds, Level, corrected, excess_worth, is_off, next_level, shares, system

_CLIENTS = 128  # that a program looks at together
_PROGRAMS = 64  # at most: with more, adding their sums takes longer than they save
_STEPS = 8  # after which the host looks whether prices are found


class _Before(NamedTuple):
    """Of the step before: prices, and their change in smoothings."""

    whole: Any
    prices: Any
    change: Any


class _Progress(NamedTuple):
    """Of the level and, in it, the step; whether the step before was the last of its level, and whether that was the last of all."""

    level: Any
    step: Any
    ended: Any
    found: Any


class _State(NamedTuple):
    thresholds: Level
    prices: Level
    before: _Before
    progress: _Progress


def takes(value: Int[Array, "expert client"]) -> bool:
    """Whether `found` takes so many experts and clients."""
    return value.shape[0] <= elimination.MOST and value.size > 0


def found(
    clients: tuple[Int[Array, "expert client"], Float[Array, "expert client"], Float[Array, " client"]],
    thresholds: Level,
    lower: Float[Array, " expert"],
    room: Float[Array, " expert"],
    steps: Float[Array, ""],
    few: Float[Array, ""],
    *,
    interpret: bool = False,
) -> tuple[Int[Array, " expert"], Float[Array, " expert"], Float[Array, ""]]:
    """Prices of clients by value, its part and slots, until `few` are undecided. `interpret` runs it anywhere, slowly.

    Returns:
      The prices rounded to integers, what they are more than these in ranges of values, and the last smoothing.
    """
    (experts, number), padded = clients[0].shape, max(1 << (clients[0].shape[0] - 1).bit_length(), 16)
    parts = -(-number // _CLIENTS)
    programs = -(-parts // -(-parts // _PROGRAMS))
    more, others = padded - experts, -(-parts // programs) * programs * _CLIENTS - number
    value, part, slots = clients
    value = jnp.pad(value, ((0, more), (0, others)), constant_values=-flow.FAR)
    clients = value, jnp.pad(part, ((0, more), (0, others))), jnp.pad(slots, (0, others))
    thresholds = Level(*(jnp.pad(x, (0, others)) for x in thresholds))
    bounds = jnp.pad(lower, (0, more)), jnp.pad(room, (0, more))
    scale, levels = jnp.stack([steps, few]), jnp.array(SMOOTHING, jnp.float32)

    def step(_, state):
        state, sums = _summed(clients, state, levels, scale, programs, interpret)
        return _solved(sums, bounds, state, levels, scale, experts, interpret)

    whole, nothing, none = jnp.zeros(padded, jnp.int32), jnp.zeros(padded, jnp.float32), jnp.zeros(1, jnp.int32)
    prices, before = Level(whole, nothing, nothing), _Before(whole, nothing, nothing)
    begin = _State(thresholds, prices, before, _Progress(none, none, none, none))
    state = lax.while_loop(
        lambda state: state.progress.found[0] == 0, lambda state: lax.fori_loop(0, _STEPS, step, state, unroll=True), begin
    )
    return state.prices.whole[:experts], state.prices.last[:experts], levels[state.progress.level[0]]


def _summed(clients, state, levels, scale, programs, interpret):
    """The state with thresholds corrected after the last change of prices, and sums of each program over its clients: what is held, how
    much of that wavers, what rows pull at prices, and how prices pull at each other."""
    experts, number = clients[0].shape
    each = number // (programs * _CLIENTS)

    def newton_sums(clients, state, levels, scale, new, held, wavering, pull, between):
        (value, part, slots), (thresholds, prices, before, progress) = clients, state
        program, steps, width = pallas.program_id(0), scale[0], levels[progress.level[0]]
        begun, ended = progress.level[0] + progress.step[0] > 0, progress.ended[0]
        width_before = levels[progress.level[0] - ended]
        precision = lax.Precision.HIGHEST if interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3  # alike, but quicker

        def add(block, total):
            own = pallas.ds((program * each + block) * _CLIENTS, _CLIENTS)
            of_pairs, of_clients = (value[:, own], part[:, own]), slots[own]
            level = Level(*(x[own] for x in thresholds))
            worth = excess_worth(*of_pairs, before.whole[...], level.whole, steps)
            right = corrected(before.prices[...], before.change[...], width_before, worth, of_clients, level.now)
            level = level._replace(now=jnp.where(begun, right, level.now))
            level = Level(*(jnp.where(ended > 0, x, y) for x, y in zip(next_level(level, steps), level, strict=True)))
            for out, x in zip(new, level, strict=True):
                out[own] = x
            worth = excess_worth(*of_pairs, prices.whole[...], level.whole, steps)
            hold, slope, row, steepness = shares(prices.now[...], width, worth, of_clients, level.now)
            scaled = slope * lax.rsqrt(steepness)[None, :]
            product = lax.dot_general(scaled, scaled, (((1,), (1,)), ((), ())), precision=precision)
            sums = hold.sum(1), slope.sum(1), (slope * (row / steepness)[None, :]).sum(1), product
            return tuple(a + b for a, b in zip(total, sums, strict=True))

        @pallas.when(progress.found[0] == 0)
        def _():
            for out, total in zip((held, wavering, pull, between), lax.fori_loop(0, each, add, _nothing(experts)), strict=True):
                out[program] = total

    shapes = [(programs, experts)] * 3 + [(programs, experts, experts)]
    sums = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    outs = _like(state.thresholds), *sums
    call = gpu.call(newton_sums, outs, warps=8, interpret=interpret, grid=(programs,), input_output_aliases={3 + i: i for i in range(3)})
    thresholds, *sums = call(clients, state, levels, scale)
    return state._replace(thresholds=thresholds), sums


def _solved(sums, bounds, state, levels, scale, number, interpret):
    """The state with prices that `number` experts have next. All numbers are finite: a GPU does not tell the largest of others."""
    programs, experts = sums[0].shape

    def newton_solve(sums, bounds, state, levels, scale, *new):
        prices, _, progress = state
        at, done, is_found = progress.level[0], progress.step[0], progress.found[0]
        steps, few, width = scale[0], scale[1], levels[at]
        level = Level(*(x[...] for x in prices))  # all of the state is read before the sums: their barriers keep it from what is written

        def add(program, total):
            return tuple(a + part[program] for a, part in zip(total, sums, strict=True))

        @pallas.when(is_found == 0)
        def _():
            held, wavering, pull, between = lax.fori_loop(0, programs, add, _nothing(experts))
            of_experts = Bounds(level.whole / steps, *(x[...] for x in bounds))
            matrix, column = system(of_experts, level.now, width, held, wavering, between, number)
            change = elimination.swept(matrix, column - pull)
            change = jnp.clip(jnp.where(change == change, change, 0.0), -4.0, 4.0)  # 0 where there is no solution
            worst, undecided, step = jnp.abs(column).max(), wavering.sum(), done + 1
            settled = ~is_off(worst, undecided, number)
            ended = settled | (step >= MOST)
            last = ended & ((settled & (undecided <= few)) | (at + 1 >= len(SMOOTHING)))
            moved = level._replace(now=level.now + width * change)
            begin = (jnp.where(ended, x, y) for x, y in zip(next_level(moved, steps), moved, strict=True))
            counts = at + (ended & ~last).astype(jnp.int32), jnp.where(ended, 0, step), ended, last
            for out, x in zip(jax.tree.leaves(new), (*begin, level.whole, level.now, change, *counts), strict=True):
                out[...] = jnp.broadcast_to(x, out.shape).astype(out.dtype)

    changed = state[1:]
    aliases = {len(sums) + len(bounds) + i: i for i in range(len(jax.tree.leaves(changed)))}
    call = gpu.call(newton_solve, _like(changed), warps=4, interpret=interpret, input_output_aliases=aliases)
    return _State(state.thresholds, *call(sums, bounds, changed, levels, scale))


def _nothing(experts):
    none = jnp.zeros(experts, jnp.float32)
    return none, none, none, jnp.zeros((experts, experts), jnp.float32)


def _like(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
