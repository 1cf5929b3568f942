"""Local training with each client's own copy of the weights it holds: the primal engine."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from fedmoe_jax.base import Batch, LossFn, Population, pytree
from fedmoe_jax.experts import Partition, RouterParam, Slots, bind, by_group, groups, report
from fedmoe_jax.kernels import is_dual
from fedmoe_jax.sampling import permutation

_AT_ONCE = 1 << 12  # examples of a client's local training whose order is drawn at once


@pytree
class LocalResult:
    """What one client's training leaves: the deltas of what it received, and sums over all its local steps.

    Weights have the slots of their group, sums those of all groups, group after group. Where the dual engine trained a kernel,
    its delta is a `kernels.DualDelta`. `gradient` is the mean of (experts, shared) over the steps, where it was corrected.
    """

    experts: PyTree
    shared: PyTree
    tokens: Float[Array, " all_slots"]
    correct: Float[Array, " all_slots"]
    loss: Float[Array, " all_slots"]
    train_loss: Float[Array, ""]
    trained: Float[Array, ""]
    gradient: PyTree | None = None


def objective(
    parts: Partition, loss_fn: LossFn, experts: PyTree, shared: PyTree, batch: Batch, held: Array, prior: Array, key: Array
) -> tuple[Float[Array, ""], tuple[Array, Array, Array]]:
    """The mean loss over real examples plus the layers' auxiliary losses, and (loss, correct, tokens) of each example."""
    model = bind(parts, experts, shared, Slots(held, prior, batch.mask))
    loss, aux = loss_fn(model, batch, key)
    tokens, penalty = report(model)
    loss = jnp.where(batch.mask, loss, 0)
    correct = jnp.where(batch.mask, aux.get("correct", jnp.zeros_like(loss)), 0)
    mean = loss.sum() / jnp.maximum(batch.mask.sum(), 1)
    return mean + penalty, (loss, correct, jnp.where(batch.mask[:, None], tokens, 0))


def pulls(parts: Partition, prox: float, prox_on: str) -> tuple[float, ...]:
    """Weight of FedProx's pull [1] on each leaf of (experts, shared).

    Args:
      prox: the weight where it pulls.
      prox_on: "all" weights, the "shared" part alone, or the rows of the "router" alone, so that what a client does not hold is
        not left behind.

    Raises:
      ValueError: if there is no such part, or the model has no RouterParam to pull.

    References:
      [1] Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, eq. 2.
    """
    if prox_on not in ("all", "shared", "router"):
        raise ValueError(f"prox_on is {prox_on!r}, it must be 'all', 'shared' or 'router'")
    is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
    experts, shared = (jax.tree.leaves(tree, is_leaf=is_variable) for tree in (parts.experts, parts.shared))
    routers = [isinstance(variable, RouterParam) for variable in experts] + [False] * len(shared)
    if prox and prox_on == "router" and not any(routers):
        raise ValueError("prox_on is 'router', but the model has no RouterParam")
    chosen = {"all": [True] * len(routers), "shared": [False] * len(experts) + [True] * len(shared), "router": routers}[prox_on]
    return tuple(prox if pulled else 0.0 for pulled in chosen)


