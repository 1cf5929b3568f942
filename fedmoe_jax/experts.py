"""Expert parameters: marked by type, split from the rest, gathered into client slots and combined back.

Layers of one group follow one assignment. Of G groups of E experts, expert e of group g has the number g E + e, and the
slots of group g are entries g K to (g + 1) K of a client's K G slots.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from fedmoe_jax import kernels
from fedmoe_jax.base import NO_EXPERT, pytree, static


class ExpertParam(nnx.Param):
    """A parameter whose leading axis is the expert. Marking weights with it federates any nnx model.

    Clients hold a few entries of that axis, so a layer must take the number of experts from the weight itself.

    Args:
      value: the weights [expert, ...].
      group: name of the assignment that they follow: expert e of all layers of a group goes to the same clients. None is
        the group of all that name none, so by default all layers follow one assignment. A layer has one group.
    """

    def __init__(self, value: Any, *, group: str | None = None, **metadata: Any):
        super().__init__(value, group=group, **metadata)


class RouterParam(ExpertParam):
    """Router rows [expert, feature]: an expert parameter that may also stay on the client (`router="personal"`)."""


@pytree
class Slots:
    """What a MoE layer is told about the slots it computes, and what it reports back.

    `held` marks filled slots, `prior` is added to the router logits, `mask` marks real examples. A `posterior.Posterior` takes
    the place of the router, and then each token goes to all slots. The layer sets `tokens`, the tokens of each example that it
    sent to each slot, `penalty`, its weighted auxiliary loss, and if asked to `observe` what it has `seen`: the features of
    each token, and the gates with which it went to each slot.
    """

    held: Bool[Array, " slot"]
    prior: Float[Array, " slot"]
    mask: Bool[Array, " example"] | None = None
    tokens: Float[Array, "example slot"] | None = None
    penalty: Float[Array, ""] | None = None
    posterior: Any = None
    seen: tuple[Float[Array, "token feature"], Float[Array, "slot token"]] | None = None
    observe: bool = static(default=False)


class SlotState(nnx.Variable):
    """Carries a layer's `Slots`. A MoE layer owns one, reads `held` and `prior`, and sets `tokens` and `penalty`."""


class Partition(NamedTuple):
    """An nnx model in parts: structure, expert parameters, shared parameters, and state that is not trained."""

    graphdef: nnx.GraphDef
    experts: nnx.State
    shared: nnx.State
    rest: nnx.State


def partition(model: nnx.Module) -> Partition:
    """Splits a model into (graphdef, experts, shared, rest).

    Raises:
      ValueError: if `model` has no ExpertParam, if their leading sizes differ, if a module that owns one has no
        `SlotState` to learn its slots from, if those of a module differ in group, or if the model keeps running statistics
        of its batches.
    """
    graphdef, *states = nnx.split(model, ExpertParam, nnx.Param, ...)
    parts = Partition(graphdef, *states)
    flat = {path: variable for path, variable in nnx.iter_graph(model) if isinstance(variable, nnx.Variable)}
    experts = {path: variable for path, variable in flat.items() if isinstance(variable, ExpertParam)}
    if not experts:
        raise ValueError("model has no ExpertParam: mark the expert weights with fedmoe_jax.ExpertParam")
    sizes = {"/".join(map(str, path)): variable.shape[:1] for path, variable in experts.items()}
    if len(set(sizes.values())) > 1 or () in sizes.values():
        raise ValueError(f"model has ExpertParams with different leading sizes, all must be the number of experts: {sizes}")
    owned = _owned(flat)
    for path in experts:
        if not any(path[: len(owner)] == owner for owner in owned):
            raise ValueError(f"model{_dotted(path)} has no SlotState beside it: its layer would send tokens to empty slots")
    for owner, names in owned.items():
        if len(names) > 1:
            raise ValueError(f"model{_dotted(owner)} has ExpertParams of groups {list(names)}, all of a layer must be of one group")
    if any(isinstance(variable, nnx.BatchStat) for variable in flat.values()):
        raise ValueError("model keeps batch statistics, which clients cannot share: use GroupNorm or LayerNorm")
    return parts


