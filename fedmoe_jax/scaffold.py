"""SCAFFOLD's control variates [1] for models of which each client holds a few experts.

A client adds the difference between the mean gradient of all clients and its own to each local gradient, so that it does
not drift towards its own optimum. Both are estimates: a client's is the mean of its gradients over the local steps of its last
round (for SGD option II of [1], for any other optimizer the same without its learning rate), the mean of all weighs clients
as the aggregate does, shared parameters by examples and experts by tokens. A client that has no estimate for what it holds,
since it never trained it before, trains that uncorrected. Control variates of the mean travel with all weights that a client
receives, also with experts that it only tries, and come back with those that it trained.

References:
  [1] Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020, algorithm 1.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PyTree

from fedmoe_jax import store
from fedmoe_jax.base import NO_EXPERT, pytree, static
from fedmoe_jax.experts import RouterParam, combine, gather, groups, map_groups, num_experts

_HUGE = 1e30


@pytree
class Sums:
    """Weighted sums of the control variates over all clients, and the sums of their weights."""

    experts: PyTree[Float[Array, "expert ..."]]
    shared: PyTree[Float[Array, "..."]]
    tokens: Float[Array, " all_experts"]
    examples: Float[Array, ""]


@pytree
class Controls:
    """Each client's control variates, what they weigh (0: it has none), and their sums."""

    experts: PyTree[Float[Array, "population expert ..."]]
    shared: PyTree[Float[Array, "population ..."]]
    tokens: Float[Array, "population all_experts"]
    examples: Float[Array, " population"]
    sums: Sums
    names: tuple[str | None, ...] = static()
    """The groups of all experts, also of those that have no control variates."""


def travelling(experts: PyTree, personal_router: bool) -> PyTree:
    """The expert weights that have control variates: router rows that stay on the client have none."""
    return nnx.split_state(experts, RouterParam, ...)[1] if personal_router else experts


def start(experts: PyTree, shared: PyTree, num_clients: int, budget_bytes: float, *, personal_router: bool = False) -> Controls:
    """Nobody has any.

    Raises:
      ValueError: if they take more than `budget_bytes`.
    """
    zeros = jax.tree.map(jnp.zeros_like, (travelling(experts, personal_router), shared))
    names = groups(experts)
    rows = store.create(zeros, num_clients, budget_bytes, "control_variates keeps a gradient of the whole model for every client")
    number = len(names) * num_experts(experts)
    sums = Sums(experts=zeros[0], shared=zeros[1], tokens=jnp.zeros(number), examples=jnp.zeros(()))
    tokens, examples = jnp.zeros((num_clients, number)), jnp.zeros(num_clients)
    return Controls(experts=rows[0], shared=rows[1], tokens=tokens, examples=examples, sums=sums, names=names)


def correction(controls: Controls, sums: Sums, client: Int[Array, ""], held: Int[Array, " all_slots"]) -> tuple[PyTree, PyTree]:
    """What one client adds to its gradients of its slots and of the shared parameters.

    Args:
      controls: for the client's own.
      sums: those of the start of the round.
    """
    names = controls.names
    own = store.of_slots(controls.experts, client, held, names), store.of_client(controls.shared, client)
    place = jnp.maximum(held, 0)
    known = (held != NO_EXPERT) & (controls.tokens[client, place] > 0)
    weights = known, jnp.maximum(sums.tokens[place], 1.0)

    def of_expert(rows, total, own):
        known, weight = (row.reshape(-1, *(1,) * (own.ndim - 1)) for row in rows)
        return jnp.where(known, total / weight - own, 0)

    experts = map_groups(of_expert, names, weights, gather(sums.experts, held, names), own[0])
    mean = jax.tree.map(lambda total: total / jnp.maximum(sums.examples, 1.0), sums.shared)
    shared = jax.tree.map(lambda mean, own: jnp.where(controls.examples[client] > 0, mean - own, 0), mean, own[1])
    return experts, shared


def learn(
    controls: Controls,
    client: Int[Array, " client"],
    good: Bool[Array, " client"],
    held: Int[Array, "client all_slots"],
    gradient: tuple[PyTree, PyTree],
    tokens: Int[Array, "client all_slots"],
    examples: Int[Array, " client"],
) -> Controls:
    """The controls after clients trained. Gradients so large that sums of them may overflow are left out.

    Args:
      good: clients whose update counts; the others keep what they have.
      gradient: mean gradient of the local steps, of slots [client, slot, ...] and shared parameters [client, ...].
      tokens, examples: what weighs it.
    """
    names, number = controls.names, controls.tokens.shape[1]
    largest = jnp.stack([jnp.abs(leaf).reshape(len(good), -1).max(axis=1) for leaf in jax.tree.leaves(gradient)])
    good &= (largest < _HUGE).all(axis=0)
    held = jnp.where(good[:, None], held, NO_EXPERT)
    slot = client[:, None], jnp.where(held == NO_EXPERT, number, held)
    of_slots = jax.vmap(lambda client, held: store.of_slots(controls.experts, client, held, names))(client, held)
    before = of_slots, store.of_client(controls.shared, client)
    old = controls.tokens.at[slot].get(mode="fill", fill_value=0.0), jnp.where(good, controls.examples[client], 0.0)
    new = jnp.where(held == NO_EXPERT, 0, tokens).astype(jnp.float32), jnp.where(good, examples, 0).astype(jnp.float32)
    change = jax.tree.map(jnp.subtract, gradient, before)
    return Controls(
        experts=store.add_to_slots(controls.experts, client, good, held, change[0], names),
        shared=store.add(controls.shared, client, good, change[1]),
        tokens=controls.tokens.at[slot].set(new[0], mode="drop"),
        examples=controls.examples.at[jnp.where(good, client, len(controls.examples))].set(new[1], mode="drop"),
        sums=_added(_added(controls.sums, held, new, gradient, names), held, jax.tree.map(jnp.negative, old), before, names),
        names=names,
    )


def _added(sums: Sums, held, weights: tuple[Array, Array], values: tuple[PyTree, PyTree], names: tuple) -> Sums:
    """The sums plus the weighted values of some clients. `weights` are of slots and of clients."""
    number = len(sums.tokens)
    more = Sums(
        experts=combine(values[0], held, weights[0], number // len(names), names),
        shared=jax.tree.map(lambda value: jnp.tensordot(weights[1], value, 1, precision=jax.lax.Precision.HIGHEST), values[1]),
        tokens=combine(weights[0], held, jnp.ones(held.shape), number),
        examples=weights[1].sum(),
    )
    return jax.tree.map(jnp.add, sums, more)
