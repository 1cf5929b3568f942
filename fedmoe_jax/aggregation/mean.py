"""Federated averaging for experts: each is the mean over the clients that trained it, weighted by their tokens."""

import jax
import jax.numpy as jnp

from fedmoe_jax import kernels
from fedmoe_jax.base import Aggregator, ClientUpdate
from fedmoe_jax.experts import combine, groups, map_groups, num_experts


def mean() -> Aggregator:
    """The weighted mean of the clients' deltas.

    An expert's delta is weighted by the tokens that the client routed to it, the shared delta by the client's examples
    [1]. An expert that nobody trained, and a shared part that nobody trained, get delta 0. Reads sums only.

    References:
      [1] McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017.
    """

    def init(experts, shared):
        zeros = jax.tree.map(jnp.zeros_like, (experts, shared))
        return zeros, (jnp.zeros(len(groups(experts)) * num_experts(experts)), jnp.zeros(()))

    def add(total, update: ClientUpdate):
        (experts, shared), (tokens, examples) = total
        weight = update.tokens.astype(jnp.float32)
        each = update.examples.astype(jnp.float32)
        sums = combine(update.experts, update.held, weight, tokens.shape[0] // len(groups(experts)))
        counted = combine(jnp.ones_like(weight), update.held, weight, tokens.shape[0])
        experts = jax.tree.map(jnp.add, experts, sums)
        shared = jax.tree.map(lambda a, delta: a + kernels.shared_sum(delta, each), shared, update.shared)
        return (experts, shared), (tokens + counted, examples + each.sum())

    def finish(total):
        (experts, shared), (tokens, examples) = total

        def per_expert(tokens, value):
            weight = tokens.reshape(-1, *(1,) * (value.ndim - 1))
            return jnp.where(weight > 0, value / jnp.maximum(weight, 1), 0)

        return map_groups(per_expert, groups(experts), tokens, experts), jax.tree.map(lambda a: a / jnp.maximum(examples, 1), shared)

    return Aggregator(init, add, finish, needs="sum")