def _dotted(path):
    return "".join(f".{name}" for name in path)


def _owned(flat: dict[tuple, nnx.Variable]) -> dict[tuple, tuple[str | None, ...]]:
    """For each module that has a SlotState the groups of the ExpertParams that are nearest to it, upwards."""
    owners = [path[:-1] for path, variable in flat.items() if isinstance(variable, SlotState)]
    names: dict[tuple, list[str | None]] = {owner: [] for owner in owners}
    for path, variable in flat.items():
        above = [owner for owner in owners if path[: len(owner)] == owner]
        if isinstance(variable, ExpertParam) and above:
            names[max(above, key=len)].append(_group(variable))
    return {owner: tuple(dict.fromkeys(of_owner)) for owner, of_owner in names.items()}


def _is_variable(node):
    return isinstance(node, nnx.Variable)


def _group(node):
    return node.get_metadata().get("group") if _is_variable(node) else None


def num_experts(experts: PyTree) -> int:
    """The leading size of the expert parameters: the experts of each group."""
    return jax.tree.leaves(experts)[0].shape[0]


def groups(experts: PyTree) -> tuple[str | None, ...]:
    """The names of the groups of expert parameters, in the order of the model's state; (None,) where none is named."""
    return tuple(dict.fromkeys(map(_group, jax.tree.leaves(experts, is_leaf=_is_variable))))


def group_places(experts: PyTree) -> list[int]:
    """The place in `groups` of each leaf's group."""
    names = groups(experts)
    return [names.index(_group(node)) for node in jax.tree.leaves(experts, is_leaf=_is_variable)]


def by_group(rows: Shaped[Array, "*axes entry"], num_groups: int) -> Shaped[Array, "*axes group part"]:
    """Splits a last axis that goes group after group, such as slots or experts, into one axis of groups and one of each's."""
    return rows.reshape(*rows.shape[:-1], num_groups, rows.shape[-1] // num_groups)


def map_groups(function: Callable[..., Any], names: tuple[str | None, ...], rows: PyTree, *trees: PyTree) -> PyTree:
    """`jax.tree.map(function, rows, *trees)`, each leaf of `trees` with the part of `rows` that belongs to its group.

    Args:
      function: function(rows of the group, *leaves) -> leaf.
      names: all groups, see `groups`; `trees` may have leaves of some of them.
      rows: arrays whose last axis goes group after group.
      trees: the first one says which group a leaf is of.
    """

    def one(variable, *others):
        part = rows
        if len(names) > 1:
            place = names.index(_group(variable))
            part = jax.tree.map(lambda row: by_group(row, len(names))[..., place, :], rows)
        return jax.tree.map(lambda *leaves: function(part, *leaves), variable, *others, is_leaf=kernels.is_dual)

    return jax.tree.map(one, *trees, is_leaf=_is_variable)


def bind(parts: Partition, experts: PyTree, shared: PyTree, slots: Slots) -> Any:
    """A model that computes with these weights. Safe to mutate.

    Args:
      slots: those of all groups, group after group: as many of each as its leaves of `experts` have entries.

    Raises:
      ValueError: if there are more or fewer.
    """
    model = nnx.merge(parts.graphdef, experts, shared, parts.rest, copy=True)
    sizes = {_group(node): node.shape[0] for node in jax.tree.leaves(experts, is_leaf=_is_variable)}
    if slots.held.shape[0] != sum(sizes.values()):
        raise ValueError(f"slots.held has {slots.held.shape[0]} entries, the weights have {sum(sizes.values())} experts")
    states, start = _slot_states(model), 0
    for name in groups(parts.experts):
        stop = start + sizes[name]
        for state in states.get(name, []):
            state.set_value(dataclasses.replace(slots, held=slots.held[start:stop], prior=slots.prior[start:stop]))
        start = stop
    return model


def report(model: Any) -> tuple[Float[Array, "example slot"], Float[Array, ""]]:
    """Tokens of each example sent to each slot, summed over the layers of a group, group after group; and the auxiliary loss.

    Raises:
      ValueError: if a layer did not set them, since it then routes tokens to empty slots.
    """
    states = _slot_states(model)
    layers = {name: [state.get_value() for state in states[name]] for name in groups(nnx.state(model, ExpertParam)) if name in states}
    slots = [s for of_group in layers.values() for s in of_group]
    if any(s.tokens is None or s.penalty is None for s in slots):
        raise ValueError("model has a MoE layer that does not read its SlotState: it would send tokens to empty slots")
    return jnp.concatenate([sum(s.tokens for s in of_group) for of_group in layers.values()], -1), sum(s.penalty for s in slots)


def layers(model: Any) -> list[tuple[int, SlotState]]:
    """The SlotState of every layer, group after group, with the place of its group."""
    states = _slot_states(model)
    return [(place, state) for place, name in enumerate(groups(nnx.state(model, ExpertParam))) for state in states.get(name, [])]


def _slot_states(model: Any) -> dict[str | None, list[SlotState]]:
    """The SlotStates of a model's layers by their group; those without experts are of the first one."""
    flat = {path: node for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Variable)}
    first = groups(nnx.state(model, ExpertParam))[:1]
    owned, states = _owned(flat), dict[str | None, list[SlotState]]()
    for path, node in flat.items():
        if isinstance(node, SlotState):
            (name,) = owned[path[:-1]] or first
            states.setdefault(name, []).append(node)
    return states


