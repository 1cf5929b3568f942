"""Client capacity: how many experts a client can hold and train before the round's deadline."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from fedmoe_jax.base import Aligner, ClientProfile, Cohort, Population, RoundCost
from fedmoe_jax.devices import PLAIN


def seconds(
    profile: ClientProfile,
    cost: RoundCost,
    slots: Int[Array, " client"],
    *,
    examples: Int[Array, " client"] | None = None,
    probes: int | Int[Array, " client"] = 0,
    downloads: Float[Array, " client"] | Int[Array, " client"] | None = None,
) -> Float[Array, " client"]:
    """How long each client's round takes by its profile: download, then local training, then upload.

    The client downloads the shared part and `slots + probes` experts, scores each of them alone and sees what it sends to them
    where that is part of `cost`, trains the shared part and `slots` experts on `examples` examples, and uploads the shared part and
    `slots` experts with their reports.

    Args:
      profile: what each client can afford.
      cost: what the shared part and each expert cost.
      slots: experts that each client holds; 0 is allowed.
      examples: examples that each client processes in the round, all epochs together; default 1.
      probes: unheld experts that each client tries. Clients without slots try none.
      downloads: experts that each client downloads, where it still has some; default `slots + probes`.
    """
    tried = slots + jnp.where(slots > 0, probes, 0)
    downloads = tried if downloads is None else downloads
    flops = cost.shared_flops + slots * cost.expert_flops
    if examples is not None:
        flops = flops * examples
    flops = flops + jnp.where(slots > 0, cost.report_flops + cost.solo_shared_flops + tried * cost.solo_expert_flops, 0)
    download = (cost.shared_bytes + downloads * cost.expert_bytes) / profile.downlink_bytes_per_second
    shared, expert = cost.up
    upload = (shared + slots * (expert + cost.report_bytes)) / profile.uplink_bytes_per_second
    return download + flops / profile.flops_per_second + upload


def slots(
    profile: ClientProfile,
    cost: RoundCost,
    *,
    deadline: float | Float[Array, ""] | None,
    max_slots: int,
    examples: Int[Array, " client"] | None = None,
    probes: int = 0,
    pace: Float[Array, " client"] | float = 1.0,
) -> Int[Array, " client"]:
    """The most experts, up to `max_slots`, that each client fits in its memory and trains before the deadline.

    Probes take time but no more memory: tried one by one before training, they need less than its gradients.

    Args:
      profile: what each client can afford, one row for each client of the cohort.
      cost: what the shared part and each expert cost.
      deadline: seconds of `seconds(...)` that the round may take; None or inf is no limit.
      max_slots: the most experts that any client gets, at least 1.
      examples, probes: as in `seconds`.
      pace: how many times as long as its profile says each client took lately, see `observe`.

    Returns:
      0 to `max_slots`; 0 when not even one expert fits, or where a number of the profile is NaN.

    Raises:
      ValueError: if `max_slots` < 1, `probes` < 0 or a concrete `deadline` is not positive.
    """
    if max_slots < 1:
        raise ValueError(f"max_slots is {max_slots}, it must be at least 1")
    if probes < 0:
        raise ValueError(f"probes is {probes}, it must not be negative")
    if deadline is not None and not isinstance(deadline, jax.core.Tracer) and not np.asarray(deadline) > 0:
        raise ValueError(f"deadline is {deadline}, it must be a positive number of seconds, or None for no limit")

    def fits(count: Int[Array, ""]) -> Bool[Array, " client"]:
        held = jnp.full(profile.memory_bytes.shape, count)
        in_memory = cost.shared_memory + held * cost.expert_memory <= profile.memory_bytes
        if deadline is None:
            return in_memory
        return in_memory & (pace * seconds(profile, cost, held, examples=examples, probes=probes) <= deadline)

    return jax.vmap(fits)(jnp.arange(1, max_slots + 1)).sum(axis=0, dtype=jnp.int32)  # more experts never fit better


def observe(
    pace: Float[Array, " client"], observed: Float[Array, " client"], by_profile: Float[Array, " client"], *, beta: float = 0.3
) -> Float[Array, " client"]:
    """The pace of clients after a round, pace <- (1 - beta) pace + beta observed / by_profile; 1 is what the profile says.

    Args:
      pace: what was known before.
      observed: seconds that the round took each client, also those whose update came after the deadline. What is not finite
        teaches nothing.
      by_profile: `seconds(...)` of the same round.
      beta: weight of the newest observation, 0 to 1.

    Raises:
      ValueError: if `beta` is out of its range.
    """
    if isinstance(beta, int | float) and not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta}, it must be 0 to 1")
    ratio = jnp.where(by_profile > 0, observed / jnp.where(by_profile > 0, by_profile, 1.0), 1.0)
    return jnp.where(jnp.isfinite(ratio), (1.0 - beta) * pace + beta * ratio, pace)


def forgive(pace: Float[Array, " client"], *, rate: float = 0.1) -> Float[Array, " client"]:
    """The pace of clients that were asked for and took no part, drawn to 1, so that one slow round shuts nobody out for good.

    Args:
      pace: what was known before.
      rate: share of the distance to 1 that is forgiven, 0 to 1.

    Raises:
      ValueError: if `rate` is out of its range.
    """
    if isinstance(rate, int | float) and not 0 <= rate <= 1:
        raise ValueError(f"rate is {rate}, it must be 0 to 1")
    return pace + rate * (1.0 - pace)


def uniform(
    num_clients: int,
    *,
    flops_per_second: float = PLAIN.flops_per_second,
    memory_bytes: float = PLAIN.memory_bytes,
    downlink_bytes_per_second: float = PLAIN.downlink_bytes_per_second,
    uplink_bytes_per_second: float = PLAIN.uplink_bytes_per_second,
) -> ClientProfile:
    """Clients that all can afford the same. The defaults are those of a plain phone, `devices.PLAIN`.

    Raises:
      ValueError: if a number is not positive.
    """
    numbers = {
        "flops_per_second": flops_per_second,
        "memory_bytes": memory_bytes,
        "downlink_bytes_per_second": downlink_bytes_per_second,
        "uplink_bytes_per_second": uplink_bytes_per_second,
    }
    if num_clients < 1:
        raise ValueError(f"num_clients is {num_clients}, it must be at least 1")
    for name, number in numbers.items():
        if not number > 0:
            raise ValueError(f"{name} is {number}, it must be positive")
    return ClientProfile(**{name: jnp.full(num_clients, number, jnp.float32) for name, number in numbers.items()})


def admit(
    population: Population,
    client: Int[Array, " client"],
    cost: RoundCost,
    aligner: Aligner,
    *,
    deadline: float | None,
    examples: Int[Array, " client"],
    pace: Float[Array, " client"] | float = 1.0,
    available: Bool[Array, " client"] | bool = True,
    cached: Bool[Array, "client all_experts"] | None = None,
) -> tuple[Cohort, Bool[Array, " client"]]:
    """The cohort of these clients with its slots, and who fits into memory and deadline at all, at its pace.

    Present are those of them that are available and have data; `examples` are what each client processes in the round.
    """
    profile = jax.tree.map(lambda row: row[client], population.profile)
    limits: dict[str, Any] = dict(deadline=deadline, max_slots=aligner.max_slots, examples=examples, probes=aligner.probes)
    most = slots(profile, cost, **limits, pace=pace)
    admitted = cost.shared_memory <= profile.memory_bytes
    if deadline is not None:
        admitted &= pace * seconds(profile, cost, jnp.zeros_like(most), examples=examples) <= deadline
    present = available & admitted & (examples > 0)
    return Cohort(client, present, jnp.where(present, most, 0), cached), admitted
