"""What of aggregation goes together with what else of a run."""

import jax
import numpy as np

from fedmoe_jax.aggregation.chain import Transform
from fedmoe_jax.base import Aggregator
from fedmoe_jax.experts import Partition


def check(aggregator: Aggregator, broadcast: Transform | None, control_variates: bool, router: str) -> None:
    """Refuses what does not go together.

    Raises:
      ValueError: naming the argument of `federated_moe` that cannot be.
    """
    if broadcast is not None and getattr(broadcast, "name", None) != "quantize":
        raise ValueError("broadcast must be aggregation.quantize(...): a client needs every weight")
    if control_variates and (broadcast is not None or aggregator.encoder is not None):
        raise ValueError("control_variates travel as they are: they go neither with a broadcast nor with clipped or compressed updates")
    for name, given in (("control_variates", control_variates), ("router 'statistics'", router == "statistics")):
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
