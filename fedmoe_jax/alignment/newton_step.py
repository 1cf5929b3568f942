"""What a step of Newton's method for prices is made of: what clients hold, and the equations for a change of prices."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

_SHRINK = 10.0**-0.4
_OFF = 0.2  # times the undecided clients of an expert by which it may be off, or half a client

SMOOTHING = tuple(0.02 * _SHRINK**level for level in range(17))
"""How far below their threshold clients waver, level by level, relative to the range of values."""

MOST = 10
"""Steps of a level."""


class Level(NamedTuple):
    """Prices, or thresholds, of a level of smoothing, which floats alone do not hold to within a step: `whole` are in steps of a value.

    `last` and `now` are what is left beside these, in ranges of values: at the end of the level before, and now.
    """

    whole: Int[Array, " n"]
    last: Float[Array, " n"]
    now: Float[Array, " n"]


class Bounds(NamedTuple):
    """An expert has lower + room * sigmoid((base + price) / smoothing) clients."""

    base: Float[Array, " expert"]
    lower: Float[Array, " expert"]
    room: Float[Array, " expert"]


def next_level(level: Level, steps: Float[Array, ""]) -> Level:
    """Where the next level begins: where this one and the one before point to, as all is smooth in the smoothing."""
    rounded = jnp.floor(level.now * steps + 0.5).astype(jnp.int32)
    last, now = (rest - rounded / steps for rest in (level.last, level.now))
    return Level(level.whole + rounded, now, now + _SHRINK * (now - last))


def excess_worth(
    value: Int[Array, "expert client"],
    part: Float[Array, "expert client"],
    prices: Int[Array, " expert"],
    thresholds: Int[Array, " client"],
    steps: Float[Array, ""],
) -> Float[Array, "expert client"]:
    """By how many ranges a value, of integer and `part`, is above price and threshold: exact before it is rounded."""
    return (value - prices[:, None] - thresholds[None, :] + part) / steps


def shares(
    prices: Float[Array, " expert"],
    smoothing: Float[Array, ""],
    worth: Float[Array, "expert client"],
    slots: Float[Array, " client"],
    thresholds: Float[Array, " client"],
) -> tuple[Float[Array, "expert client"], Float[Array, "expert client"], Float[Array, " client"], Float[Array, " client"]]:
    """What clients hold, how that changes with prices, and what is too much for a client and how that changes."""
    hold = jax.nn.sigmoid((worth - prices[:, None] - thresholds[None, :]) / smoothing)
    slope = hold * (1.0 - hold)
    return hold, slope, hold.sum(axis=0) - slots, slope.sum(axis=0) + 1e-3


def corrected(
    prices: Float[Array, " expert"],
    change: Float[Array, " expert"],
    smoothing: Float[Array, ""],
    worth: Float[Array, "expert client"],
    slots: Float[Array, " client"],
    thresholds: Float[Array, " client"],
) -> Float[Array, " client"]:
    """The thresholds that fill slots again after prices changed by so many smoothings."""
    _, slope, row, steepness = shares(prices, smoothing, worth, slots, thresholds)
    return thresholds + smoothing * jnp.clip((row - (change[:, None] * slope).sum(axis=0)) / steepness, -6.0, 6.0)


def system(
    bounds: Bounds,
    prices: Float[Array, " expert"],
    smoothing: Float[Array, ""],
    held: Float[Array, " expert"],
    wavering: Float[Array, " expert"],
    between: Float[Array, "expert expert"],
    number: int,
) -> tuple[Float[Array, "expert expert"], Float[Array, " expert"]]:
    """The matrix of the changes of prices, and by how many clients each expert is off. There are `number`; what is beyond is padding."""
    full = jax.nn.sigmoid((bounds.base + prices) / smoothing)
    column, diagonal = held - bounds.lower - bounds.room * full, wavering + bounds.room * full * (1.0 - full)
    damping = 1e-2 + 1e-3 * diagonal.sum() / number
    row, of = (lax.broadcasted_iota(jnp.int32, between.shape, axis) for axis in (0, 1))
    return jnp.where(row == of, (diagonal + damping)[:, None], 0.0) - between, column


def is_off(worst: Float[Array, ""], undecided: Float[Array, ""], num_experts: int) -> Bool[Array, ""]:
    """Whether the expert that is off by the most is so by too much, of so many undecided clients of all."""
    return ~(worst <= jnp.maximum(_OFF * undecided / num_experts, 0.5))
