"""A step that is taken only where it is needed, under vmap as well."""

from collections.abc import Callable
from typing import TypeVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

T = TypeVar("T")


def apply_if(condition: Bool[Array, ""], function: Callable[[T], T], x: T) -> T:
    """function(x) if the condition holds, else x. Unlike `lax.cond`, under vmap it costs nothing unless it holds somewhere."""
    return lax.while_loop(lambda state: state[1], lambda state: (function(state[0]), jnp.bool_(False)), (x, condition))[0]


def replaced_if(condition: Bool[Array, ""], other: Callable[[Bool[Array, ""]], T], x: T) -> T:
    """other(condition) if the condition holds, else x, and nothing is copied for it. As with `apply_if`, also under vmap.

    All that `other` does must depend on its argument, or the compiler takes it out of here, and it is always done.
    """
    never = jnp.zeros_like(condition)
    return lax.while_loop(lambda state: state[1], lambda state: (other(state[1]), never), (x, condition))[0]
