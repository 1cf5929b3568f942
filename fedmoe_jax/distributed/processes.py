"""Several processes, on one or many hosts, that train one model together: how they start, agree, and who writes."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

HEARTBEAT_SECONDS = 30
"""After so long without a sign of life of one process the others end."""

_T = TypeVar("_T")


class LostError(RuntimeError):
    """The first process, or another one, does not go on."""


def start(coordinator: str, number: int | None = None, process: int | None = None) -> None:
    """Joins the processes of a run; to be called before JAX is used for anything else.

    Args:
      coordinator: "auto" under Slurm, Open MPI or on Cloud TPUs and Kubernetes jobs, where JAX finds out the rest; or HOST:PORT of the
        first process.
      number, process: processes in all, and which of them this is, from 0; with HOST:PORT.

    Raises:
      ValueError: naming what is missing or cannot be.
    """
    beats: dict[str, Any] = dict(heartbeat_timeout_seconds=HEARTBEAT_SECONDS, initialization_timeout=120)
    if coordinator == "auto":
        if number is not None or process is not None:
            raise ValueError("coordinator is auto: leave processes and process out")
        jax.distributed.initialize(**beats)
        return
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ValueError(f"coordinator is {coordinator!r}, it must be auto or HOST:PORT of the first process")
    if number is None or process is None or not 0 <= process < number:
        raise ValueError(f"processes is {number} and process is {process}: give both, the second from 0 to the first less 1")
    jax.distributed.initialize(coordinator, number, process, **beats)


def several() -> bool:
    """Whether there are others."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this one writes logs, metrics and plots."""
    return jax.process_index() == 0


def anyone(flag: bool) -> bool:
    """Whether it holds for one of all processes; waits for all."""
    return bool(np.asarray(multihost_utils.process_allgather(np.array(flag))).any()) if several() else flag


def least(value: float) -> float:
    """The least of what all processes have; waits for all."""
    return float(np.asarray(multihost_utils.process_allgather(np.array(value, np.float32))).min()) if several() else value


def by_first(work: Callable[[], _T]) -> _T | None:
    """What the first process does while the others wait. They get None.

    Raises:
      LostError: in the others, if it raises an error there.
    """
    if not several():
        return work()
    result, failure = None, None
    if is_first():
        try:
            result = work()
        except BaseException as error:
            failure = error
    failed = anyone(failure is not None)
    if failure is not None:
        raise failure
    if failed:
        raise LostError("the first process has stopped, see what it says")
    return result


def gathered(tree: PyTree) -> PyTree:
    """The arrays as a whole on each host, where their parts are with several; waits for all."""
    return multihost_utils.process_allgather(tree, tiled=True) if several() else tree
