"""What a step of Newton's method for prices is made of: what clients hold, and the equations for a change of prices."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

_OFF = 0.2  # times the undecided clients of an expert by which it may be off, or half a client


class Bounds(NamedTuple):
    """An expert has lower + room * sigmoid((base + price) / smoothing) clients."""

    base: Float[Array, " expert"]
    lower: Float[Array, " expert"]
    room: Float[Array, " expert"]


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
