"""How a round lies on a mesh of devices with the axes client and expert, and the exchanges between them.

The clients of a cohort and everything that belongs to a client of the population are spread over all devices; expert weights over the
axis expert, each device keeping E / n of them, where it is longer than 1. All else is on each device. Without a mesh, or with
one of a single device, nothing here does anything.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int, PyTree, Shaped

CLIENT, EXPERT = "client", "expert"
AXES = (CLIENT, EXPERT)
"""The axes of a mesh; clients are spread over both."""


def checked(mesh: Mesh | None, num_experts: int) -> Mesh | None:
    """The mesh, or None where it is of one device.

    Raises:
      ValueError: if its axes are others, or the axis expert does not divide the experts.
    """
    if mesh is None:
        return None
    if mesh.axis_names != AXES:
        raise ValueError(f"mesh has the axes {mesh.axis_names}, they must be {AXES}: see distributed.mesh")
    if num_experts % mesh.shape[EXPERT]:
        raise ValueError(f"mesh has {mesh.shape[EXPERT]} devices along expert, they must divide the experts of a group, {num_experts}")
    return None if mesh.size == 1 else mesh


def experts_spec(mesh: Mesh) -> PartitionSpec:
    """That of a leaf of expert weights [expert, ...]."""
    return PartitionSpec(EXPERT) if mesh.shape[EXPERT] > 1 else PartitionSpec()


def shardings(state: Any, num_clients: int, mesh: Mesh) -> Any:
    """Where the arrays of a `round.State` lie, in its structure.

    What has an axis of the population, as the first or the second one, is spread along it where the devices divide the population,
    expert weights and what the server's optimizer keeps of them along the experts; all else is on each device.
    """
    experts = {leaf.shape for leaf in jax.tree.leaves(state.experts)}

    def of_clients(leaf: Array) -> NamedSharding:
        spread = leaf.size and num_clients in leaf.shape[:2] and num_clients % mesh.size == 0
        place = leaf.shape[:2].index(num_clients) if spread else None
        return NamedSharding(mesh, PartitionSpec() if place is None else PartitionSpec(*(None,) * place, AXES))

    def of_weights(leaf: Array) -> NamedSharding:
        return NamedSharding(mesh, experts_spec(mesh) if leaf.shape in experts else PartitionSpec())

    weights = ("experts", "optimizer")
    everywhere = ("key", "round", "shared", "tokens", "last_trained", "statistics")
    given = {name: jax.tree.map(of_weights, getattr(state, name)) for name in weights}
    given |= {name: jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), getattr(state, name)) for name in everywhere}
    given |= {name: jax.tree.map(of_clients, value) for name, value in vars(state).items() if name not in given}
    return jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(type(state)(**given)))


def place(state: Any, num_clients: int, mesh: Mesh | None) -> Any:
    """The state with its arrays where they belong."""
    return state if mesh is None else jax.jit(lambda state: state, out_shardings=shardings(state, num_clients, mesh))(state)


def keep(state: Any, num_clients: int, mesh: Mesh | None) -> Any:
    """The same inside a program."""
    return state if mesh is None else jax.lax.with_sharding_constraint(state, shardings(state, num_clients, mesh))


def everywhere(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """The arrays on each device, inside a program."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec()))


def fetch(
    rows: Callable[[Int[Array, "device _wanted"], Bool[Array, "device _wanted"]], PyTree],
    wanted: Int[Array, " _wanted"],
    first: Int[Array, ""],
    number: int,
    axes: str | tuple[str, ...],
) -> PyTree[Shaped[Array, "_wanted ..."]]:
    """What other devices have of what each wants: each gives to all what is its own, and everyone gets what it wants.

    Each number is with one device, so the sum of what all give is what that one has: a reduce-scatter, of (n - 1) / n times what all n
    devices want, which a device sends and gets.

    Args:
      rows: rows(number from `first` on, whether it is here) -> what this device has of it; what is not here counts as 0.
      wanted: numbers that this device wants.
      first, number: this device has the numbers from `first` on, so many.
    """
    local = jax.lax.all_gather(wanted, axes) - first
    here = (local >= 0) & (local < number)

    def give(leaf: Array) -> Array:
        kept = jnp.where(here.reshape(*here.shape, *(1,) * (leaf.ndim - 2)), leaf, 0)
        if leaf.dtype == bool:
            return jax.lax.psum_scatter(kept.astype(jnp.uint8), axes, scatter_dimension=0).astype(bool)
        return jax.lax.psum_scatter(kept, axes, scatter_dimension=0)

    return jax.tree.map(give, rows(jnp.where(here, local, 0), here))


def take(shard: Shaped[Array, "own ..."], wanted: Int[Array, " _wanted"], devices: int) -> Shaped[Array, "_wanted ..."]:
    """The entries `wanted` of an array of which each device along the axis expert has a part.

    Where fewer are wanted than a device has, they are fetched; otherwise the parts pass round the ring of devices and each takes
    out of them what it wants, so that no device ever has more than two.
    """
    own, index = shard.shape[0], jax.lax.axis_index(EXPERT)
    if wanted.shape[0] <= own:
        return fetch(lambda local, _: shard[local], wanted, index * own, own, EXPERT)

    def pick(step, taken, shard):
        local = wanted - (index + step) % devices * own
        here = (local >= 0) & (local < own)
        return jnp.where(here.reshape(-1, *(1,) * (shard.ndim - 1)), shard[jnp.where(here, local, 0)], taken)

    def turn(step, carry):
        taken, shard = carry
        return pick(step, taken, shard), jax.lax.ppermute(shard, EXPERT, [(device, (device - 1) % devices) for device in range(devices)])

    wanted, shard = jax.lax.optimization_barrier((wanted, shard))  # else the parts of all devices come before a loop, and stay
    nothing = jnp.zeros((wanted.shape[0], *shard.shape[1:]), shard.dtype)
    taken, shard = jax.lax.fori_loop(0, devices - 1, turn, (nothing, shard))
    return pick(devices - 1, taken, shard)


def ring_sum(add: Callable[[PyTree, Int[Array, ""]], PyTree], start: PyTree, devices: int) -> PyTree:
    """For each device along the axis expert what all of them add to it: a total for each passes round the ring.

    Args:
      add: add(total, device) -> the total of that device with what this one adds to it.
      start: of zeros.
    """
    index = jax.lax.axis_index(EXPERT)

    def turn(step, total):
        total = add(total, (index - 1 - step) % devices)
        return jax.lax.ppermute(total, EXPERT, [(device, (device + 1) % devices) for device in range(devices)])

    return add(jax.lax.fori_loop(0, devices - 1, turn, start), index)
