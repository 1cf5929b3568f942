"""Experts that clients still have from their last round, so that they need not download them again."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from fedmoe_jax.base import NO_EXPERT, pytree
from fedmoe_jax.experts import held_mask


@pytree
class Cache:
    """The experts that each client received in its last round, as they were then, and that round.

    A client keeps the copies that it received, whether or not it went on to train them.
    """

    experts: Int[Array, "population place"]
    round: Int[Array, " population"]


def empty(num_clients: int, places: int) -> Cache:
    """Nobody has anything."""
    return Cache(jnp.full((num_clients, places), NO_EXPERT, jnp.int32), jnp.full(num_clients, -1, jnp.int32))


def current(cache: Cache, client: Int[Array, " client"], last_trained: Int[Array, " expert"]) -> Bool[Array, "client expert"]:
    """Which experts each client has in their current version: those that nobody trained since it received them.

    Args:
      last_trained: the round in which each expert was last changed; a copy received in that round is from before.
    """
    return held_mask(cache.experts[client], last_trained.shape[0]) & (last_trained < cache.round[client][:, None])


def keep(
    cache: Cache,
    client: Int[Array, " client"],
    present: Bool[Array, " client"],
    received: Int[Array, "client place"],
    round: Int[Array, ""],
) -> Cache:
    """The cache after a round in which the present clients got hold of the experts `received`."""
    row = jnp.where(present, client, cache.round.shape[0])  # absent rows fall off the end
    return Cache(cache.experts.at[row].set(received, mode="drop"), cache.round.at[row].set(round, mode="drop"))