def num_steps(num_examples: Any, *, batch_size: int, local_epochs: int | None, local_steps: int | None) -> Any:
    """Local steps of a client: `local_steps`, or as many as `local_epochs` passes over its examples take."""
    return local_steps if local_steps is not None else local_epochs * -(-num_examples // batch_size)  # type: ignore[operator]


def num_processed(num_examples: Any, *, batch_size: int, local_epochs: int | None, local_steps: int | None) -> Any:
    """Examples that a client with `num_examples` processes in a round, each as often as it is in a batch."""
    if local_steps is None:
        return num_examples * local_epochs
    epochs, steps = jnp.divmod(local_steps, jnp.maximum(-(-num_examples // batch_size), 1))
    return epochs * num_examples + jnp.minimum(steps * batch_size, num_examples)


def local_order(key: Key[Array, ""], num_examples: Int[Array, ""], step: Int[Array, ""] | int, batch_size: int) -> Int[Array, " row"]:
    """Which of a client's examples are in the batch of a local step, `num_examples` in rows without one.

    Every epoch visits each example of the client once, in an order of its own.
    """
    steps_per_epoch = jnp.maximum(-(-num_examples // batch_size), 1)
    position = (step % steps_per_epoch) * batch_size + jnp.arange(batch_size)
    shuffled = permutation(jax.random.fold_in(key, step // steps_per_epoch), position, num_examples)
    return jnp.where(position < num_examples, shuffled, num_examples)


def local_batch(key: Key[Array, ""], population: Population, client: Int[Array, ""], step: Int[Array, ""] | int, batch_size: int) -> Batch:
    """The batch of a local step."""
    return population.batch(client, local_order(key, population.num_examples(client), step, batch_size))


def local_batches(
    key: Key[Array, ""], population: Population, client: Int[Array, ""], steps: int, batch_size: int
) -> Callable[[Int[Array, ""] | int], Batch]:
    """`local_batch` as a function of the step. Of few examples all orders are drawn at once: on a GPU each draw is kernels of its own."""
    if steps * batch_size > _AT_ONCE:
        return lambda step: local_batch(key, population, client, step, batch_size)
    size = population.num_examples(client)
    orders = jax.vmap(lambda step: local_order(key, size, step, batch_size))(jnp.arange(steps))
    return lambda step: population.batch(client, orders[step])


def train(
    key: Key[Array, ""],
    population: Population,
    client: Int[Array, ""],
    experts: PyTree[Float[Array, "slot ..."]],
    shared: PyTree[Float[Array, "..."]],
    held: Bool[Array, " all_slots"],
    prior: Float[Array, " all_slots"],
    *,
    parts: Partition,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    batch_size: int,
    local_epochs: int | None,
    local_steps: int | None,
    prox: Sequence[float],
    correction: PyTree | None = None,
) -> LocalResult:
    """Trains one client's slots and its copy of the shared parameters; vmap lifts it to a cohort.

    `experts` has the slots of each weight's group, `held` and `prior` those of all groups, group after group.
    `prox` is the weight of the pull of each leaf towards what was received, see `pulls`. `correction`, of
    (experts, shared), is added to each gradient, see `scaffold`. Under vmap clients with fewer steps wait, unchanged, for the
    one with the most.
    """
    received = (experts, shared)
    sizes: dict[str, Any] = dict(batch_size=batch_size, local_epochs=local_epochs, local_steps=local_steps)
    batches = local_batches(key, population, client, num_steps(population.max_examples, **sizes), batch_size)
    gradient = jax.grad(lambda weights, *args: objective(parts, loss_fn, *weights, *args), has_aux=True)

    def step(index, carry):
        weights, optimizer_state, (tokens, correct, loss, total, trained), seen = carry
        batch = batches(index)
        grads, (losses, rights, sent) = gradient(weights, batch, held, prior, jax.random.fold_in(key, index))
        if correction is not None:
            seen = jax.tree.map(jnp.add, seen, grads)
            grads = jax.tree.map(jnp.add, grads, correction)
        if any(prox):
            leaves = zip(prox, *map(jax.tree.leaves, (grads, weights, received)), strict=True)
            grads = jax.tree.unflatten(jax.tree.structure(grads), [g + pull * (w - w0) if pull else g for pull, g, w, w0 in leaves])
        updates, optimizer_state = optimizer.update(grads, optimizer_state, weights)
        sums = (tokens + sent.sum(0), correct + rights @ sent, loss + losses @ sent, total + losses.sum(), trained + batch.mask.sum())
        return optax.apply_updates(weights, updates), optimizer_state, sums, seen

    none = jnp.zeros(held.shape[0])
    unseen = None if correction is None else jax.tree.map(jnp.zeros_like, received)
    start = (received, optimizer.init(received), (none, none, none, jnp.zeros(()), jnp.zeros(())), unseen)
    steps = num_steps(population.num_examples(client), **sizes)
    weights, _, sums, seen = jax.lax.fori_loop(0, steps, step, start)
    delta_experts, delta_shared = jax.tree.map(jnp.subtract, weights, received)
    result = LocalResult(delta_experts, delta_shared, *sums)
    return dataclasses.replace(result, gradient=jax.tree.map(lambda total: total / jnp.maximum(steps, 1), seen))


def solo_losses(
    key: Key[Array, ""],
    batch: Batch,
    experts: PyTree,
    shared: PyTree[Float[Array, "..."]],
    held: Bool[Array, " all_slots"],
    prior: Float[Array, " all_slots"],
    *,
    parts: Partition,
    loss_fn: LossFn,
) -> Float[Array, "group candidate"]:
    """The loss of each candidate expert used alone, as received, on one batch of a client's examples.

    Its group's layers use the candidate alone, the others what the client holds. What does not depend on the candidate, such
    as the layers below the first MoE layer, is computed once for all.

    Args:
      experts: the client's slots of each group, then its other candidates, [candidate, ...] or a `kernels.DualKernel`.
      held, prior: of the slots of all groups.
    """
    names = groups(parts.experts)
    held, prior = by_group(held, len(names)), by_group(prior, len(names))

    def put(rows, place, value):
        return jnp.concatenate([rows[:place].reshape(-1), jnp.full(1, value, rows.dtype), rows[place + 1 :].reshape(-1)])

    def losses(place, name):
        candidates, others = nnx.split_state(experts, lambda _, variable: variable.group == name, ...)
        others = jax.tree.map(lambda weight: weight[: held.shape[1]], others, is_leaf=is_dual)
        slots = Slots(put(held, place, True), put(prior, place, 0), batch.mask)
        axes = jax.tree.map(_slot_axis, candidates, is_leaf=is_dual)

        def one(candidate):
            alone = jax.tree.map(_one_slot, candidate, is_leaf=is_dual)
            loss, _ = loss_fn(bind(parts, nnx.merge_state(alone, others), shared, slots), batch, key)
            return jnp.where(batch.mask, loss, 0).sum() / jnp.maximum(batch.mask.sum(), 1)

        return jax.vmap(one, in_axes=(axes,))(candidates)

    return jnp.stack([losses(place, name) for place, name in enumerate(names)])


def _slot_axis(weight):
    """What vmap maps over to take one slot of a weight after the other."""
    return jax.tree.unflatten(jax.tree.structure(weight), [None, 0, None]) if is_dual(weight) else 0


def _one_slot(weight):
    """A weight of no slot axis as that of one slot."""
    return dataclasses.replace(weight, held=weight.held[None]) if is_dual(weight) else weight[None]
