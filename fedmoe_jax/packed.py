"""Rows of a tree of small arrays, those of a dtype side by side in one array: a GPU writes a row at once, not each number of it."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

Rows = dict[str, Shaped[Array, "row number"]]


def zeros(shape: Any, most: int) -> Rows:
    """`most` rows for trees of this shape."""
    sizes = {name: sum(leaf.size for leaf in leaves) for name, leaves in _by_dtype(shape).items()}
    return {name: jnp.zeros((most, size), name) for name, size in sizes.items()}


def put(rows: Rows, index: Int[Array, ""], tree: Any) -> Rows:
    """The rows, that at `index` being those numbers."""
    leaves = _by_dtype(jax.tree.map(jnp.asarray, tree))
    return {name: rows[name].at[index].set(jnp.concatenate([leaf.reshape(-1) for leaf in leaves[name]])) for name in rows}


def rows(packed: Rows, shape: Any) -> Any:
    """Trees of that shape, each leaf with a leading axis of rows."""
    left = {
        name: jnp.split(packed[name], list(itertools.accumulate(leaf.size for leaf in leaves[:-1])), axis=1)
        for name, leaves in _by_dtype(shape).items()
    }

    def leaf_rows(leaf):
        found = left[leaf.dtype.name].pop(0)
        return found.reshape(len(found), *leaf.shape)

    return jax.tree.map(leaf_rows, shape)


def _by_dtype(tree: Any) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for leaf in jax.tree.leaves(tree):
        found.setdefault(leaf.dtype.name, []).append(leaf)
    return found
