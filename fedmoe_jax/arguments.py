"""What the arguments of `round.federated_moe` must be, and which of them go together."""

from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from fedmoe_jax.aggregation import Transform
from fedmoe_jax.base import Aggregator, Aligner
from fedmoe_jax.experts import Partition, groups, num_experts, partition


def checked(model: nnx.Module, aligner: Aligner, router: str, numbers: dict[str, Any]) -> tuple[int, Partition]:
    """The experts of all groups, and the parts of the model.

    Args:
      numbers: the other arguments, by name.

    Raises:
      ValueError: naming the argument that cannot be.
    """
    for name in ("cohort_size", "batch_size", "chunk_size", "local_epochs", "local_steps", "min_holders"):
        if (value := numbers[name]) is not None and value < 1:
            raise ValueError(f"{name} is {value}, it must be at least 1")
    if (numbers["local_epochs"] is None) == (numbers["local_steps"] is None):
        raise ValueError("local_epochs and local_steps: give exactly one of them")
    for name in ("prox", "router_prior", "solo_examples"):
        if not 0 <= (numbers[name] or 0) < float("inf"):
            raise ValueError(f"{name} is {numbers[name]}, it must be at least 0")
    if numbers["sampling_rate"] is not None and not 0 < numbers["sampling_rate"] <= 1:
        raise ValueError(f"sampling_rate is {numbers['sampling_rate']}, it must be above 0 and at most 1")
    for name, unit in (("deadline", " seconds"), ("reject_above", "")):
        if (value := numbers[name]) is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name} is {value}, it must be above 0{unit}")
    if router not in ("shared", "personal", "statistics"):
        raise ValueError(f"router is {router!r}, it must be 'shared', 'personal' or 'statistics'")
    parts = partition(model)
    experts, number = num_experts(parts.experts), len(groups(parts.experts))
    if aligner.num_experts not in (None, experts):
        raise ValueError(f"aligner is for {aligner.num_experts} experts, the model has {experts}")
    if aligner.max_slots > experts:
        raise ValueError(f"aligner gives up to {aligner.max_slots} experts, the model has {experts}")
    if aligner.groups != number:
        raise ValueError(f"aligner is made for groups={aligner.groups}, the model needs groups={number}: see alignment.grouped")
    return number * experts, parts


def check_aggregation(
    aggregator: Aggregator, broadcast: Transform | None, control_variates: bool, router: str, mesh: Mesh | None, min_holders: int
) -> None:
    """Refuses what does not go together.

    Raises:
      ValueError: naming the argument of `federated_moe` that cannot be.
    """
    if broadcast is not None and getattr(broadcast, "name", None) != "quantize":
        raise ValueError("broadcast must be aggregation.quantize(...): a client needs every weight")
    if control_variates and (broadcast is not None or aggregator.encoder is not None):
        raise ValueError("control_variates travel as they are: they go neither with a broadcast nor with clipped or compressed updates")
    if mesh is not None and aggregator.private is not None:
        raise ValueError("mesh does not go with gaussian_noise, which is drawn once, on one device: leave it out")
    beside = (("control_variates", control_variates), ("router 'statistics'", router == "statistics"))
    for name, given in (*beside, ("router 'personal'", router == "personal")):
        if given and aggregator.private is not None:
            raise ValueError(f"{name}: what clients return for it has no noise, so that it does not go with gaussian_noise")
    for name, given in beside:
        if given and min_holders > 1:
            raise ValueError(f"{name}: what a single holder returns for it is kept, so that it does not go with min_holders above 1")
        if given and aggregator.collects:
            raise ValueError(f"{name}: what clients return for it is summed, where a bad client could do what a robust aggregator prevents")


def check_room(aggregator: Aggregator, parts: Partition, cohort_size: int, max_slots: int, budget_bytes: float) -> None:
    """Refuses an aggregator that collects more than fits.

    Raises:
      ValueError: naming the bytes that it needs for the updates of a cohort.
    """

    def numbers(tree, skip):
        return sum(int(np.prod(leaf.shape[skip:])) for leaf in jax.tree.leaves(tree))

    needed = 4 * cohort_size * (numbers(parts.shared, 0) + max_slots * numbers(parts.experts, 1))
    if aggregator.collects and needed > budget_bytes:
        limit = f"personal_budget_bytes is {budget_bytes:.0f}"
        raise ValueError(f"aggregator keeps the updates of a cohort of {cohort_size}, which takes {needed} bytes; {limit}")
