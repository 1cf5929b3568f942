"""Who may end a run, and who may touch its folder: signals that wait for the block in flight, and a lock."""

import contextlib
import fcntl
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedmoe_jax.training.config import UsageError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A run was told to end, by the signal of this number."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class StoppedError(RuntimeError):
    """A run that is not to go on, in one line that names the round."""


class Interrupts:
    """Turns SIGINT and SIGTERM into `Interrupted`, at once or, inside `deferred`, at its end; a context manager.

    The second signal is as it was before: it ends the process. Signals that the process was started to ignore stay ignored, and
    in other threads than the main one nothing changes.
    """

    def __init__(self):
        self._number: int | None = None
        self._waiting = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            handled = (number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None))
            self._before = {number: signal.signal(number, self._take) for number in handled}
        return self

    def __exit__(self, *error: object) -> None:
        self._give_back()

    def pending(self) -> bool:
        """Whether a signal came that still waits."""
        return self._number is not None

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Lets what is inside come to its end; it may ask `pending`."""
        self._waiting = True
        yield
        self._waiting = False
        if self._number is not None:
            raise Interrupted(self._number)

    def _take(self, number, frame):
        self._give_back()
        self._number = number
        if not self._waiting:
            raise Interrupted(number)

    def _give_back(self):
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Makes a folder if there is none, and keeps other processes from training in it. The lock goes with the process.

    Raises:
      UsageError: if another process trains there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"--out {folder} is in use: another process trains there") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def inside(what: str) -> Iterator[None]:
    """Tells a ValueError inside a program, which is traced when it first runs, from one about an argument."""
    try:
        yield
    except ValueError as error:
        raise RuntimeError(f"{what} failed: {error}") from error
