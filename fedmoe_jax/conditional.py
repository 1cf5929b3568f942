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
    """other(condition, given) if the condition holds, else x, and nothing is copied for it. As with `apply_if`, also under vmap.

    All that `other` does must depend on its first argument, or the compiler takes it out of here, and it is always done. Axes of one
    element are left out on the way, as XLA would copy an array in which they lie in another order.
    """
    never, flat = jnp.zeros_like(condition), jax.tree.map(jnp.squeeze, given)

    def replace(state):
        return other(state[1], jax.tree.map(lambda leaf, like: leaf.reshape(like.shape), flat, given)), never

    return lax.while_loop(lambda state: state[1], replace, (x, condition))[0]
