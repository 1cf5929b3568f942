"""What a person reads of a round, and the accounts behind it."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fedmoe_jax.alignment import load as loads
from fedmoe_jax.base import NO_EXPERT, Alignment, Cohort, RoundCost, pytree
from fedmoe_jax.experts import by_group, held_mask


@pytree
class Info:
    """What a person reads of a round. Bytes and seconds are the round's own; `load` counts clients, `tokens` tokens, of
    each expert of each group, group after group. Seconds take an expert for one of every group, as `base.RoundCost`.

    `load_cv` is the coefficient of variation of `load`; `load_cv_total`, `load_gini_total` and `load_entropy_total`
    (normalised, 1 is even) are of tokens per expert since the start, of which the least trained expert has `load_least_total` times
    the mean. `load` counts clients whose update arrived in time. `load_violation` is by how many clients, over experts, the assignment
    had to miss the bounds of an aligner that has some: 0 where they can be met.
    `unavailable_clients` of the cohort could not be reached; `dropped_clients` are those too small or slow to take part, and
    those whose update came late. `train_loss` is NaN where nobody trained.
    `invariants` tell which of `invariants.NAMES` hold, where that is asked for.
    """

    train_loss: Float[Array, ""]
    load: Int[Array, " all_experts"]
    tokens: Float[Array, " all_experts"]
    load_violation: Int[Array, ""]
    load_cv: Float[Array, ""]
    load_cv_total: Float[Array, ""]
    load_gini_total: Float[Array, ""]
    load_entropy_total: Float[Array, ""]
    load_least_total: Float[Array, ""]
    coverage: Float[Array, ""]
    staleness_max: Int[Array, ""]
    fitness_mean: Float[Array, ""]
    assignment_value: Float[Array, ""]
    bytes_down: Float[Array, ""]
    bytes_up: Float[Array, ""]
    simulated_seconds: Float[Array, ""]
    clients: Int[Array, ""]
    unavailable_clients: Int[Array, ""]
    dropped_clients: Int[Array, ""]
    rejected_updates: Int[Array, ""]
    invariants: Bool[Array, " invariant"] | None = None


class Traffic(NamedTuple):
    """What each client holds and tries, as the most of any group, and the bytes of experts that it receives and returns."""

    held: Int[Array, " client"]
    probed: Int[Array, " client"]
    bytes_down: Float[Array, " client"]
    bytes_up: Float[Array, " client"]


def downloads(
    alignment: Alignment,
    cached: Bool[Array, "client all_experts"],
    expert_bytes: Float[Array, " group"],
    report_bytes: Float[Array, " group"] | float = 0.0,
    expert_bytes_up: Float[Array, " group"] | None = None,
) -> Traffic:
    """The traffic of an alignment, without the experts whose current version a client still has.

    Args:
      expert_bytes: of one expert of each group, on its way down.
      report_bytes: of what comes back with it beside its weights.
      expert_bytes_up: of its weights on their way up; `expert_bytes` if None.
    """
    num_groups = expert_bytes.shape[0]

    def per_group(expert, counted):
        return by_group((expert != NO_EXPERT) & counted, num_groups).sum(axis=2)  # [client, group]

    def missing(expert):
        return ~jnp.take_along_axis(cached, jnp.maximum(expert, 0), axis=1)

    held, probed = per_group(alignment.held, True), per_group(alignment.probed, True)
    down = per_group(alignment.held, missing(alignment.held)) + per_group(alignment.probed, missing(alignment.probed))
    up = expert_bytes if expert_bytes_up is None else expert_bytes_up
    return Traffic(held.max(axis=1), probed.max(axis=1), down @ expert_bytes, held @ (up + report_bytes))


def summarize(
    cohort: Cohort,
    trainees: Cohort,
    alignment: Alignment,
    cost: RoundCost,
    traffic: Traffic,
    seconds: Float[Array, " client"],
    summary: Any,
    *,
    tokens: Float[Array, " all_experts"],
    total: Float[Array, " all_experts"],
    staleness: Int[Array, " all_experts"],
    unavailable: Bool[Array, " client"],
    dropped: Bool[Array, " client"],
) -> Info:
    """The Info of a round in which `trainees` are those of the cohort that were in time."""
    arrived = trainees.present
    held = alignment.held != NO_EXPERT
    load = held_mask(jnp.where(arrived[:, None], alignment.held, NO_EXPERT), tokens.shape[0]).sum(axis=0)
    train_loss, rejected = summary
    return Info(
        train_loss=train_loss,
        load=load,
        tokens=tokens,
        load_violation=_violation(alignment.promised),
        load_cv=loads.coefficient_of_variation(load),
        load_cv_total=loads.coefficient_of_variation(total),
        load_gini_total=loads.gini(total),
        load_entropy_total=loads.normalized_entropy(total),
        load_least_total=total.min() / jnp.maximum(total.mean(), 1),
        coverage=(tokens > 0).mean(),
        staleness_max=staleness.max(),
        fitness_mean=alignment.fitness.sum() / jnp.maximum(held.sum(), 1),
        assignment_value=alignment.fitness.sum(),
        bytes_down=cohort.present.sum() * cost.shared_bytes + jnp.where(cohort.present, traffic.bytes_down, 0).sum(),
        bytes_up=arrived.sum() * cost.up[0] + jnp.where(arrived, traffic.bytes_up, 0).sum(),
        simulated_seconds=jnp.where(cohort.present, seconds, 0).max(),
        clients=arrived.sum(),
        unavailable_clients=unavailable.sum(),
        dropped_clients=dropped.sum(),
        rejected_updates=rejected,
    )


def _violation(promised):
    """Of an `alignment.Promise`, over groups; 0 where none is given or there are no bounds."""
    missed = None if promised is None else promised.violation
    return jnp.zeros((), jnp.int32) if missed is None else missed.sum().astype(jnp.int32)
