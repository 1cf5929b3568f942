"""Checkpoints of a run: a pytree and a JSON object a round, complete or not there at all, and told apart when damaged."""

import contextlib
import gc
import logging
import os
import shutil
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from fedmoe_jax.distributed import processes
from fedmoe_jax.training import leaves
from fedmoe_jax.training.integrity import ABOUT, changed, files, read_about, write_about

SCHEMA = 2
"""Number of the form in which checkpoints are written; others are refused."""

_SHOWN = 3  # differences named in an error
_PATIENCE = 10.0  # seconds for a thread of Orbax to end after an error


class DamagedError(ValueError):
    """A checkpoint that is not what was written."""


class Checkpoints:
    """The checkpoints in a folder, of which the newest `keep` stay.

    A state may be any pytree: it is stored as a flat table from path to array, so that its structure is checked on
    restore. Typed PRNG keys are stored as their data. A checkpoint is written beside the others and renamed when it is
    complete, with the size and CRC-32 of each of its files: a killed run or a full disk leaves those before as they were, and nothing
    is read of a file that has changed.

    `begin` writes on a thread while the caller goes on, one checkpoint at a time; what went wrong is raised by the next call. `save` waits.

    Several processes save and restore together, each its part of the arrays; the folder must be one for all. The first one makes,
    completes and removes.
    """

    def __init__(self, dir: str | Path, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep is {keep}, it must be at least 1")
        self.dir = Path(dir).absolute()
        self.keep = keep
        self._orbax: ocp.Checkpointer | None = None
        self._damaged: list[int] = []
        self._thread: ThreadPoolExecutor | None = None
        self._writing: Future[None] | None = None

    def save(self, round: int, state: PyTree, extra: dict[str, Any] | None = None) -> None:
        """As `begin`, and returns when the checkpoint is complete.

        Raises:
          OSError: in one line, if it cannot be written; the checkpoints before are as they were.
        """
        self.begin(round, state, extra)
        self.wait()

    def begin(self, round: int, state: PyTree, extra: dict[str, Any] | None = None) -> None:
        """Copies a state to the host and writes it. One of the same round, those of later ones and damaged ones go.

        Of several processes all wait until it is complete.

        Args:
          round: rounds done so far.
          state: pytree of arrays, keys and numbers. Its buffers may be donated afterwards.
          extra: what JSON can hold.

        Raises:
          OSError: as `save`, of the checkpoint before.
        """
        self.wait()
        entries = leaves.flatten(state)
        content = {"shapes": {name: leaves.describe(value) for name, value in entries.items()}, "extra": extra or {}}
        arrays = {name: leaves.data(value) for name, value in entries.items()}
        stored = {name: value for name, value in arrays.items() if value.size}  # Orbax refuses arrays without elements
        if processes.several():
            return self._write(round, stored, content)
        self._thread = self._thread or ThreadPoolExecutor(1, "checkpoint")
        self._writing = self._thread.submit(self._write, round, jax.tree.map(leaves.on_host, stored), content)
        return None

    def wait(self) -> None:
        """Returns when what was begun is complete.

        Raises:
          OSError: as `save`.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _write(self, round: int, stored: dict[str, Any], content: dict[str, Any]) -> None:
        new, failure = self.dir / f".{round}.tmp", None
        with _quiet():
            try:
                processes.by_first(lambda: self._begin(new))
                self._checkpointer().save(new / "state", args=ocp.args.StandardSave(stored or {"": np.zeros(1)}))
                processes.by_first(lambda: self._complete(new, round, content))
            except Exception as error:  # TensorStore's errors of a full disk are of several types
                failure = _reason(error)
                for thread in threading.enumerate():  # what still writes would do so where all is removed
                    if type(thread).__module__.startswith("orbax"):
                        thread.join(_PATIENCE)
            if failure is not None:
                gc.collect()  # coroutines that were left behind complain when they go
        if failure is not None:
            shutil.rmtree(new, ignore_errors=True)
            raise OSError(f"{self.dir}: the checkpoint of round {round} cannot be written ({failure})")
        processes.by_first(lambda: self._prune(round))
        self._damaged.clear()

    def restore(
        self,
        template: PyTree,
        *,
        most: int | None = None,
        check: Callable[[dict[str, Any]], Any] = lambda extra: None,
        note: Callable[[str], Any] = lambda line: None,
    ) -> tuple[int, PyTree, dict[str, Any]]:
        """The newest checkpoint that is not damaged: (round, state, extra), with arrays placed like those of `template`.

        Args:
          template: a state of the same structure, shapes and types; only those are read (`jax.eval_shape` serves).
          most: the latest round to go back to.
          check: check(extra) raises an error where the checkpoint is not to be used, before its state is read.
          note: told of each checkpoint that is passed over, in one line.

        Raises:
          ValueError: if there is no checkpoint that serves, or it differs from the template or is of another version; names the first
            paths that do.
        """
        self.wait()
        rounds = [round for round in reversed(self.rounds()) if most is None or round <= most]
        if not rounds:
            late = f" of round {most} or before, where the metrics end" if self.rounds() else ""
            raise ValueError(f"{self.dir}: there is no checkpoint{late}")
        for round, before in zip(rounds, [*rounds[1:], None], strict=True):
            try:
                return self._restore(round, template, check)
            except DamagedError as error:
                self._damaged.append(round)
                if before is None:
                    raise
                note(f"{error}: going back to that of round {before}")
        raise AssertionError

    def rounds(self) -> list[int]:
        """The rounds of all checkpoints, damaged ones as well, ascending."""
        return sorted(int(path.name) for path in self.dir.glob("*") if path.name.isascii() and path.name.isdecimal() and path.is_dir())

    def latest(self) -> int | None:
        """The round of the newest checkpoint that is complete, or None."""
        return max(self.rounds(), default=None)

    def close(self) -> None:
        """Releases what writes and reads, when what was begun is complete."""
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None
        if self._orbax is not None:
            self._orbax.close()
            self._orbax = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self.close()

    def _checkpointer(self):
        if self._orbax is None:
            self._orbax = ocp.Checkpointer(ocp.StandardCheckpointHandler())
        return self._orbax

    def clear(self) -> None:
        """Removes what a killed run was writing or removing; only who may write here may do so."""
        for pattern in (".*.tmp", "*.orbax-checkpoint-tmp*"):
            for torn in self.dir.glob(pattern):
                shutil.rmtree(torn, ignore_errors=True)

    def _begin(self, new):
        self.clear()
        new.mkdir(parents=True)

    def _complete(self, new, round, content):
        write_about(new, {"schema": SCHEMA, **content, "files": files(new)})
        if round in self.rounds():
            self._remove(round)
        new.rename(self.dir / str(round))

    def _prune(self, round):
        for other in self.rounds():
            if other > round or (other in self._damaged and other != round):
                self._remove(other)
        for other in self.rounds()[: -self.keep]:
            self._remove(other)

    def _remove(self, round):
        """Renames first, so that no half of a checkpoint looks like one."""
        old = self.dir / f".{round}.old.tmp"
        (self.dir / str(round)).rename(old)
        shutil.rmtree(old, ignore_errors=True)

    def _restore(self, round, template, check):
        folder, entries = self.dir / str(round), leaves.flatten(template)
        try:
            about = read_about(folder)
            known = about["schema"] == SCHEMA
            differs = changed(dict(about["files"]), files(folder)) if known else None
            shapes, extra = (dict(about[name]) if known else {} for name in ("shapes", "extra"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if (folder / "extra").is_dir() and not (folder / ABOUT).exists():
                raise ValueError(f"{folder}: was written by an earlier version of fedmoe_jax, which alone can continue the run") from None
            raise self._damage(round, f"{ABOUT}: {_reason(error)}") from error
        if not known:
            raise ValueError(f"{folder}: has the form {about['schema']!r} of another version of fedmoe_jax, this one reads {SCHEMA}")
        if differs:
            raise self._damage(round, differs)
        check(extra)
        self._compare(round, {name: leaves.describe(value) for name, value in entries.items()}, shapes)
        wanted = {name: leaves.abstract(value) for name, value in entries.items() if np.prod(value.shape)}
        try:
            with _quiet():
                arrays = self._checkpointer().restore(folder / "state", args=ocp.args.StandardRestore(wanted)) if wanted else {}
        except Exception as error:  # whatever Orbax says of files that are as they were written
            raise self._damage(round, _reason(error)) from error
        wanted, structure = jax.tree.flatten(template)
        restored = [leaves.undata(arrays.get(name), leaf) for name, leaf in zip(entries, wanted, strict=True)]
        return round, jax.tree.unflatten(structure, restored), extra

    def _damage(self, round, reason):
        return DamagedError(f"{self.dir}: the checkpoint of round {round} cannot be read ({reason})")

    def _compare(self, round, wanted, found):
        differences = [f"{name} is missing" for name in wanted if name not in found]
        differences += [f"{name} is unexpected" for name in found if name not in wanted]
        differences += [
            f"{name} is {found[name]}, expected {wanted[name]}" for name in wanted if found.get(name, wanted[name]) != wanted[name]
        ]
        if differences:
            more = f" and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
            raise ValueError(f"{self.dir}: round {round} differs from the run: {'; '.join(differences[:_SHOWN])}{more}")


@contextlib.contextmanager
def _quiet():
    """Keeps Orbax's threads and coroutines from telling of the error that is raised as well."""
    hooks = threading.excepthook, sys.unraisablehook
    loggers = {logger: logger.level for logger in map(logging.getLogger, ("absl", "asyncio"))}

    def of_others(arguments: threading.ExceptHookArgs) -> None:
        if not type(arguments.thread).__module__.startswith("orbax"):
            hooks[0](arguments)

    threading.excepthook, sys.unraisablehook = of_others, lambda arguments: None
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in loggers.items():
            logger.setLevel(level)
        threading.excepthook, sys.unraisablehook = hooks


def _reason(error):
    """What an error says, short: TensorStore and Orbax wrap what the system says in much else."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    known = (os.strerror(number) for number in (28, 27, 122, 30, 13, 5))  # full, too large, quota, read-only, denied, I/O
    return next((reason for reason in known if reason in text), text[:200])
