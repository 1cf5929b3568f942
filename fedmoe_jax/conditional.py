"""A step that is taken only where it is needed, under vmap as well."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

T = TypeVar("T")


def apply_if(condition: Bool[Array, ""], function: Callable[[T], T], x: T) -> T:
    """function(x) if the condition holds, else x. Unlike `lax.cond`, under vmap it costs nothing unless it holds somewhere."""
    return lax.while_loop(lambda state: state[1], lambda state: (function(state[0]), jnp.bool_(False)), (x, condition))[0]


def replaced_if(condition: Bool[Array, ""], other: Callable[[Bool[Array, ""], Any], T], x: T, given: Any) -> T:
    """other(condition, given) if the condition holds, else x. As with `apply_if`, it costs nothing unless it holds, also under vmap.

    All that `other` does must depend on its first argument, or the compiler takes it out of here, and it is always done. `given` comes in
    without its axes of one element: where these are placed otherwise in memory than a loop wants them, XLA for CPUs would copy it.
    """
    never, flat = jnp.zeros_like(condition), jax.tree.map(jnp.squeeze, given)

    def replace(state):
        return other(state[1], jax.tree.map(lambda leaf, like: leaf.reshape(like.shape), flat, given)), never

    return lax.while_loop(lambda state: state[1], replace, (x, condition))[0]
