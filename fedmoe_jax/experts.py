"""Expert parameters: marked by type, split from the rest, gathered into client slots and combined back."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PyTree

from fedmoe_jax.base import NO_EXPERT, pytree


class ExpertParam(nnx.Param):
    """A parameter whose leading axis is the expert. Marking weights with it federates any nnx model.

    Clients hold a few entries of that axis, so a layer must take the number of experts from the weight itself. All layers
    follow one assignment: expert e of every layer goes to the same clients.
    """


class RouterParam(ExpertParam):
    """Router rows [expert, feature]: an expert parameter that may also stay on the client (`router="personal"`)."""


@pytree
class Slots:
    """What a MoE layer is told about the slots it computes, and what it reports back.

    `held` marks filled slots, `prior` is added to the router logits, `mask` marks real examples. The layer sets
    `tokens`, the tokens of each example that it sent to each slot, and `penalty`, its weighted auxiliary loss.
    """

    held: Bool[Array, " slot"]
    prior: Float[Array, " slot"]
    mask: Bool[Array, " example"] | None = None
    tokens: Float[Array, "example slot"] | None = None
    penalty: Float[Array, ""] | None = None


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
        `SlotState` to learn its slots from, or if the model keeps running statistics of its batches.
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
    owners = [path[:-1] for path, variable in flat.items() if isinstance(variable, SlotState)]
    for path in experts:
        if not any(path[: len(owner)] == owner for owner in owners):
            raise ValueError(f"model.{'.'.join(map(str, path))} has no SlotState beside it: its layer would send tokens to empty slots")
    if any(isinstance(variable, nnx.BatchStat) for variable in flat.values()):
        raise ValueError("model keeps batch statistics, which clients cannot share: use GroupNorm or LayerNorm")
    return parts


def num_experts(experts: PyTree) -> int:
    """The leading size of the expert parameters."""
    return jax.tree.leaves(experts)[0].shape[0]


def bind(parts: Partition, experts: PyTree, shared: PyTree, slots: Slots) -> Any:
    """A model that computes with these weights, `experts` having as many entries as `slots`. Safe to mutate."""
    model = nnx.merge(parts.graphdef, experts, shared, parts.rest, copy=True)
    for state in _slot_states(model):
        state.set_value(slots)
    return model


def report(model: Any) -> tuple[Float[Array, "example slot"], Float[Array, ""]]:
    """Tokens of each example sent to each slot, and the auxiliary loss, both summed over the layers of a bound model.

    Raises:
      ValueError: if a layer did not set them, since it then routes tokens to empty slots.
    """
    slots = [state.get_value() for state in _slot_states(model)]
    if any(s.tokens is None or s.penalty is None for s in slots):
        raise ValueError("model has a MoE layer that does not read its SlotState: it would send tokens to empty slots")
    return sum(s.tokens for s in slots), sum(s.penalty for s in slots)


def _slot_states(model: Any) -> list[SlotState]:
    return [node for _, node in nnx.iter_graph(model) if isinstance(node, SlotState)]


def gather(experts: PyTree[Float[Array, "expert ..."]], held: Int[Array, "*slots"]) -> PyTree[Float[Array, "..."]]:
    """Dispatch: the weights of each held expert. Empty slots get those of expert 0, which nothing may use."""
    return jax.tree.map(lambda weight: weight[jnp.maximum(held, 0)], experts)


def combine(
    slots: PyTree[Float[Array, "..."]], held: Int[Array, "*slots"], weight: Float[Array, "*slots"], num_experts: int
) -> PyTree[Float[Array, "expert ..."]]:
    """The inverse of `gather`: for each expert the sum over the slots that hold it, times `weight`. Empty slots are lost."""
    bucket = jnp.where(held == NO_EXPERT, num_experts, held).reshape(-1)

    def one(values):
        values = values * weight.reshape(weight.shape + (1,) * (values.ndim - weight.ndim))
        flat = values.reshape(bucket.shape[0], *values.shape[held.ndim :])
        return jax.ops.segment_sum(flat, bucket, num_segments=num_experts + 1)[:-1]

    return jax.tree.map(one, slots)


def held_mask(held: Int[Array, "client slot"], num_experts: int) -> Bool[Array, "client expert"]:
    """The assignment as a mask."""
    return (held[..., None] == jnp.arange(num_experts)).any(-2)
