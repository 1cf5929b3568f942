"""Router rows that stay on the client."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from fedmoe_jax import store
from fedmoe_jax.base import NO_EXPERT, Cohort
from fedmoe_jax.experts import RouterParam, combine, groups


def router_rows(experts: Any, num_clients: int, budget_bytes: float) -> Any:
    """Every client's own router rows [population, expert, ...], each starting as the model's.

    Raises:
      ValueError: if the model has no RouterParam, or the rows take more than `budget_bytes`.
    """
    rows = nnx.split_state(experts, RouterParam, ...)[0]
    if not jax.tree.leaves(rows):
        raise ValueError("router is 'personal', but the model has no RouterParam")
    return store.create(rows, num_clients, budget_bytes, "router is 'personal'")


def own_routers(experts: Any, personal: Any, client: Int[Array, ""], held: Int[Array, " slot"]) -> Any:
    """The gathered weights of a client's slots, with its own router rows in place of the model's."""
    _, others = nnx.split_state(experts, RouterParam, ...)
    return nnx.merge_state(store.of_slots(personal, client, held, groups(experts)), others)


def keep_routers(personal: Any, experts: Any, deltas: Any, cohort: Cohort, held: Any) -> tuple[Any, Any]:
    """Adds what each present client learnt to its own router rows, and to the model's so that they stay the population's mean."""
    names = groups(experts)
    num_clients, num_experts = jax.tree.leaves(personal)[0].shape[:2]
    own = cohort.present[:, None] & (held != NO_EXPERT)
    personal = store.add_to_slots(personal, cohort.client, cohort.present, held, deltas, names)
    rows, others = nnx.split_state(experts, RouterParam, ...)
    share = jnp.where(own, 1 / num_clients, 0.0)
    rows = jax.tree.map(jnp.add, rows, combine(deltas, held, share, num_experts, names))
    return personal, nnx.merge_state(rows, others)
