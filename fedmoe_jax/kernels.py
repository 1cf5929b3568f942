"""Products with a weight matrix: every dense product of a layer goes through here, so that a weight may have another view.

A weight is an array, or a `DualKernel`: what a client's local training made of it, written as the global weight and what
it has learnt from so far. Either is read in the dtype of `x`, so a layer that computes in bfloat16 casts its activations only.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fedmoe_jax import grouped
from fedmoe_jax.base import pytree
from fedmoe_jax.probe import Probe

_PIECES = 31  # of a long sum, at most: so many XLA adds up in one pass of a GPU


@pytree
class History:
    """The rows that a kernel saw in a local step, or several: its inputs X, the gradients G of its outputs, and their weights.

    Rows of different lanes never meet: those of a shared kernel are one lane, those of experts one for each slot, or one for
    all where tiles of rows go to slots that the router chose. Then `slot` says whose each tile is. The rows that look something
    up in a table are one-hot: of them only the place is kept. Gradients are in parts, so that they are joined where they are read.
    """

    inputs: Float[Array, "*client lane row feature"] | Int[Array, "*client lane row"]
    parts: tuple[Float[Array, "*client lane _ hidden"], ...]
    weight: Float[Array, "*client row"]
    slot: Int[Array, "*client tile"] | None = None

    @property
    def gradients(self) -> Float[Array, "*client lane row hidden"]:
        """Of all rows."""
        return self.parts[0] if len(self.parts) == 1 else jnp.concatenate(self.parts, axis=-2)


@pytree
class DualKernel:
    """The kernel scale * base + the sum over its history of X^T (weight * G), never formed [1].

    base: the global weight, the same for all clients: [feature, hidden], or [expert, feature, hidden] with `held`, the
      expert in each slot, Int[slot].
    history: in parts, none before the first step.
    tap: zeros of the shapes of the layer's inputs and outputs (and tiles). Their cotangents are what the layer saw: X, G
      (and the slot of each tile).
    ahead: where the inputs were known before training, their product with `base`, and with the inputs of the history, [1, row, other].

    References:
      [1] Irie, Csordás and Schmidhuber, "The Dual Form of Neural Networks Revisited", ICML 2022.
    """

    base: Float[Array, "*expert feature hidden"]
    held: Any = None
    scale: Any = 1.0
    history: tuple[History, ...] = ()
    tap: tuple[Array, ...] = ()
    ahead: tuple[Array, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weights that it stands for."""
        return self.base.shape if self.held is None else (*self.held.shape, *self.base.shape[1:])

    @property
    def ndim(self) -> int:
        """Axes of the weights that it stands for."""
        return len(self.shape)

    def __getitem__(self, slots: Any) -> "DualKernel":
        """Those of some slots."""
        return dataclasses.replace(self, held=self.held[slots])


@pytree
class DualDelta:
    """What clients' training added to a kernel: shrink * base + the sum of X^T (weight * G), never formed.

    Axes as in `History` and `DualKernel`, the client leading but in `base`, which is the same for all.
    """

    history: tuple[History, ...]
    shrink: Float[Array, "*client"]
    base: Any = None


def is_finite(leaf: Any) -> Bool[Array, ""]:
    """Whether all numbers of an array are finite, or those that a `DualDelta` is made of."""
    return jnp.stack([jnp.isfinite(a).all() for a in jax.tree.leaves(leaf)]).all()


def is_dual(leaf: Any) -> bool:
    """Whether it stands in the place of an array of weights."""
    return isinstance(leaf, DualKernel | DualDelta)


def matmul(x: Float[Array, "*rows feature"], w: Any) -> Float[Array, "*rows hidden"]:
    """x @ w, w being Float[feature, hidden] or a `DualKernel` of one."""
    if isinstance(w, DualKernel):
        y = _product(x.reshape(1, -1, x.shape[-1]), w, None)
        return y.reshape(*x.shape[:-1], y.shape[-1])
    w = w.note(x, False) if isinstance(w, Probe) else w
    return x @ w.astype(x.dtype)


def expert_matmul(
    x: Float[Array, "group token feature"], w: Any, expert: Int[Array, " group"] | None = None
) -> Float[Array, "group token hidden"]:
    """Each group of tokens times the weights of one expert: x[g] @ w[expert[g]], or x[e] @ w[e] without `expert`.

    w is Float[expert, feature, hidden] or a `DualKernel` of one.
    """
    if isinstance(w, DualKernel):
        return _product(x, w, expert)
    w = w.note(x, expert is not None) if isinstance(w, Probe) else w
    w = w.astype(x.dtype)
    return x @ (w if expert is None else w[expert])


