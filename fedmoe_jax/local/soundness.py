"""What is not finite is rejected: all of a client's update, and what it tells of it."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from fedmoe_jax.kernels import is_dual, is_finite


def all_finite(tree: Any) -> Bool[Array, ""]:
    """Whether all numbers are finite, those of a `DualDelta` included."""
    return jnp.stack(list(map(is_finite, jax.tree.leaves(tree, is_leaf=is_dual)))).all()


def only(sound: Bool[Array, "*client"], tree: Any) -> Any:
    """The tree, [client, ...] or of one client, with zeros for those that are not sound."""
    return jax.tree.map(lambda leaf: jnp.where(sound.reshape(*sound.shape, *(1,) * (leaf.ndim - sound.ndim)), leaf, 0), tree)


def without(sent: Any, sound: Bool[Array, "*client"]) -> Any:
    """What clients sent, (update, feedback, gradient, statistics), without that of those who are not sound."""
    (shared, experts, held, *counts), feedback, gradient, seen = sent
    shared, experts, counts, told, seen = only(sound, (shared, experts, counts, feedback[:4], seen))
    return (shared, experts, held, *counts), (*told, *feedback[4:]), gradient, seen


def bytes_of(tree: Any) -> int:
    """What its arrays take."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
