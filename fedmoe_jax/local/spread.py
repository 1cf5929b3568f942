"""Local training on a mesh of devices: each trains its share of the cohort, and what clients send is summed by collectives.

In each chunk a device gets the examples of its clients and the weights of their slots from the devices that keep them, trains
without talking to others, and a total for each part of the experts passes round the devices of the axis expert. At the end totals
are summed over the axis client.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Int

from fedmoe_jax import sharding, store
from fedmoe_jax.base import NO_EXPERT, Aggregator, ClientUpdate
from fedmoe_jax.experts import map_groups
from fedmoe_jax.kernels import is_dual, slot_deltas
from fedmoe_jax.sharding import AXES, CLIENT, EXPERT

_ROWS = PartitionSpec(None, AXES)  # [chunk, client of all devices, ...]
_ALL = PartitionSpec()


class Links(NamedTuple):
    """What one device gets from the others in a chunk, and gives to them; with one device everything is at hand."""

    mesh: Mesh | None = None

    @property
    def shards(self) -> int:
        """Parts of the expert weights."""
        return 1 if self.mesh is None else self.mesh.shape[EXPERT]

    def population(self, population: Any, client: Int[Array, " client"]) -> tuple[Any, Int[Array, " client"]]:
        """A population that has these clients here, and their numbers in it."""
        if self.mesh is None or not hasattr(population, "fetch"):
            return population, client
        return population.fetch(client), jnp.arange(client.shape[0])

    def experts(self, experts: Any, received: Int[Array, "client all_candidates"], names: tuple) -> tuple[Any, Any]:
        """The weights of what clients receive, and the place there of each: all experts, or a row of its own for each candidate."""
        if self.shards == 1:
            return experts, received
        each = received.shape[1] // len(names)

        def one(wanted, leaf):
            return sharding.take(leaf, (jnp.maximum(wanted, 0) % (leaf.shape[0] * self.shards)).reshape(-1), self.shards)

        place = jnp.arange(received.shape[0] * each).reshape(-1, each)
        return map_groups(one, names, received, experts), jnp.tile(place, (1, len(names)))

    def formed(self, update: ClientUpdate, place: Int[Array, "client all_candidates"], groups: int) -> ClientUpdate:
        """The update with arrays for the deltas of slots whose weights are rows of their own."""
        if self.shards == 1:
            return update
        rows = place[:, : update.held.shape[1] // groups]
        return dataclasses.replace(
            update, experts=jax.tree.map(lambda leaf: slot_deltas(leaf, rows) if is_dual(leaf) else leaf, update.experts, is_leaf=is_dual)
        )

    def add(self, aggregator: Aggregator, total: Any, update: ClientUpdate, start: Any, num_experts: int) -> Any:
        """The total of this device with an update of each device."""
        if self.mesh is None:
            return aggregator.add(total, update)

        def own(update, device):
            held = _local(update.held, num_experts, self.shards, device)
            return dataclasses.replace(update, held=held, tokens=jnp.where(held == NO_EXPERT, 0, update.tokens))

        if aggregator.collects:
            update = jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, AXES, tiled=True), update)
            return aggregator.add(total, own(update, jax.lax.axis_index(EXPERT)))
        if self.shards == 1:
            return aggregator.add(total, update)
        more = sharding.ring_sum(lambda total, device: aggregator.add(total, own(update, device)), start, self.shards)
        return jax.tree.map(jnp.add, total, more)

    def agreed(self, fine: Bool[Array, ""]) -> Bool[Array, ""]:
        """Whether it holds on all devices, as far as they must do the same, since `add` passes totals between them."""
        return fine if self.shards == 1 else jax.lax.psum(~fine, AXES) == 0

    def together(self, aggregator: Aggregator, total: Any) -> Any:
        """The total of all devices."""
        return total if self.mesh is None or aggregator.collects else jax.lax.psum(total, CLIENT)


def _local(held, num_experts, shards, device):
    """Experts as numbered among those of a device; `NO_EXPERT` for all others. Both numberings go group after group."""
    own = num_experts // shards
    group, expert = held // num_experts, held % num_experts - device * own
    return jnp.where((held != NO_EXPERT) & (expert >= 0) & (expert < own), group * own + expert, NO_EXPERT)


def train(trainer: Any, state: Any, population: Any, rows: Any, kept: Any, room: tuple[int, ...], uses: Any) -> Any:
    """As `local.cohort.Trainer.scan`, each device with the clients of `rows` [chunk, client of all devices] in its block of columns.

    What clients keep comes from, and goes back to, the devices that have it as the rows of the cohort, [chunk, client, ...].
    """
    mesh, (keys, client, number, present, held, probed, prior) = trainer.mesh, rows
    # In one, as there may be no probes: the compiler of JAX 0.11 crashes where an array without entries enters a shard_map.
    received, slots = jnp.concatenate([held, probed], -1), held.shape[-1]
    rows = sharding.everywhere((keys, client, number, present, received, prior), mesh)
    controls, statistics, residuals = kept
    of_clients = None if controls is None else (controls.experts, controls.shared, controls.tokens, controls.examples)
    stores = store.of_client((state.personal, of_clients, residuals), number)
    sums = None if controls is None else controls.sums
    weights = sharding.experts_spec(mesh)
    has_data = hasattr(population, "fetch")

    def here(experts, shared, round, sums, population, stores, rows):
        stores = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), stores)
        personal, of_clients, residuals = stores
        own = None if controls is None else dataclasses.replace(controls, **dict(zip(_OF_CLIENTS, of_clients, strict=True)), sums=sums)
        local = dataclasses.replace(state, **_UNUSED, experts=experts, shared=shared, round=round, personal=personal, controls=own)
        unsummed = None if own is None else dataclasses.replace(own, sums=jax.tree.map(jnp.zeros_like, sums))
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), statistics)
        keys, client, number, present, received, prior = rows
        held, probed = received[..., :slots], received[..., slots:]
        rows = keys, client, jnp.arange(number.size).reshape(number.shape), present, held, probed, prior
        delta, (own, seen, residuals), out = trainer.scan(local, population, rows, (unsummed, nothing, residuals), room, uses)
        more = jax.lax.psum((None if own is None else own.sums, seen), AXES)
        own = None if own is None else tuple(getattr(own, name) for name in _OF_CLIENTS)
        stores = jax.tree.map(lambda leaf: leaf.reshape(number.shape + leaf.shape[1:]), (own, residuals))
        return delta, stores, more, out

    program = jax.shard_map(
        here, mesh=mesh, in_specs=(weights, _ALL, _ALL, _ALL, population.specs if has_data else _ALL, _ROWS, _ROWS),
        out_specs=((weights, _ALL), _ROWS, _ALL, _ROWS), check_vma=False,
    )  # fmt: skip
    delta, stores, more, out = program(state.experts, state.shared, state.round, sums, population, stores, rows)
    of_clients, residuals = _put_back((of_clients and _given(controls), residuals), stores, number, present)
    if controls is not None:
        sums = jax.tree.map(jnp.add, sums, more[0])
        controls = dataclasses.replace(controls, **dict(zip(_OF_CLIENTS, of_clients, strict=True)), sums=sums)
    statistics = jax.tree.map(jnp.add, statistics, more[1])
    return delta, (controls, statistics, residuals), sharding.everywhere(out, mesh)


_OF_CLIENTS = ("experts", "shared", "tokens", "examples")
_UNUSED: dict[str, Any] = dict.fromkeys(
    ("key", "statistics", "residuals", "private", "optimizer", "aligner", "tokens", "last_trained", "pace", "cache")
)


def _given(controls):
    return tuple(getattr(controls, name) for name in _OF_CLIENTS)


def _put_back(kept: Any, new: Any, number: Int[Array, "chunk client"], present: Any) -> Any:
    """Rows of the population with those of the present clients, of whom each is there once, replaced."""
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), new)
    return store.put(kept, number.reshape(-1), present.reshape(-1), flat)
