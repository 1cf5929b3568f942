"""The state that a round carries to the next, and how it begins."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from fedmoe_jax import cache, posterior, scaffold
from fedmoe_jax.base import pytree
from fedmoe_jax.experts import groups, num_experts


@pytree
class State:
    """What the next round reads. `personal` holds each client's own router rows, or None when they are shared; `controls` the
    control variates of SCAFFOLD, `statistics` those of each MoE layer for the global router, `residuals` what compression kept
    of each client's updates of (experts, shared), `private` what a private aggregator keeps, or None without.

    `tokens` and `last_trained` have the experts of all groups, group after group. `pace` is how many times as long as its
    profile says each client took lately.
    """

    key: Key[Array, ""]
    round: Int[Array, ""]
    experts: PyTree[Float[Array, "expert ..."]]
    shared: PyTree[Float[Array, "..."]]
    personal: PyTree[Float[Array, "population expert ..."]] | None
    controls: scaffold.Controls | None
    statistics: tuple[posterior.Statistics, ...] | None
    residuals: PyTree[Float[Array, "population ..."]] | None
    private: PyTree | None
    optimizer: PyTree
    aligner: PyTree
    tokens: Float[Array, " all_experts"]
    last_trained: Int[Array, " all_experts"]
    pace: Float[Array, " population"]
    cache: cache.Cache


def start(key, clients, parts, own, server_optimizer, aligner) -> State:
    """The state before the first round. Arrays are copied, since one that occurs twice cannot be donated."""
    weights = jax.tree.map(jnp.copy, (parts.experts, parts.shared))
    number = len(groups(parts.experts))
    experts, places = number * num_experts(parts.experts), number * (aligner.max_slots + aligner.probes)
    learnt = jax.tree.map(jnp.copy, aligner.init(clients))
    personal, controls, statistics, residuals, private = own
    return State(
        key=jnp.copy(key), round=jnp.int32(0), experts=weights[0], shared=weights[1], personal=personal, controls=controls,
        statistics=statistics, residuals=residuals, private=private, optimizer=server_optimizer.init(weights), aligner=learnt,
        tokens=jnp.zeros(experts), last_trained=jnp.full(experts, -1, jnp.int32), pace=jnp.ones(clients),
        cache=cache.empty(clients, places),
    )  # fmt: skip
