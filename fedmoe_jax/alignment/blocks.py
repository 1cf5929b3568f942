"""Clients in blocks, one after the other, so that what a CPU works on stays in its caches. Elsewhere there is one block."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped

_WHOLE, _BLOCK = 1 << 20, 1 << 18  # pairs of which a CPU looks at all at once, and of a block of more


def count(num_experts: int, num_clients: int) -> int:
    """How many blocks these clients make, the axis of clients being the last."""
    if num_experts * num_clients <= _WHOLE or jax.default_backend() != "cpu":
        return 1
    return -(-num_clients // max(_BLOCK // num_experts, num_experts))


def split(array: Shaped[Array, "*axes client"], number: int, fill: int | float = 0) -> Shaped[Array, "block *axes part"]:
    """The clients in blocks of as many, the last being filled up."""
    size = -(-array.shape[-1] // number)
    padded = jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, size * number - array.shape[-1])], constant_values=fill)
    return jnp.moveaxis(padded.reshape(*array.shape[:-1], number, size), -2, 0)


def mapped(function: Callable[..., Any], *blocks: Array) -> Any:
    """function(*block) of each block."""
    if blocks[0].shape[0] == 1:
        return jax.tree.map(lambda x: x[None], function(*(block[0] for block in blocks)))
    return lax.map(lambda each: function(*each), blocks)


def summed(function: Callable[..., Any], *blocks: Array) -> Any:
    """The sum of function(*block) over the blocks."""
    if blocks[0].shape[0] == 1:
        return function(*(block[0] for block in blocks))

    def add(total, each):
        return jax.tree.map(jnp.add, total, function(*each)), None

    shapes = jax.eval_shape(function, *(block[0] for block in blocks))
    return lax.scan(add, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes), blocks)[0]
