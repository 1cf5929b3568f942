"""A population whose examples are spread over a mesh, each client's on one device."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from fedmoe_jax import sharding
from fedmoe_jax.base import Batch, ClientProfile, pytree, static
from fedmoe_jax.data.population import Population, checked
from fedmoe_jax.sharding import AXES

_BY_DEVICE = ("x", "y", "size", "start", "label_prior")


@pytree
class LocalClients:
    """The examples of a few clients, with as many places for each as the largest client of the population has."""

    x: Shaped[Array, "client example ..."]
    y: Shaped[Array, "client example ..."]
    size: Int[Array, " client"]
    label_prior: Float[Array, "client class"] | None = None

    @property
    def max_examples(self) -> int:
        """Examples of the largest client of the population."""
        return self.x.shape[1]

    def num_examples(self, client: Int[Array, ""]) -> Int[Array, ""]:
        """Examples of one client."""
        return self.size[client]

    def batch(self, client: Int[Array, ""], position: Int[Array, " example"]) -> Batch:
        """As `Population.batch`."""
        mask = (position >= 0) & (position < self.size[client])
        place = jnp.where(mask, position, 0)
        prior = None if self.label_prior is None else self.label_prior[client]
        return Batch(self.x[client, place], self.y[client, place], mask, prior)


@pytree
class ShardedPopulation:
    """A population on a mesh; implements `base.Population`. Made by `place`.

    Device d has the clients from d * own on, as many as `size` has columns, and their examples one client after the other. Examples are
    padded to as many rows on each device as the fullest one has.

    Attributes:
      x, y: examples [device, row, ...].
      size, start: of each client, examples and its first row.
      label_prior: as that of `Population`, by device.
      profile: what each client can afford.
      clients, largest: number of clients, examples of the largest one.
    """

    x: Shaped[Array, "device row ..."]
    y: Shaped[Array, "device row ..."]
    size: Int[Array, "device own"]
    start: Int[Array, "device own"]
    label_prior: Float[Array, "device own class"] | None
    profile: ClientProfile
    clients: int = static()
    largest: int = static()

    @property
    def num_clients(self) -> int:
        """All clients, also those without examples."""
        return self.clients

    @property
    def max_examples(self) -> int:
        """Examples of the largest client."""
        return self.largest

    @property
    def specs(self) -> Any:
        """How each array lies on the mesh inside a program of one device: profiles are on all."""
        everywhere = jax.tree.map(lambda _: PartitionSpec(), self)
        spread = {name: jax.tree.map(lambda _: PartitionSpec(AXES), getattr(self, name)) for name in _BY_DEVICE}
        return dataclasses.replace(everywhere, **spread)

    def num_examples(self, client: Int[Array, ""]) -> Int[Array, ""]:
        """Examples of one client; 0 for a client that does not exist."""
        exists = (client >= 0) & (client < self.clients)
        device, own = jnp.divmod(jnp.where(exists, client, 0), self.size.shape[1])
        return jnp.where(exists, self.size[device, own], 0)

    def batch(self, client: Int[Array, ""], position: Int[Array, " example"]) -> Batch:
        """As `Population.batch`. Slow where it runs, since each row crosses devices: see `fetch`."""
        device, own = jnp.divmod(jnp.clip(client, 0, self.clients - 1), self.size.shape[1])
        mask = (position >= 0) & (position < self.num_examples(client))
        row = self.start[device, own] + jnp.where(mask, position, 0)
        prior = None if self.label_prior is None else self.label_prior[device, own]
        return Batch(self.x[device, row], self.y[device, row], mask, prior)

    def fetch(self, client: Int[Array, " client"]) -> LocalClients:
        """The examples of these clients, from the devices that have them; inside a program of one device, of all at once."""
        own = self.size.shape[1]

        def rows(local: Array, here: Array) -> tuple[Any, ...]:
            size = jnp.where(here, self.size[0, local], 0)
            position = jnp.minimum(jnp.arange(self.largest), jnp.maximum(size[..., None] - 1, 0))
            row = self.start[0, local][..., None] + position
            return self.x[0, row], self.y[0, row], size, None if self.label_prior is None else self.label_prior[0, local]

        return LocalClients(*sharding.fetch(rows, client, jax.lax.axis_index(AXES) * own, own, AXES))


def place(population: Population, mesh: Mesh) -> Population | ShardedPopulation:
    """The population on a mesh, its examples and profiles spread over the devices by client.

    As many clients go to each device, in their order. On a mesh of one device it is the population as given. Examples that nobody
    owns are left out.
    """
    if mesh.size == 1:
        return population
    prior = None if population.label_prior is None else np.asarray(population.label_prior)
    index = np.asarray(population.order), np.asarray(population.offsets), population.profile
    return _spread(np.asarray(population.x), np.asarray(population.y), *index, prior, mesh)


def from_arrays(
    x: np.ndarray,
    y: np.ndarray,
    client_indices: Sequence[np.ndarray],
    profile: ClientProfile | None = None,
    label_prior: Array | np.ndarray | None = None,
    *,
    mesh: Mesh,
) -> ShardedPopulation:
    """As `Population.from_arrays` and `place`, without the whole on one device: of `x` and `y`, which may be memory maps, each
    process reads the rows of the clients of its own devices only.

    Raises:
      ValueError: if the argument that it names has a wrong dtype, length or index.
    """
    order, offsets, profile = checked(x, y, client_indices, profile)
    return _spread(x, y, order, offsets, profile, None if label_prior is None else np.asarray(label_prior), mesh)


def _spread(x, y, order, offsets, profile, prior, mesh) -> ShardedPopulation:
    clients = len(offsets) - 1
    own = -(-clients // mesh.size)
    bounds = np.minimum(np.arange(mesh.size + 1) * own, clients)
    first = offsets[bounds]
    room = max(1, int(np.diff(first).max()))
    size, start = np.zeros(mesh.size * own, np.int32), np.zeros(mesh.size * own, np.int32)
    size[:clients] = np.diff(offsets)
    start[:clients] = offsets[:-1] - np.repeat(first[:-1], np.diff(bounds))
    spread = NamedSharding(mesh, PartitionSpec(AXES))

    def examples(given: np.ndarray) -> Array:
        def of_devices(index: Any) -> np.ndarray:
            devices = range(*index[0].indices(mesh.size))
            made = np.zeros((len(devices), room, *given.shape[1:]), given.dtype)
            for row, device in zip(made, devices, strict=True):
                rows = order[first[device] : first[device + 1]]
                row[: len(rows)] = given[rows]
            return made

        return jax.make_array_from_callback((mesh.size, room, *given.shape[1:]), spread, of_devices)

    def columns(values: np.ndarray) -> Array:
        return _put(values.reshape(mesh.size, own, *values.shape[1:]), spread)

    if prior is not None:
        prior = columns(np.pad(prior.astype(np.float32), ((0, len(size) - clients), (0, 0))))
    even = spread if clients % mesh.size == 0 else NamedSharding(mesh, PartitionSpec())
    profile = jax.tree.map(lambda column: _put(np.asarray(column), even), profile)
    return ShardedPopulation(examples(x), examples(y), columns(size), columns(start), prior, profile, clients, int(size.max()))


def everywhere(tree: Any, mesh: Mesh) -> Any:
    """Arrays on each device of a mesh."""
    return jax.tree.map(lambda leaf: _put(np.asarray(leaf), NamedSharding(mesh, PartitionSpec())), tree)


def _put(values: np.ndarray, where: NamedSharding) -> Array:
    """An array of which each process puts its part where it belongs."""
    return jax.make_array_from_callback(values.shape, where, lambda index: values[index])
