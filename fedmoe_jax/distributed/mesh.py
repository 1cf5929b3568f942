"""The mesh of devices that share the work of a round, which may be cores of a CPU."""

import contextlib
import os
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from fedmoe_jax.sharding import AXES


def split_cpu(number: int) -> None:
    """Makes so many devices of this machine's CPU, at most one a core, where JAX has not begun to use it and XLA_FLAGS do not say."""
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # JAX has begun
            jax.config.update("jax_num_cpu_devices", min(number, os.cpu_count() or 1))


def mesh(clients: int | None = None, experts: int = 1, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes client and expert, of `clients` x `experts` devices.

    The clients of a cohort are spread over all of them. With `experts` above 1 expert weights are, too, over that many, and each of
    the `clients` rows of the mesh has them once; neighbours along that axis talk most.

    Args:
      clients: as many as there are devices for, if None.
      experts: must divide the experts of a group.
      devices: those to use, the first ones if there are more; all of all processes if None.

    Raises:
      ValueError: naming the argument, if there are not as many devices.
    """
    found = jax.devices() if devices is None else list(devices)
    if experts < 1 or experts > len(found):
        raise ValueError(f"experts is {experts}, it must be from 1 to the number of devices, {len(found)}")
    clients = len(found) // experts if clients is None else clients
    if clients < 1 or clients * experts > len(found):
        raise ValueError(
            f"clients is {clients}, it must be from 1 to {len(found) // experts}: there are {len(found)} devices for {experts} each"
        )
    grid = np.array(found[: clients * experts]).reshape(clients, experts)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 2)
