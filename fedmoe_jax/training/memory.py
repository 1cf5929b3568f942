"""How much memory there is, how much was taken, and whether it did not suffice."""

import os
import resource
import sys

import jax

from fedmoe_jax.distributed import processes


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a JAX error says that the device's memory did not suffice."""
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()


def memory_bytes() -> float:
    """Total memory of the first device; for a CPU its share of that of the machine. Of several processes the least."""
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return processes.least(float(limit or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / jax.local_device_count()))


def peak_memory_bytes() -> int:
    """The most memory taken so far: of the first device, or of this process where the device is the CPU."""
    used = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    unit = 1 if sys.platform == "darwin" else 1024
    return int(used or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
