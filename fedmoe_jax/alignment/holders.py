"""A least number of clients that hold an expert: the sum of one client's updates alone would be its update.

`leave_out` takes experts with fewer holders from those who hold them; `at_least` makes the bounds of load ask for as many, so that
`aligner.balanced` seldom comes to that.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from fedmoe_jax.base import NO_EXPERT, Alignment, Cohort, Feedback, LoadMonitor
from fedmoe_jax.experts import combine


def leave_out(alignment: Alignment, num_experts: int, min_holders: int) -> Alignment:
    """The alignment without the experts that fewer than `min_holders` clients hold; their slots stay empty.

    Args:
      num_experts: of all groups.
    """
    if min_holders <= 1:
        return alignment
    held = alignment.held
    number = jnp.zeros(num_experts, jnp.int32).at[jnp.where(held == NO_EXPERT, num_experts, held)].add(1, mode="drop")
    enough = (held != NO_EXPERT) & (number[jnp.maximum(held, 0)] >= min_holders)
    return dataclasses.replace(alignment, held=jnp.where(enough, held, NO_EXPERT), fitness=jnp.where(enough, alignment.fitness, 0.0))


def served(
    cohort: Cohort, alignment: Alignment, feedback: Feedback, num_experts: int, min_holders: int, *, hidden: bool
) -> tuple[Bool[Array, " all_experts"], Bool[Array, ""]]:
    """Which experts change in a round, and whether the shared part does: what enough clients sent something of.

    Args:
      cohort: those whose update arrived.
      num_experts: of all groups.
      hidden: what they sent must not tell, since it is private. Then what enough of them hold, and all if one is enough.
    """
    here = cohort.present[:, None] & (alignment.held != NO_EXPERT)
    sends = here if hidden else here & (feedback.tokens > 0)
    number = combine(sends.astype(jnp.float32), alignment.held, jnp.ones(sends.shape), num_experts)
    clients = (cohort.present if hidden else feedback.examples > 0).sum()
    always = hidden and min_holders == 1
    return (number >= min_holders) | always, (clients >= min_holders) | always


def at_least(monitor: LoadMonitor, min_holders: int) -> LoadMonitor:
    """The monitor, its bounds changed so that each expert gets `min_holders` clients or none.

    With S slots of the round, at most K of a client, as many experts are served as can be, floor(S / min_holders) or all: those whose
    bounds are highest, of equal ones those that are furthest behind. Their lower bound becomes at least min_holders; the others get no
    client, and the upper bounds of those that are served rise evenly until all slots have a place. Where that cannot be, since there
    are fewer clients than `min_holders` or fewer than K experts would be served, bounds stay as they are.

    Raises:
      ValueError: if `min_holders` < 1.
    """
    if min_holders < 1:
        raise ValueError(f"min_holders is {min_holders}, it must be at least 1")

    def bounds(
        state: PyTree, slots: Int[Array, " client"], wanted: Float[Array, " expert"]
    ) -> tuple[Int[Array, " expert"], Int[Array, " expert"]]:
        lower, upper = monitor.bounds(state, slots, wanted)
        total, clients = slots.sum(), (slots > 0).sum()
        number = jnp.minimum(total // min_holders, lower.shape[0])
        order = jnp.lexsort((-monitor.deficit(state), -(lower + upper)))
        served = jnp.argsort(order) < number
        floor = jnp.where(served, jnp.maximum(lower, min_holders), 0)
        even = -(-total // jnp.maximum(number, 1))
        most = jnp.where(served, jnp.minimum(jnp.maximum(jnp.maximum(upper, floor), even), clients), 0)
        floor = jnp.where(floor.sum() <= total, floor, jnp.where(served, min_holders, 0))
        possible = (clients >= min_holders) & (number >= slots.max())
        return jnp.where(possible, floor, lower).astype(jnp.int32), jnp.where(possible, most, upper).astype(jnp.int32)

    return monitor._replace(bounds=bounds)
