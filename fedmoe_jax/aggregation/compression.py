"""Fewer bits on the link: quantisation and sparsification of each tensor, for updates up and for weights down."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from fedmoe_jax.aggregation.chain import Message, Transform, Wire, each_tensor, travel
from fedmoe_jax.base import stage_key
from fedmoe_jax.experts import groups

SPARSIFY, QUANTIZE = 20, 30
"""Places in a chain. What bounds a client's update comes before both."""

_SCALE_BITS = 32
_TINY = float(jnp.finfo(jnp.float32).tiny)


def quantize(*, bits: int = 8, rotate: bool = False) -> Transform:
    """Stochastic quantisation [1]: each tensor becomes whole numbers of `bits` bits and one float32, its largest magnitude.

    With L = 2^(bits - 1) - 1 a value x of a tensor of largest magnitude m becomes m / L times one of the two whole numbers beside
    L x / m, at random so that the mean is x. The error is less than a step of m / L, its variance at most a quarter of that
    squared; 0 and m stay as they are.

    Args:
      bits: of a value, 2 to 8.
      rotate: first multiplies the tensor, padded with zeros to a power of two, by random signs and a Hadamard matrix, and undoes it
        after [2]: m is then small where a tensor has a few large values. All padded values travel; the signs follow from
        a seed that both sides know. Of a sparse tensor the values that are left are rotated.

    Raises:
      ValueError: if `bits` is out of its range.

    References:
      [1] Alistarh et al., "QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding", NeurIPS 2017.
      [2] Suresh et al., "Distributed Mean Estimation with Limited Communication", ICML 2017.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"bits is {bits}, it must be a whole number from 2 to 8")
    levels = 2 ** (bits - 1) - 1

    def one(key: Key[Array, ""], message: Message) -> Message:
        values = message.values.astype(jnp.float32)
        if rotate:
            sign_key, key = jax.random.split(key)
            largest = jnp.abs(values).max(initial=_TINY)
            arrived = largest * unrotated(sign_key, _rounded(key, rotated(sign_key, values / largest), levels), values.size)
        else:
            arrived = _rounded(key, values, levels)
        return Message(arrived.astype(message.values.dtype), message.index)

    def wire(wire: Wire) -> Wire:
        values = _padded(wire.values) if rotate else wire.values
        return wire._replace(values=values, bits=bits, overhead=wire.overhead + _SCALE_BITS)

    return Transform("quantize", QUANTIZE, each_tensor(one), wire)


def _rounded(key: Key[Array, ""], values: Float[Array, " value"], levels: int) -> Float[Array, " value"]:
    largest = jnp.abs(values).max(initial=0.0)
    steps = jnp.clip(values / jnp.maximum(largest, _TINY) * levels, -levels, levels)  # some devices divide inexactly
    below = jnp.floor(steps)
    above = jax.random.uniform(key, values.shape) < steps - below
    return (below + above) / levels * largest


def rotated(key: Key[Array, ""], values: Float[Array, " value"]) -> Float[Array, " padded"]:
    """Values padded with zeros to a power of two, with random signs, times the Hadamard matrix over the root of their number."""
    padded = jnp.pad(values, (0, _padded(values.size) - values.size))
    return _hadamard(padded * _signs(key, padded.size))


def unrotated(key: Key[Array, ""], values: Float[Array, " padded"], size: int) -> Float[Array, " value"]:
    """The inverse of `rotated` with the same key: the first `size` values."""
    return (_hadamard(values) * _signs(key, values.size))[:size]


def _signs(key, size):
    """Random signs, one of each bit that is drawn."""
    words = jax.random.bits(key, (-(-size // 32), 1), jnp.uint32)
    return 1.0 - 2.0 * ((words >> jnp.arange(32, dtype=jnp.uint32)[None]) & 1).reshape(-1)[:size].astype(jnp.float32)


def _padded(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


def _hadamard(values):
    """Orthonormal and its own inverse. Sums and differences of pairs that are 1, 2, 4, ... apart: no product, whose rounding would
    depend on how many clients are computed at once."""
    size, width = values.size, 1
    while width < size:
        pairs = values.reshape(-1, 2, width)
        values = jnp.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1)
        width *= 2
    return values.reshape(size) / math.sqrt(size)


def sparsify(*, share: float = 0.05, error_feedback: bool = True) -> Transform:
    """Of each tensor of n values only the k = ceil(share n) of largest magnitude travel; the others arrive as 0.

    Where they belong takes k ceil(log2 n) bits or a bitmap of n bits, whichever is less, and nothing where all travel.

    Args:
      share: of the values of a tensor, above 0 and at most 1.
      error_feedback: clients keep what did not arrive and add it the next time, see `chain`.

    Raises:
      ValueError: if `share` is out of its range.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}, it must be above 0 and at most 1")

    def most(size: int) -> int:
        return min(size, math.ceil(share * size * (1 - 1e-12)))  # 0.07 of 100 are 7, though the product is more

    def one(key: Key[Array, ""], message: Message) -> Message:
        number = most(message.values.size)
        if number == message.values.size:
            return message
        _, index = jax.lax.top_k(jnp.abs(message.values), number)
        return Message(message.values[index], index)

    def wire(wire: Wire) -> Wire:
        number = most(wire.values)
        places = min(number * (wire.size - 1).bit_length(), wire.size) if number < wire.values else 0
        return wire._replace(values=number, overhead=wire.overhead + places)

    return Transform("sparsify", SPARSIFY, each_tensor(one), wire, error_feedback)


def received(
    broadcast: Transform,
    key: Key[Array, ""],
    round: Int[Array, ""],
    experts: PyTree[Float[Array, "expert ..."]],
    shared: PyTree[Float[Array, "..."]],
    last_trained: Int[Array, " all_experts"],
) -> tuple[PyTree, PyTree]:
    """What clients receive of the server's weights: (experts, shared), encoded once a round for all clients.

    Shared tensors are drawn with keys of the round, those of an expert with keys of the round in which it was last trained, so that
    an expert which nobody trained since arrives as the same bits, and copies of it that clients kept stay good.

    Args:
      broadcast: such as `quantize(bits=8)`.
      key: of the run.
      last_trained: the round in which each expert was last trained, -1 for never.
    """
    key, names = stage_key(key, "broadcast"), groups(experts)
    versions = jnp.arange(len(last_trained)), last_trained + 1
    arrived, _ = travel((broadcast,), key, (experts, {}), versions, names)
    _, of_round = travel((broadcast,), jax.random.fold_in(key, round), ({}, shared), versions, names)
    return arrived, of_round
