"""Plans local training: how many clients are trained side by side."""

from fedmoe_jax.base import RoundCost

MEMORY_SHARE = 0.5
"""Share of a device's total memory that the weights of a chunk may take; the rest is for data, state and temporaries."""


def chunk_size(cost: RoundCost, *, cohort_size: int, max_slots: int, probes: int, memory_bytes: float) -> int:
    """Clients whose weights, gradients, optimizer state and activations fit into the device at once.

    Args:
      cost: of one client's round, see `fedmoe_jax.local.cost.round_cost`.
      memory_bytes: TOTAL memory of the device, so that the same device always gives the same chunk.

    Returns:
      1 to cohort_size; chunks are made about equal, so that the last one is not nearly empty.
    """
    client = float(cost.shared_memory) + (max_slots + probes) * float(cost.expert_memory)
    fitting = max(1, min(cohort_size, int(MEMORY_SHARE * memory_bytes / client)))
    chunks = -(-cohort_size // fitting)
    return -(-cohort_size // chunks)
