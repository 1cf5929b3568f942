"""Local training without weights of each client's own: the dual engine.

A kernel W after some steps of SGD is W_0 + sum_t X_t^T (-lr G_t), X_t being a layer's inputs and G_t the gradients of its
outputs in step t. So x W = x W_0 + (x X^T)(-lr G), and W is never formed: the product with W_0 is one for all clients, the
rest is small while a client's rows are few [1]. Biases, norms, routers and whatever else is not a factor of one product
stay arrays of the client's own beside it, as in `primal`.

Any optimizer that acts on each entry alone and linearly (SGD, momentum, weight decay, FedProx, schedules) may be used: it is
run on the coefficients of W in the basis (W_0, X_0^T G_0, X_1^T G_1, ...), where the gradient of step t is a unit vector.

References:
  [1] Irie, Csordás and Schmidhuber, "The Dual Form of Neural Networks Revisited", ICML 2022.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from fedmoe_jax.base import LossFn, Population
from fedmoe_jax.experts import Partition
from fedmoe_jax.kernels import DualDelta, DualKernel, History, is_dual
from fedmoe_jax.local.primal import LocalResult, local_batches, num_steps, objective
from fedmoe_jax.probe import Probe

UNROLLED = 8
"""Up to so many steps are unrolled, so that each one costs only the history that exists; more run in a loop."""

MOST_PLACES = 1 << 24
"""Rows of a table, at most: places come back as cotangents, in float32."""


class Use(NamedTuple):
    """How a step uses a kernel: the shapes of its inputs and outputs [group, row, width], and whether groups are tiles.

    Tiles of rows go to slots that the router chose; otherwise group g is slot g, or the kernel is shared and there is one.
    The inputs of a table are the places that are looked up, [1, row]. `known`: no weight has a part in the inputs, and those of
    all steps are multiplied at once, before training.
    """

    inputs: jax.ShapeDtypeStruct
    outputs: jax.ShapeDtypeStruct
    tiled: bool
    known: bool = False

    @property
    def is_table(self) -> bool:
        """Whether the inputs are places."""
        return len(self.inputs.shape) == 2

    @property
    def features(self) -> int:
        """Numbers that are kept of a row: one of a place."""
        return 1 if self.is_table else self.inputs.shape[2]


class _Known(NamedTuple):
    """Inputs of all steps, known before training, and their products with the kernel as received and with each other [1, row, ...]."""

    inputs: Array
    product: Array
    gram: Array

    def at(self, step: int, use: Use) -> tuple[Array, Array]:
        """Both products of the inputs of a step, those with inputs of the steps before."""
        rows = use.inputs.shape[1]
        own = slice(step * rows, (step + 1) * rows)
        return self.product[:, own], self.gram[:, own, : step * rows]


class _Rows(NamedTuple):
    """Inputs (or places of one-hot ones) [lane, row, width] and gradients, in parts, of some steps from `first`, and whose each tile is."""

    inputs: Array
    parts: tuple[Array, ...]
    slot: Array | None
    first: int
    steps: int


def train(
    key: Key[Array, ""],
    population: Population,
    client: Int[Array, ""],
    experts: PyTree,
    shared: PyTree[Float[Array, "..."]],
    filled: Bool[Array, " all_slots"],
    prior: Float[Array, " all_slots"],
    *,
    uses: tuple[Use | None, ...],
    parts: Partition,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    batch_size: int,
    local_epochs: int | None,
    local_steps: int | None,
    prox: Sequence[float],
) -> LocalResult:
    """Trains one client; vmap lifts it to a cohort. Same result as `primal.train`, to rounding.

    Args:
      experts, shared: as received. Where `uses` has an entry, experts are a `DualKernel` without history.
      uses: for each leaf of (experts, shared) its use, None for what stays an array of the client's own.

    Returns:
      As `primal.train`, with a `DualDelta` in the place of each kernel.
    """
    received, treedef = jax.tree.flatten((experts, shared), is_leaf=is_dual)
    tree = functools.partial(jax.tree.unflatten, treedef)
    sizes: dict[str, Any] = dict(batch_size=batch_size, local_epochs=local_epochs, local_steps=local_steps)
    most, steps = (num_steps(number, **sizes) for number in (population.max_examples, population.num_examples(client)))
    batches = local_batches(key, population, client, most, batch_size)
    start = [leaf if use is None else _unit(leaf, 0, most) for leaf, use in zip(received, uses, strict=True)]
    taps = [None if use is None else _tap(use) for use in uses]
    known: list[_Known | None] = [None] * len(uses)
    if most <= UNROLLED and any(use is not None and use.known for use in uses):
        whole = jax.vmap(batches)(jnp.arange(most))
        batches = lambda index: jax.tree.map(lambda rows: rows[index], whole)  # noqa: E731
        look = functools.partial(_inputs, parts, loss_fn, tree, received, uses)
        inputs = jax.vmap(lambda batch: look(batch, filled, prior, key))(whole)
        known = [None if x is None else _multiplied(x, leaf) for x, leaf in zip(inputs, received, strict=True)]

    def loss(small, taps, weights, histories, index, *args):
        leaves = [
            own if use is None else _kernel(leaf, weight, history, tap, multiplied and multiplied.at(index, use))
            for leaf, own, weight, history, tap, use, multiplied in zip(received, small, weights, histories, taps, uses, known, strict=True)
        ]
        return objective(parts, loss_fn, *tree(leaves), *args)

    def step(index, carry, histories):
        weights, optimizer_state, (tokens, correct, total, trained_loss, trained) = carry
        batch = batches(index)
        small = [weight if use is None else None for weight, use in zip(weights, uses, strict=True)]
        args = weights, histories, index, batch, filled, prior, jax.random.fold_in(key, index)
        (grads, seen), (losses, rights, sent) = jax.grad(loss, (0, 1), has_aux=True)(small, taps, *args)
        grads = [g if use is None else _unit(leaf, index + 1, most) for leaf, g, use in zip(received, grads, uses, strict=True)]
        pulled = zip(prox, grads, weights, start, strict=True)
        grads = [g + pull * (w - w0) if pull else g for pull, g, w, w0 in pulled]
        updates, new_state = optimizer.update(tree(grads), optimizer_state, tree(weights))
        sums = (
            tokens + sent.sum(0),
            correct + rights @ sent,
            total + losses @ sent,
            trained_loss + losses.sum(),
            trained + batch.mask.sum(),
        )
        new = jax.tree.leaves(optax.apply_updates(tree(weights), updates)), new_state, sums
        return jax.tree.map(lambda new, old: jnp.where(index < steps, new, old), new, carry), seen

    none = jnp.zeros(filled.shape[0])
    carry = start, optimizer.init(tree(start)), (none, none, none, jnp.zeros(()), jnp.zeros(()))
    (weights, _, sums), histories = (_unrolled if most <= UNROLLED else _looped)(step, carry, uses, most)
    histories = [history if ahead is None else [_whole(ahead, history)] for ahead, history in zip(known, histories, strict=True)]
    deltas = [
        weight - leaf if use is None else DualDelta(_weighted(history, weight), weight.reshape(-1)[0] - 1)
        for leaf, weight, history, use in zip(received, weights, histories, uses, strict=True)
    ]
    return LocalResult(*tree(deltas), *sums)


def _unit(leaf, place, steps) -> Float[Array, "basis ..."]:
    """The coefficients of W_0 (place 0) or the gradient of step place - 1, with as many axes as the weights have."""
    return jax.nn.one_hot(place, steps + 1).reshape(-1, *(1,) * (leaf.ndim - 1))


def _tap(use: Use):
    tap = jnp.zeros(use.inputs.shape, use.inputs.dtype), jnp.zeros(use.outputs.shape, use.outputs.dtype)
    return (*tap, jnp.zeros(use.inputs.shape[0])) if use.tiled else tap


def _kernel(leaf, coefficients, history, tap, ahead=None) -> DualKernel:
    base = leaf if isinstance(leaf, DualKernel) else DualKernel(leaf)
    own: dict[str, Any] = dict(scale=coefficients.reshape(-1)[0], history=_weighted(history, coefficients), tap=tap)
    return dataclasses.replace(base, **own, ahead=ahead or ())


def _inputs(parts, loss_fn, tree, received, uses, batch, held, prior, key) -> list[Array | None]:
    """What goes into the kernels whose inputs are known, of a batch."""
    probes = [Probe(leaf) if use is not None and use.known else None for leaf, use in zip(received, uses, strict=True)]
    weights = [leaf if probe is None else probe for leaf, probe in zip(received, probes, strict=True)]
    experts, shared = tree(weights)
    objective(parts, loss_fn, experts, shared, batch, held, prior, key)
    return [None if probe is None else probe.inputs for probe in probes]


def _multiplied(inputs: Float[Array, "step *row feature"], leaf: Array) -> _Known:
    rows = inputs.reshape(1, -1, inputs.shape[-1])
    return _Known(rows, rows @ leaf.astype(rows.dtype), jnp.einsum("lrd,lnd->lrn", rows, rows))


def _whole(known: _Known, history: list[_Rows]) -> _Rows:
    """The history of all steps in one, its inputs as they were known."""
    return _Rows(known.inputs, tuple(part for rows in history for part in rows.parts), None, 0, len(history))


def _weighted(history: list[_Rows], coefficients) -> tuple[History, ...]:
    """The rows with the weights that their steps have in the kernel by now."""
    of_step = coefficients.reshape(-1)[1:]

    def one(rows: _Rows) -> History:
        weight = of_step[rows.first : rows.first + rows.steps]
        return History(rows.inputs, rows.parts, jnp.repeat(weight, rows.inputs.shape[1] // rows.steps), rows.slot)

    return tuple(map(one, history))


def _rows(seen, use: Use, first: int = 0, steps: int = 1) -> _Rows:
    """What a kernel saw in a step, in lanes."""
    inputs, gradients, *slot = seen
    if not use.tiled:
        return _Rows(inputs.astype(jnp.int32) if use.is_table else inputs, (gradients,), None, first, steps)
    inputs, gradients = (a.reshape(1, -1, a.shape[-1]) for a in (inputs, gradients))
    return _Rows(inputs, (gradients,), slot[0].astype(jnp.int32), first, steps)


def _unrolled(step, carry, uses, steps):
    """The steps one after the other, each with the history that exists."""
    histories: list[list[_Rows]] = [[] for _ in uses]
    for index in range(steps):
        carry, seen = step(index, carry, histories)
        histories = [
            history if use is None else [*history, _rows(rows, use, index)]
            for history, rows, use in zip(histories, seen, uses, strict=True)
        ]
    return carry, histories


def _looped(step, carry, uses, steps):
    """The steps in a loop. Rows of steps to come are 0 and weigh nothing."""

    def whole(stored, use):
        return [] if use is None else [_Rows(*stored, 0, steps)]

    def body(index, state):
        carry, stored = state
        carry, seen = step(index, carry, list(map(whole, stored, uses)))
        new = [None if use is None else _rows(rows, use)[:3] for rows, use in zip(seen, uses, strict=True)]
        return carry, jax.tree.map(functools.partial(_put, index), stored, new)

    def empty(use):
        of_step = _rows(_tap(use), use)[:3]
        return jax.tree.map(lambda a: jnp.repeat(a, steps, axis=_axis(a)), of_step)

    start = carry, [None if use is None else empty(use) for use in uses]
    carry, stored = jax.lax.fori_loop(0, steps, body, start)
    return carry, list(map(whole, stored, uses))


def _put(index, stored, new):
    return jax.lax.dynamic_update_slice_in_dim(stored, new, index * new.shape[_axis(new)], _axis(new))


def _axis(rows) -> int:
    """The axis of rows, of [lane, row, width] or [lane, row], or of tiles."""
    return rows.ndim // 2
