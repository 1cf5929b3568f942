"""Federated averaging for experts: each is the mean over the clients that trained it, weighted by their tokens."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fedmoe_jax import kernels
from fedmoe_jax.base import Aggregator, ClientUpdate
from fedmoe_jax.experts import by_group, combine, groups, map_groups, num_experts
from fedmoe_jax.mass import Law
from fedmoe_jax.sharding import EXPERT


def mean(*, agreement: float = 0.0, few_holders: float = 0.0) -> Aggregator:
    """The weighted mean of the clients' deltas.

    An expert's delta is weighted by the tokens that the client routed to it, the shared delta by the client's examples
    [1]. An expert that nobody trained, and a shared part that nobody trained, get delta 0. Reads sums only, but for `agreement`.

    Args:
      agreement: where the signs of the clients' deltas of one number agree less, the mean is multiplied by how far they do: the
        magnitude of their weighted mean, from 0 to 1 [2]. 0 for the plain mean; otherwise it needs each client's deltas.
      few_holders: the mean of an expert that fewer clients trained than those of its group on average is multiplied by that ratio to this
        power, from 0 for the plain mean to 1, where it is in proportion to the sum over its clients.

    Raises:
      ValueError: if `agreement` or `few_holders` is out of its range.

    References:
      [1] McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017.
      [2] Tenison et al., "Gradient Masked Averaging for Federated Learning", TMLR 2023, equation 4.
    """
    for name, share in (("agreement", agreement), ("few_holders", few_holders)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} is {share}, it must be from 0 to 1")

    def init(experts, shared):
        zeros = jax.tree.map(jnp.zeros_like, (experts, shared))
        signs = jax.tree.map(jnp.zeros_like, zeros) if agreement else None
        none = jnp.zeros(len(groups(experts)) * num_experts(experts))
        return zeros, signs, (none, none if few_holders else None, jnp.zeros(()))

    def add(total, update: ClientUpdate):
        sums, signs, (tokens, clients, examples) = total
        weight = update.tokens.astype(jnp.float32)
        each = update.examples.astype(jnp.float32)

        def plus(sums, deltas):
            experts = combine(deltas[0], update.held, weight, tokens.shape[0] // len(groups(sums[0])), onto=sums[0])
            shared = jax.tree.map(lambda a, delta: a + kernels.shared_sum(delta, each), sums[1], deltas[1])
            return experts, shared

        deltas = update.experts, update.shared
        counted = combine(jnp.ones_like(weight), update.held, weight, tokens.shape[0])
        if few_holders:
            clients += combine(jnp.ones_like(weight), update.held, (weight > 0).astype(jnp.float32), tokens.shape[0])
        signs = plus(signs, jax.tree.map(jnp.sign, deltas)) if agreement else None
        return plus(sums, deltas), signs, (tokens + counted, clients, examples + each.sum())

    def finish(total):
        sums, signs, (tokens, clients, examples) = total

        def per_expert(rows, value):
            weight, *scale = (row.reshape(-1, *(1,) * (value.ndim - 1)) for row in rows)
            mean = jnp.where(weight > 0, value / jnp.maximum(weight, 1), 0)
            return mean * scale[0] if scale else mean

        def means(sums):
            experts, shared = sums
            rows = jnp.stack([tokens, _few(clients, len(groups(experts))) ** few_holders]) if few_holders else tokens[None]
            return map_groups(per_expert, groups(experts), rows, experts), jax.tree.map(lambda a: a / jnp.maximum(examples, 1), shared)

        if not agreement:
            return means(sums)
        agreed = jax.tree.map(lambda sign: jnp.where(jnp.abs(sign) < agreement, jnp.abs(sign), 1.0), means(signs))
        return jax.tree.map(jnp.multiply, means(sums), agreed)

    return Aggregator(
        init, add, finish, needs="deltas" if agreement else "sum", law=Law(counted=True, exact=not (agreement or few_holders))
    )


def _few(clients: Float[Array, " all_experts"], num_groups: int) -> Float[Array, " all_experts"]:
    """How many clients trained each expert, over the mean of those of its group that any did, at most 1."""
    clients = by_group(clients, num_groups)
    trained, total = (_of_all_experts(each.sum(axis=-1, keepdims=True)) for each in (clients > 0, clients))
    return jnp.minimum(clients * trained / jnp.maximum(total, 1), 1.0).ravel()


def _of_all_experts(total: Array) -> Array:
    """The sum over the devices that experts are spread over, if they are."""
    try:
        return jax.lax.psum(total, EXPERT)
    except NameError:  # no mesh
        return total
