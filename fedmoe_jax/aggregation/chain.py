"""What clients do to their updates before they send them: transforms, in a chain that ends in an aggregator."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from fedmoe_jax import store
from fedmoe_jax.base import NO_EXPERT, Aggregator, ClientUpdate, pytree, stage_key
from fedmoe_jax.experts import map_groups
from fedmoe_jax.kernels import is_dual
from fedmoe_jax.norms import scaled


@pytree
class Message:
    """A tensor, flat, on its way: the `values` that travel and where they belong, None if they are all of it in order."""

    values: Float[Array, "*lead value"]
    index: Int[Array, "*lead value"] | None = None


class Wire(NamedTuple):
    """What a tensor of `size` numbers is on the link: so many `values` of so many `bits` each, and bits beside them."""

    size: int
    values: int
    bits: int
    overhead: int = 0


class Transform(NamedTuple):
    """One step between a client's update and what it sends, as pure functions of what one client sends.

    apply(keys, messages) -> messages: pairs of lists, of the experts' tensors and of the shared ones. Those of experts have
    a leading axis of slots, each slot being a tensor with a key of its own; what is not sent is 0, and what it becomes is lost.
    wire(wire) -> wire says what it does to what travels. `order` is its place: in a chain it goes up. With `error_feedback`
    a client keeps what this transform and those after it leave out, and adds it the next time. `bound` is the norm that it promises,
    a `clip.Bound`. One that acts in the aggregator has no `apply`: around(bound, aggregator) -> aggregator is what it makes of that.
    One that multiplies a client's whole update by a number also has factor(update, sends, names) -> that of each client, which reads no
    more of a `kernels.DualDelta` than its norm; `sends` are the slots that count.
    """

    name: str
    order: int
    apply: Callable[[Any, Any], Any] | None
    wire: Callable[[Wire], Wire]
    error_feedback: bool = False
    bound: Any = None
    around: Callable[[Any, Aggregator], Aggregator] | None = None
    factor: Callable[[ClientUpdate, Bool[Array, "client slot"], tuple[str | None, ...]], Float[Array, " client"]] | None = None

    def num_bytes(self, values: int, bits: int) -> int:
        """Bytes on the link of a tensor that has so many values of so many bits without compression."""
        return num_bytes((self,), values, bits)


class Encoder(NamedTuple):
    """What becomes of client updates on the way to an aggregator.

    init(experts, shared, num_clients, budget_bytes) -> kept, what clients keep between rounds, or None; apply(kept, client keys, client,
    good, update, names of all groups) -> (update as it arrives, kept), clients that are not `good` keeping what they have;
    num_bytes(values, bits) -> bytes of a tensor of so many values, of so many bits before.
    """

    init: Callable[[PyTree, PyTree, int, float], PyTree]
    apply: Callable[..., tuple[ClientUpdate, PyTree]]
    num_bytes: Callable[[int, int], int]


def each_tensor(function: Callable[[Key[Array, ""], Message], Message]) -> Callable[[Any, Any], Any]:
    """`Transform.apply` of a function of one tensor."""

    def apply(keys, messages):
        (of_experts, of_shared), (experts, shared) = keys, messages
        many = [jax.vmap(function)(key, message) for key, message in zip(of_experts, experts, strict=True)]
        return many, [function(key, message) for key, message in zip(of_shared, shared, strict=True)]

    return apply


def num_bytes(transforms: tuple[Transform, ...], values: int, bits: int) -> int:
    """Whole bytes of a tensor on the link after these transforms."""
    wire = Wire(values, values, bits)
    for transform in transforms:
        wire = transform.wire(wire)
    return -(-(wire.values * wire.bits + wire.overhead) // 8)


def travel(
    transforms: tuple[Transform, ...],
    key: Key[Array, ""],
    weights: tuple[PyTree, PyTree],
    numbers: tuple[Int[Array, " entry"], ...],
    names: tuple[str | None, ...],
) -> tuple[PyTree, PyTree]:
    """Weights as they arrive: (experts, shared), each tensor on its own.

    Args:
      weights: leaves of experts are [entry, ...], each entry a tensor.
      numbers: what the keys of experts are made of beside the name of the tensor, a number an entry of all groups.
      names: all groups.
    """
    if not transforms:
        return weights
    leaves = tuple(jax.tree.leaves(tree) for tree in weights)
    messages: Any = [Message(leaf.reshape(len(leaf), math.prod(leaf.shape[1:]))) for leaf in leaves[0]]
    messages = messages, [Message(leaf.reshape(leaf.size)) for leaf in leaves[1]]
    for transform in transforms:
        assert transform.apply is not None
        messages = transform.apply(_keys(stage_key(key, transform.name), weights, numbers, names), messages)
    experts = [jax.vmap(_arrived)(message, leaf) for message, leaf in zip(messages[0], leaves[0], strict=True)]
    shared = [_arrived(message, leaf) for message, leaf in zip(messages[1], leaves[1], strict=True)]
    return jax.tree.unflatten(jax.tree.structure(weights[0]), experts), jax.tree.unflatten(jax.tree.structure(weights[1]), shared)


def _arrived(message: Message, tensor: Array) -> Array:
    """What the receiver makes of a message of this tensor."""
    if message.index is None:
        return message.values.reshape(tensor.shape)
    return jnp.zeros(tensor.size, tensor.dtype).at[message.index].set(message.values).reshape(tensor.shape)


def _keys(key, weights, numbers, names):
    """A key for each tensor, by its name and the numbers of its entry; two lists, as `Transform.apply` takes them."""

    def of_entries(numbers, key):
        def one(*numbers):
            made = key
            for number in numbers:
                made = jax.random.fold_in(made, number)
            return made

        return jax.vmap(one)(*numbers)

    experts, shared = jax.tree_util.tree_map_with_path(lambda path, _: stage_key(key, jax.tree_util.keystr(path)), weights)
    return jax.tree.leaves(map_groups(of_entries, names, numbers, experts)), jax.tree.leaves(shared)


def chain(*parts: Any) -> Aggregator:
    """An aggregator of what is left of updates after some transforms, as in `chain(sparsify(share=0.05), quantize(bits=8), mean())`.

    With error feedback [1, 2, 3] a client keeps a residual for each tensor: what it wanted to send less what arrived of it, the
    error of all transforms from that one on, and adds it to its next update of that tensor. It keeps the residual as it is when it
    is absent, late or rejected, and for an expert that it does not hold or sent no token to, whose delta weighs nothing.

    Args:
      parts: transforms, in ascending order, then an aggregator.

    Returns:
      The aggregator, as it is where no transform changes what clients send. Where all that they do is to multiply whole updates, and it
      needs sums, it needs "norms" of each client, else "deltas".

    Raises:
      ValueError: if the last part is no aggregator, another one is no transform, the order is wrong, or two of them do not go together.

    References:
      [1] Seide et al., "1-Bit Stochastic Gradient Descent", Interspeech 2014.
      [2] Stich, Cordonnier and Jaggi, "Sparsified SGD with Memory", NeurIPS 2018.
      [3] Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient Compression Schemes", ICML 2019.
    """
    transforms, aggregator = _checked(parts)
    bound = next((transform.bound for transform in transforms if transform.bound is not None), None)
    for transform in transforms:
        aggregator = transform.around(bound, aggregator) if transform.around is not None else aggregator
    transforms = tuple(transform for transform in transforms if transform.apply is not None)
    if not transforms:
        return aggregator
    first = next((place for place, transform in enumerate(transforms) if transform.error_feedback), 0)
    before, after = transforms[:first], transforms[first:]

    def init(experts: PyTree, shared: PyTree, num_clients: int, budget_bytes: float) -> PyTree | None:
        if not after[0].error_feedback:
            return None
        zeros = jax.tree.map(jnp.zeros_like, (experts, shared))
        what = "sparsify with error_feedback (compress_share) keeps a residual of the whole model for every client"
        return store.create(zeros, num_clients, budget_bytes, what)

    def apply(
        kept: PyTree | None,
        keys: Key[Array, " client"],
        client: Int[Array, " client"],
        good: Bool[Array, " client"],
        update: ClientUpdate,
        names: tuple[str | None, ...],
    ) -> tuple[ClientUpdate, PyTree | None]:
        def one(key, client, good, held, sends, deltas):
            def only_sent(weights):
                return map_groups(_masked, names, sends, weights[0]), jax.tree.map(lambda leaf: jnp.where(good, leaf, 0), weights[1])

            key = stage_key(key, "encode")
            wanted = travel(before, key, only_sent(deltas), (held + 1,), names)
            if kept is not None:
                residual = store.of_slots(kept[0], client, held, names), store.of_client(kept[1], client)
                wanted = only_sent(jax.tree.map(jnp.add, wanted, residual))
            arrived = only_sent(travel(after, key, wanted, (held + 1,), names))
            return arrived, jax.tree.map(jnp.subtract, wanted, arrived)

        sends = _sends(good, update)
        (experts, shared), residual = jax.vmap(one)(keys, client, good, update.held, sends, (update.experts, update.shared))
        sent = ClientUpdate(shared, experts, update.held, update.examples, update.tokens)
        if kept is None:
            return sent, None
        slots = jnp.where(sends, update.held, NO_EXPERT)
        return sent, (store.put_slots(kept[0], client, good, slots, residual[0], names), store.put(kept[1], client, good, residual[1]))

    def multiply(kept, keys, client, good, update, names):
        sends = _sends(good, update)
        for transform in transforms:
            by = transform.factor(update, sends, names)
            shared = jax.tree.map(lambda delta, by=by: scaled(delta, by), update.shared, is_leaf=is_dual)
            experts = map_groups(lambda sends, delta, by=by: scaled(_sent(sends, delta), by), names, sends, update.experts)
            update = dataclasses.replace(update, shared=shared, experts=experts)
        return update, kept

    multiplies = aggregator.needs == "sum" and all(transform.factor is not None for transform in transforms)
    encoder = Encoder(init, multiply if multiplies else apply, lambda values, bits: num_bytes(transforms, values, bits))
    return aggregator._replace(needs="norms" if multiplies else "deltas", encoder=encoder)


def _sends(good, update: ClientUpdate) -> Bool[Array, "client slot"]:
    return good[:, None] & (update.held != NO_EXPERT) & (update.tokens > 0)


def _sent(sends, delta):
    """What is not sent is 0, or not finite where it was not; of a `DualDelta` it weighs nothing."""
    return delta if is_dual(delta) else delta * sends.reshape(*sends.shape, *(1,) * (delta.ndim - 2)).astype(delta.dtype)


def _masked(sends, leaf):
    return jnp.where(sends.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, 0)


def _checked(parts) -> tuple[tuple[Transform, ...], Aggregator]:
    if not parts or not isinstance(parts[-1], Aggregator):
        raise ValueError("chain must end in an aggregator, such as aggregation.mean()")
    *transforms, aggregator = parts
    for place, part in enumerate(transforms):
        if isinstance(part, Aggregator):
            raise ValueError(f"chain has an aggregator in place {place + 1}, nothing may follow it")
        if not isinstance(part, Transform):
            raise ValueError(f"chain has {part!r} in place {place + 1}, it must be a transform such as aggregation.quantize(bits=8)")
    if not any(transform.around for transform in transforms):
        for transform in transforms:
            if transform.apply is None:
                raise ValueError(f"chain has {transform.name} without gaussian_noise, it must be followed by it")
    if transforms and (aggregator.encoder is not None or aggregator.private is not None):
        raise ValueError("chain ends in a chain, give all transforms to one")
    for earlier, later in itertools.pairwise(transforms):
        if earlier.order >= later.order:
            problem = f"before {later.name}, it must come after it" if earlier.order > later.order else f"and {later.name}, one must go"
            raise ValueError(f"chain has {earlier.name} {'twice' if earlier.name == later.name else problem}")
        if earlier.error_feedback and later.wire(Wire(1, 1, 32)).bits < 3:
            raise ValueError(f"chain has {earlier.name} with error_feedback before fewer than 3 bits, whose errors would add up")
    return tuple(transforms), aggregator
