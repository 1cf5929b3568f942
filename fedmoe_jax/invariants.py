"""What holds in every round, looked at on the device: checks of the assignment, the accounts and the weights."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fedmoe_jax.base import NO_EXPERT, Alignment, Cohort, Feedback
from fedmoe_jax.experts import by_group

NAMES = (
    "clients hold experts that exist, each once, and no more than their slots",
    "absent clients hold nothing and report nothing",
    "the load of experts lies between 0 and the clients, and adds up to the slots that are filled",
    "the tokens that clients report are those of the experts",
    "weights are finite",
    "clients fill their slots and the load of experts lies within its bounds, or as far outside as the aligner reports",
    "the aggregate is what clients sent",
)
"""The invariants, in the order of `holding`."""


def as_promised(alignment: Alignment, kept: Alignment, min_holders: int, groups: int, num_experts: int) -> Bool[Array, ""]:
    """Whether an aligner kept what it promised, and an expert lost its holders only where it had too few.

    Args:
      alignment: as the aligner made it; where it promises nothing, nothing is expected.
      kept: what is left of it, see `alignment.holders`.
      num_experts: of all groups.
    """

    def load(held):
        return jnp.zeros(num_experts, jnp.int32).at[jnp.where(held == NO_EXPERT, num_experts, held)].add(1, mode="drop")

    held, promised, each = alignment.held, alignment.promised, load(alignment.held)
    good = (load(kept.held) == jnp.where(each >= min_holders, each, 0)).all() & ((kept.held == held) | (kept.held == NO_EXPERT)).all()
    if promised is None:
        return good
    good &= (by_group(held != NO_EXPERT, groups).sum(axis=2) == promised.slots.reshape(len(held), groups)).all()
    if promised.lower is None:
        return good
    lower = jnp.maximum(promised.lower, 0)
    outside = each - jnp.clip(each, lower, jnp.maximum(lower, promised.upper))
    return good & (jnp.abs(by_group(outside, groups)).sum(axis=1) == promised.violation.reshape(groups)).all()


def holding(
    cohort: Cohort,
    trainees: Cohort,
    alignment: Alignment,
    feedback: Feedback,
    load: Int[Array, " all_experts"],
    tokens: Float[Array, " all_experts"],
    weights: Any,
    groups: int,
    kept: Bool[Array, ""],
    conserved: Bool[Array, ""],
) -> Bool[Array, " invariant"]:
    """Which of `NAMES` hold after a round.

    Args:
      cohort, trainees: those sampled, and those of them whose update arrived.
      load, tokens: clients and tokens of each expert, group after group.
      weights: the new ones.
      groups: groups of experts. Where clients hold all experts of a group, they need no slots for it.
      kept, conserved: the last two, see `as_promised` and `mass.conserved`.
    """
    held, each = alignment.held, load.shape[0] // groups
    filled = held != NO_EXPERT
    per_group = by_group(filled, groups).sum(axis=2)
    room = jnp.where(per_group == each, each, cohort.slots[:, None])
    first = jnp.repeat(jnp.arange(groups) * each, held.shape[1] // groups)
    exist = jnp.where(filled, (held >= first) & (held < first + each), True).all()
    ordered = jnp.sort(jnp.where(filled, held, -1 - jnp.arange(held.shape[1])), axis=1)
    once = (ordered[:, 1:] != ordered[:, :-1]).all()
    arrived = trainees.present[:, None] & filled
    reported = jnp.where(filled, feedback.tokens, 0)
    silent = jnp.where(trainees.present, 0, feedback.examples + reported.sum(axis=1)).sum() == 0
    of_experts = jnp.zeros(load.shape[0]).at[jnp.maximum(held, 0)].add(reported.astype(jnp.float32))
    return jnp.stack([
        exist & once & (per_group <= room).all(),
        silent & ~(filled & ~cohort.present[:, None]).any(),
        ((load >= 0) & (load <= trainees.present.sum())).all() & (load.sum() == arrived.sum()),
        jnp.allclose(of_experts, tokens, rtol=1e-6, atol=0.5),
        jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(weights)]).all(),
        kept,
        conserved,
    ])  # fmt: skip
