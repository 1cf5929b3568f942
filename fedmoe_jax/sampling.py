"""Keyed permutations, evaluated only where they are asked: who is in the cohort, which examples are in a batch."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import BlockSpec
from jaxtyping import Array, Bool, Int, Key, UInt

from fedmoe_jax import gpu
from fedmoe_jax.base import stage_key

_ROUNDS = 6  # with two more numbers a power of two, as kernels want it
_LEAST, _MOST = 16, 128  # values of a kernel's block
_STEPS = 4  # of a walk between two looks whether all have arrived, for which a GPU's host waits where there is no kernel
_MIN_HALF_BITS = 3  # below this a Feistel network of six rounds reaches few permutations


def permutation(key: Key[Array, ""], position: Int[Array, "*shape"], size: Int[Array, ""] | int) -> Int[Array, "*shape"]:
    """Where a random permutation of 0..size-1 sends each position, without forming the permutation.

    A balanced Feistel network over the next power of four, walked until it lands below `size` [1]. Costs nothing per
    element of the permutation, so 20 clients of a million cost some 20 walks, of five evaluations or a few times as many.

    Args:
      key: names the permutation.
      position: 0 to size - 1; larger ones wrap around.
      size: at least 1 (0 is taken as 1) and below 2**30; may be traced.

    References:
      [1] Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002.
    """
    if position.size == 0:
        return position.astype(jnp.int32)
    size = jnp.maximum(jnp.asarray(size, jnp.uint32), 1)
    bits = 32 - jax.lax.clz(jnp.maximum(size - 1, 1))
    half = jnp.maximum((bits + 1) // 2, _MIN_HALF_BITS).astype(jnp.uint32)
    round_keys = jax.random.bits(key, (_ROUNDS,), jnp.uint32)
    given = position.astype(jnp.uint32) % size, size, half, round_keys
    return gpu.run(walked_in_a_kernel, walked, *given).astype(jnp.int32)


@functools.partial(jax.jit, inline=True)  # else outside of jit each call would compile its loop
def walked(value: UInt[Array, "*shape"], size: UInt[Array, ""], half: UInt[Array, ""], round_keys: Any) -> UInt[Array, "*shape"]:
    """Where `permutation` sends each value: enciphered until it is below `size`."""

    def walk(value):
        for _ in range(_STEPS):
            value = jnp.where(value >= size, _cipher(value, half, round_keys), value)
        return value

    def some(value):
        return jnp.max((value >= size).astype(jnp.int32)) > 0  # a kernel has no any()

    return jax.lax.while_loop(some, walk, walk(_cipher(value, half, round_keys)))


def walked_in_a_kernel(
    value: UInt[Array, "*shape"],
    size: UInt[Array, ""],
    half: UInt[Array, ""],
    round_keys: UInt[Array, " round"],
    *,
    interpret: bool = False,
) -> UInt[Array, "*shape"]:
    """As `walked`, in one kernel of a GPU, whose host does not wait for it. `interpret` runs it anywhere, slowly."""
    count, block = value.size, min(_MOST, max(_LEAST, 1 << (value.size - 1).bit_length()))
    padded = jnp.pad(value.ravel(), (0, -count % block)).reshape(-1, block)
    given = jnp.concatenate([jnp.stack([size, half]), round_keys])

    def kernel(values, given, out):
        out[...] = walked(values[...], given[0], given[1], [given[2 + number] for number in range(_ROUNDS)])

    rows = BlockSpec((None, block), lambda row: (row, 0))
    result, in_specs = jax.ShapeDtypeStruct(padded.shape, jnp.uint32), [rows, BlockSpec(given.shape, lambda row: (0,))]
    call = gpu.call(
        kernel, result, warps=max(block // 32, 1), interpret=interpret, grid=padded.shape[:1], in_specs=in_specs, out_specs=rows
    )
    found = call(padded, given)
    return found.ravel()[:count].reshape(value.shape)


def _cipher(value, half, round_keys):
    """A balanced Feistel network on twice `half` bits."""
    low = (jnp.uint32(1) << half) - 1
    left, right = value >> half, value & low
    for round_key in round_keys:
        left, right = right, left ^ (_mix(right ^ round_key) & low)
    return (left << half) | right


def inverse(order: Int[Array, " place"]) -> Int[Array, " place"]:
    """The permutation that undoes `order`."""
    return jnp.zeros_like(order).at[order].set(jnp.arange(order.shape[0], dtype=order.dtype), unique_indices=True)


def cohort(key: Key[Array, ""], population: int, size: int) -> Int[Array, " client"]:
    """A uniform sample of `size` clients without replacement: a state-free function of the round's key."""
    return permutation(key, jnp.arange(size), population)


def of_round(key: Key[Array, ""], round: Int[Array, ""], population: int, size: int) -> Int[Array, " client"]:
    """The cohort of a round of a run that began with `key`."""
    return cohort(stage_key(jax.random.fold_in(key, round), "cohort"), population, size)


def of_those_here(key: Key[Array, ""], round: Int[Array, ""], here: Bool[Array, " population"], size: int) -> Int[Array, " client"]:
    """The cohort of a round drawn from those of the population that are `here`: the first ones in the order of `of_round`.

    A uniform sample of them, and exactly `of_round` where all are here. Where fewer than `size` are, all of them, and others who
    are not. Costs an evaluation for each of the population.
    """
    order = of_round(key, round, here.shape[0], here.shape[0])
    first = jnp.argsort(~here[order], stable=True)[:size]
    return order[jnp.sort(first)]


def drawn(key: Key[Array, ""], round: Int[Array, ""], population: int, size: int, rate: float | None) -> Bool[Array, " client"]:
    """Which clients of the cohort of a round (`of_round`) are there, where each of the population is with a chance of `rate`.

    Their number is binomial, and they are the first ones of the cohort, which is a uniform sample: so each is drawn by a coin of
    its own. Where more are drawn than the cohort has places, as many as are too many are left out at random. All are there if `rate`
    is None.
    """
    if rate is None:
        return jnp.ones(size, bool)
    number = jax.random.binomial(stage_key(jax.random.fold_in(key, round), "drawn"), population, rate)
    return jnp.arange(size) < number


def _mix(value):
    """A 32-bit finaliser: every input bit reaches every output bit (constants of Wellons' lowbias32 search)."""
    value = (value ^ (value >> 16)) * jnp.uint32(0x7FEB352D)
    value = (value ^ (value >> 15)) * jnp.uint32(0x846CA68B)
    return value ^ (value >> 16)