def gather(
    experts: PyTree[Float[Array, "expert ..."]], held: Int[Array, "*slots"], names: tuple[str | None, ...] | None = None
) -> PyTree[Float[Array, "..."]]:
    """Dispatch: the weights of each held expert. Empty slots get those of expert 0, which nothing may use.

    Args:
      names: all groups, where `experts` lacks some of them.
    """
    names = groups(experts) if names is None else names
    return map_groups(lambda held, weight: weight[jnp.maximum(held, 0) % weight.shape[0]], names, held, experts)


def combine(
    slots: PyTree,
    held: Int[Array, "*slots"],
    weight: Float[Array, "*slots"],
    num_experts: int,
    names: tuple[str | None, ...] | None = None,
    onto: PyTree | None = None,
) -> PyTree[Float[Array, "expert ..."]]:
    """The inverse of `gather`: for each expert the sum over the slots that hold it, times `weight`. Empty slots are lost.

    Args:
      slots: weights of the slots, of all clients or one. A bare array of [client, slot, ...] has the slots of all groups.
      num_experts: E, or for bare arrays the experts of all groups.
      names: all groups, where `slots` lacks some of them.
      onto: sums to add to, of all experts; experts that no slot holds are then not touched.
    """

    def one(rows, values, *onto):
        held, weight = rows
        place = jnp.where(held == NO_EXPERT, num_experts, held % num_experts)
        if kernels.is_dual(values):
            return sum(onto, kernels.expert_sum(values, place, weight, num_experts))
        bucket = place.reshape(-1)
        values = values * weight.reshape(weight.shape + (1,) * (values.ndim - weight.ndim))
        flat = values.reshape(bucket.shape[0], *values.shape[held.ndim :])
        (start,) = onto or (jnp.zeros((num_experts, *flat.shape[1:]), flat.dtype),)
        return start.at[bucket].add(flat, mode="drop")

    return map_groups(one, groups(slots) if names is None else names, (held, weight), slots, *([] if onto is None else [onto]))


def held_mask(held: Int[Array, "client slot"], num_experts: int) -> Bool[Array, "client expert"]:
    """The assignment as a mask."""
    return (held[..., None] == jnp.arange(num_experts)).any(-2)


def squared_norm(experts: Any, shared: Any, sent: Bool[Array, " all_slots"], names: tuple[str | None, ...]) -> Float[Array, ""]:
    """The squared norm of a client's shared weights and of the experts in some slots."""

    def of_slots(sent, leaf):
        return jnp.where(sent.reshape(-1, *(1,) * (leaf.ndim - 1)), jnp.square(leaf), 0).sum()

    each = [*jax.tree.leaves(map_groups(of_slots, names, sent, experts)), *(jnp.square(leaf).sum() for leaf in jax.tree.leaves(shared))]
    return sum(each, start=jnp.zeros(()))
