"""What each client keeps between rounds: arrays of the whole population, of which a round touches its cohort's rows only.

Trees of shared weights have rows [population, ...], trees of expert weights [population, expert, ...].
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from fedmoe_jax.base import NO_EXPERT
from fedmoe_jax.experts import map_groups


def create(weights: PyTree, num_clients: int, budget_bytes: float, what: str) -> PyTree[Float[Array, "population ..."]]:
    """Rows for every client, each equal to `weights`.

    Raises:
      ValueError: that begins with `what`, if they take more than `budget_bytes`.
    """
    needed = num_clients * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weights))
    if needed > budget_bytes:
        raise ValueError(f"{what}, which takes {needed} bytes for {num_clients} clients; the budget is {budget_bytes:.0f}")
    return jax.tree.map(lambda leaf: jnp.repeat(leaf[None], num_clients, 0), weights)


def of_client(rows: PyTree, client: Int[Array, "*client"]) -> PyTree[Float[Array, "..."]]:
    """The rows of shared weights of a client, or of several."""
    return jax.tree.map(lambda leaf: leaf[client], rows)


def of_slots(rows: PyTree, client: Int[Array, ""], held: Int[Array, " all_slots"], names: tuple) -> PyTree[Float[Array, "slot ..."]]:
    """A client's rows of the experts that it holds, those of expert 0 for empty slots. `names` are the groups of all experts."""
    return map_groups(lambda held, leaf: leaf[client, jnp.maximum(held, 0) % leaf.shape[1]], names, held, rows)


def add(rows: PyTree, client: Int[Array, " client"], present: Bool[Array, " client"], change: PyTree) -> PyTree:
    """The rows of shared weights plus `change` [client, ...] for the present clients."""
    return jax.tree.map(lambda leaf, new: leaf.at[jnp.where(present, client, leaf.shape[0])].add(new, mode="drop"), rows, change)


def add_to_slots(
    rows: PyTree, client: Int[Array, " client"], present: Bool[Array, " client"], held: Int[Array, "client all_slots"], change, names: tuple
) -> PyTree:
    """The rows of expert weights plus `change` [client, slot, ...] for what the present clients hold."""

    def one(held, leaf, new):
        return leaf.at[client[:, None], _slot(held, present, leaf)].add(new, mode="drop")

    return map_groups(one, names, held, rows, change)


def put(rows: PyTree, client: Int[Array, " client"], present: Bool[Array, " client"], new: PyTree) -> PyTree:
    """The rows of shared weights with `new` [client, ...] in place of those of the present clients."""
    return jax.tree.map(lambda leaf, new: leaf.at[jnp.where(present, client, leaf.shape[0])].set(new, mode="drop"), rows, new)


def put_slots(
    rows: PyTree, client: Int[Array, " client"], present: Bool[Array, " client"], held: Int[Array, "client all_slots"], new, names: tuple
) -> PyTree:
    """The rows of expert weights with `new` [client, slot, ...] in place of those of what the present clients hold."""

    def one(held, leaf, new):
        return leaf.at[client[:, None], _slot(held, present, leaf)].set(new, mode="drop")

    return map_groups(one, names, held, rows, new)


def _slot(held, present, leaf):
    """The expert of each slot, past the end for empty ones and absent clients."""
    return jnp.where(present[:, None] & (held != NO_EXPERT), held % leaf.shape[1], leaf.shape[1])
