"""What this machine can afford as a client, measured."""

import time
from typing import Any

import jax
import jax.numpy as jnp

from fedmoe_jax.training.memory import memory_bytes

_WIDTH = 1024
_REPEATS = 5


def measure() -> dict[str, Any]:
    """This machine's ClientProfile fields: float32 matmul rate (best of five) and total device memory.

    The links are None: they depend on the server that a client talks to, so state them yourself, in bytes per second. Such
    objects of several machines, one a line, are a file for `fedmoe train --profile FILE`; see `training.profiles`.
    """
    square = jax.random.normal(jax.random.key(0), (_WIDTH, _WIDTH))
    product = jax.jit(jnp.matmul)
    product(square, square).block_until_ready()
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        product(square, square).block_until_ready()
        times.append(time.perf_counter() - start)
    return {
        "flops_per_second": 2 * _WIDTH**3 / min(times),
        "memory_bytes": memory_bytes(),
        "downlink_bytes_per_second": None,
        "uplink_bytes_per_second": None,
        "device": jax.devices()[0].device_kind,
    }
