"""What a client receives into its slots, and what it sends of them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from fedmoe_jax.base import NO_EXPERT, ClientUpdate
from fedmoe_jax.experts import by_group, groups, map_groups
from fedmoe_jax.kernels import DualKernel, is_dual


def received_of(
    held: Int[Array, "client all_slots"], probed: Int[Array, "client all_probes"], groups: int
) -> Int[Array, "client all_candidates"]:
    """What each client is sent, group after group, what it holds first."""
    return jnp.concatenate([by_group(held, groups), by_group(probed, groups)], axis=2).reshape(len(held), -1)


def receive(experts: Any, held: Int[Array, " slot"], uses: Any) -> Any:
    """The weights of each held expert; of those that the dual engine trains no copy, but which they are."""
    own = uses[: len(jax.tree.leaves(experts))]
    leaves, treedef = jax.tree.flatten(experts)
    chosen = jax.tree.unflatten(
        treedef, [leaf if use is None else DualKernel(leaf, held[:0]) for leaf, use in zip(leaves, own, strict=True)]
    )

    def one(held, weight):
        if is_dual(weight):
            number = weight.base.shape[0]
            return dataclasses.replace(weight, held=jnp.where(held == NO_EXPERT, number, held % number))
        return weight[jnp.maximum(held, 0) % weight.shape[0]]

    return map_groups(one, groups(experts), held, chosen)


def with_bases(update: ClientUpdate, bases: list[Array]) -> ClientUpdate:
    """The update, each `DualDelta` with the weight that it changes, which no client has a copy of."""
    leaves, treedef = jax.tree.flatten((update.experts, update.shared), is_leaf=is_dual)
    whole = [dataclasses.replace(leaf, base=base) if is_dual(leaf) else leaf for leaf, base in zip(leaves, bases, strict=True)]
    experts, shared = jax.tree.unflatten(treedef, whole)
    return dataclasses.replace(update, experts=experts, shared=shared)