def lookup(w: Any, index: Int[Array, "*rows"]) -> Float[Array, "*rows feature"]:
    """w[index], w being a table Float[entry, feature] or a `DualKernel` of one."""
    if isinstance(w, DualKernel):
        place = jnp.where(index < 0, index + w.shape[0], index)
        return _product(place.reshape(1, -1), w, None).reshape(*index.shape, w.shape[1])
    w = w.note(index, False) if isinstance(w, Probe) else w
    return w[index]


def shared_sum(delta: Any, weight: Float[Array, " client"]) -> Float[Array, "..."]:
    """Sum over clients of weight times what each added to a shared parameter: [client, ...], or a `DualDelta`."""
    if not isinstance(delta, DualDelta):
        return jnp.tensordot(weight, delta, 1)
    total = (weight @ delta.shrink) * delta.base
    for rows in delta.history:
        inputs, gradients = rows.inputs[:, 0], rows.gradients[:, 0]
        gradients = (gradients * (weight[:, None] * rows.weight)[..., None]).astype(gradients.dtype)
        if is_places(inputs):
            total = total.at[inputs].add(gradients)
        else:
            total += _sum_of_products(inputs, gradients)
    return total


def _sum_of_products(inputs, gradients):
    """Over clients and rows. A GPU gets a long sum in pieces of as many rows: XLA would cut it anyway, and pad copies of all rows.

    A CPU transposes the left factor of a product, so the smaller one goes there.
    """
    features, hidden = inputs.shape[-1], gradients.shape[-1]
    if jax.default_backend() == "cpu" and hidden < features:
        turned = jnp.einsum("crh,crd->hd", gradients, inputs, preferred_element_type=jnp.float32)
        return jax.lax.optimization_barrier(turned).T  # or XLA turns the product around again
    inputs, gradients = (a.reshape(-1, a.shape[-1]) for a in (inputs, gradients))
    rows = inputs.shape[0]
    most = min(rows // 1000, 2**22 // max(features * hidden, 1), _PIECES) if jax.default_backend() == "gpu" else 1
    pieces = max(number for number in range(1, max(most, 1) + 1) if rows % number == 0)
    inputs, gradients = (a.reshape(pieces, rows // pieces, a.shape[1]) for a in (inputs, gradients))
    return jnp.einsum("prd,prh->pdh", inputs, gradients, preferred_element_type=jnp.float32).sum(0)


def form(delta: DualDelta, *, chunk_size: int | None = None) -> Float[Array, "client feature hidden"]:
    """What each client added to a shared kernel, that of `chunk_size` clients at a time, all if None."""

    def one(client):
        shrink, history = client
        total = shrink * delta.base
        for rows in history:
            inputs = rows.inputs
            if is_places(inputs):
                inputs = jax.nn.one_hot(inputs, delta.base.shape[0], dtype=rows.parts[0].dtype)
            total += jnp.einsum("lrd,r,lrh->dh", inputs, rows.weight, rows.gradients, preferred_element_type=jnp.float32)
        return total

    return jax.lax.map(one, (delta.shrink, delta.history), batch_size=chunk_size or delta.shrink.shape[0])


def expert_sum(
    delta: DualDelta, held: Int[Array, "client slot"], weight: Float[Array, "client slot"], num_experts: int
) -> Float[Array, "expert feature hidden"]:
    """For each expert the sum over the slots that hold it of weight times what was added there. `held` is `num_experts` if empty."""
    shrink = jax.ops.segment_sum((weight * delta.shrink[:, None]).reshape(-1), held.reshape(-1), num_experts + 1)[:-1]
    history = delta.history
    if history[0].slot is not None:  # the one lane of all steps falls into tiles, each of a slot
        history = (joined(history),)
        slot = jnp.asarray(history[0].slot)
        held, weight = (jnp.take_along_axis(a, slot, axis=1) for a in (held, weight))

    def of_groups(part: History) -> grouped.Rows:
        shape = held.size, -1
        inputs, gradients = (a.reshape(*shape, a.shape[-1]) for a in (part.inputs, part.gradients))
        lanes = part.weight[:, None] if part.slot is None else part.weight.reshape(*held.shape, -1)
        return grouped.Rows(inputs, gradients, (weight[..., None] * lanes).reshape(shape))

    return shrink[:, None, None] * delta.base + grouped.outer(list(map(of_groups, history)), held.reshape(-1), num_experts)


def slot_deltas(delta: DualDelta, place: Int[Array, "client slot"]) -> Float[Array, "client slot feature hidden"]:
    """What was added to each slot, where the weights of each are a row of their own, `place`. Large: take few clients at a time."""
    return expert_sum(delta, place, jnp.ones(place.shape), delta.base.shape[0])[place]


def joined(history: tuple[History, ...]) -> History:
    """The rows and tiles of all steps."""

    def of_all(name, axis):
        return jnp.concatenate([getattr(rows, name) for rows in history], axis=axis)

    return History(
        of_all("inputs", 2), (of_all("gradients", 2),), of_all("weight", 1), None if history[0].slot is None else of_all("slot", 1)
    )


def _product(x, kernel: DualKernel, expert) -> Float[Array, "group row hidden"]:
    index = kernel.held if expert is None or kernel.held is None else kernel.held[expert]
    if not kernel.tap:
        return times(x, kernel.base, index)
    if kernel.ahead:
        return _product_ahead(x, kernel.ahead, kernel.scale, kernel.history, kernel.tap)
    return _dual(x, kernel.base, index, kernel.scale, kernel.history, expert, kernel.tap)


@jax.custom_vjp
def _dual(x, base, index, scale, history, slot, tap):
    """scale x W + ((x X^T) * weight) G: the product with the kernel, without forming it."""
    parts = [_part(x, rows.inputs, rows.gradients, rows, slot) for rows in history]
    return _sum_of_parts(x, base, index, scale, parts).astype(tap[1].dtype)


def _forward(x, base, index, scale, history, slot, tap):
    return _dual(x, base, index, scale, history, slot, tap), (x, base, index, scale, history, slot)


def _backward(kept, g):
    x, base, index, scale, history, slot = kept
    if is_places(x):
        return None, None, None, None, None, None, (x.astype(jnp.float32), g)
    parts = [_part(g, rows.gradients, rows.inputs, rows, slot) for rows in history]
    back = _sum_of_parts(g, jnp.swapaxes(base, -1, -2), index, scale, parts)
    return back, None, None, None, None, None, (x, g) if slot is None else (x, g, slot.astype(jnp.float32))


_dual.defvjp(_forward, _backward)


@jax.custom_vjp
def _product_ahead(x, ahead, scale, history, tap):
    """As `_dual`, of inputs that were known before training: their products are there, and no gradient of them is asked for."""
    product, gram = ahead
    y, first = (scale * product).astype(tap[1].dtype), 0
    for rows in history:
        number = rows.weight.shape[0]
        y = y + jnp.einsum("lrn,lnh->lrh", (gram[..., first : first + number] * rows.weight).astype(y.dtype), rows.gradients)
        first += number
    return y


_product_ahead.defvjp(lambda x, *args: (_product_ahead(x, *args), x), lambda x, g: (None, None, None, None, (x, g)))


def is_places(x: Array) -> bool:
    """Whether these are the places of one-hot rows."""
    return jnp.issubdtype(x.dtype, jnp.integer)


def times(x: Array, base: Array, index: Int[Array, " group"] | None) -> Float[Array, "*rows hidden"]:
    """x W, also of one-hot rows, W being the base of all groups or of the expert of each."""
    if is_places(x):
        return base[x]
    base = base.astype(x.dtype)
    return x @ base if index is None else grouped.matmul(x, base, index)


def _sum_of_parts(x, base, index, scale, parts: list[grouped.Part]) -> Float[Array, "group row width"]:
    """scale x W and the parts: those of groups' own rows in one pass with it, those of tiles of all groups' rows after it."""
    if index is not None and not is_places(x) and all(part.mix.shape[0] == x.shape[0] for part in parts):
        return grouped.matmul(x, base.astype(x.dtype), index, scale, parts)
    product = times(x, base, index)
    y = (scale * product).astype(product.dtype)
    for part in parts:
        y = y + jnp.einsum("lrn,lnh->lrh", part.mix, part.values).reshape(y.shape)
    return y


def _part(x, into, out, rows: History, slot) -> grouped.Part:
    """What these rows add to x W, or with `into` and `out` exchanged to x W^T."""
    mix = gram(x.reshape(into.shape[0], -1, *into.shape[2:]), into)
    mix = (mix * rows.weight).astype(out.dtype)
    if rows.slot is not None:
        own, theirs = jnp.repeat(slot, x.shape[1]), jnp.repeat(rows.slot, into.shape[1] // rows.slot.shape[0])
        mix = jnp.where(own[:, None] == theirs, mix, 0)
    return grouped.Part(mix, out)


def gram(x: Array, other: Array) -> Float[Array, "lane row other_row"]:
    """Products of all rows with all others, also of one-hot rows."""
    if is_places(x):
        return (x[:, :, None] == other[:, None, :]).astype(jnp.float32)
    return jnp.einsum("lrd,lnd->lrn", x, other)
