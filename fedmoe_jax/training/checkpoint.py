"""Checkpoints of a run: a pytree and a JSON object a round, written at once by Orbax."""

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

_SHOWN = 3  # differences named in an error


class Checkpoints:
    """The checkpoints in a folder, of which the newest `keep` stay.

    A state may be any pytree: it is stored as a flat table from path to array, so that its structure is checked on
    restore. Typed PRNG keys are stored as their data.
    """

    def __init__(self, dir: str | Path, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep is {keep}, it must be at least 1")
        self.dir = Path(dir).absolute()
        self.keep = keep
        self._manager: ocp.CheckpointManager | None = None

    def save(self, round: int, state: PyTree, extra: dict[str, Any] | None = None) -> None:
        """Writes a checkpoint, in place of one of the same round, and returns when it is complete.

        Args:
          round: rounds done so far.
          state: pytree of arrays, keys and numbers. Its buffers may be donated afterwards.
          extra: what JSON can hold.
        """
        entries = _flatten(state)
        shapes = {name: _describe(value) for name, value in entries.items()}
        arrays = {name: _data(value) for name, value in entries.items()}
        stored = {name: value for name, value in arrays.items() if value.size}  # Orbax refuses arrays without elements
        manager = self._writer()
        if round in manager.all_steps():
            manager.delete(round)
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(stored or {"": np.zeros(1)}),
            extra=ocp.args.JsonSave({"shapes": shapes, "extra": extra or {}}),
        )
        if not manager.save(round, args=arguments, force=True):
            raise ValueError(f"{self.dir}: round {round} was not saved")

    def restore(self, template: PyTree) -> tuple[int, PyTree, dict[str, Any]]:
        """The newest checkpoint: (round, state, extra), with arrays placed like those of `template`.

        Args:
          template: a state of the same structure, shapes and types; only those are read (`jax.eval_shape` serves).

        Raises:
          ValueError: if there is no checkpoint, it is damaged, or it differs from the template; names the first paths that do.
        """
        round = self.latest()
        if round is None:
            raise ValueError(f"{self.dir}: there is no checkpoint")
        entries = _flatten(template)
        with ocp.CheckpointManager(self.dir, options=ocp.CheckpointManagerOptions(create=False)) as manager:
            about = self._read(manager, round, extra=ocp.args.JsonRestore())["extra"]
            self._check(round, {name: _describe(value) for name, value in entries.items()}, about["shapes"])
            wanted = {name: _abstract(value) for name, value in entries.items() if np.prod(value.shape)}
            arrays = self._read(manager, round, state=ocp.args.StandardRestore(wanted))["state"] if wanted else {}
        leaves, structure = jax.tree.flatten(template)
        restored = [_undata(arrays.get(name), leaf) for name, leaf in zip(entries, leaves, strict=True)]
        return round, jax.tree.unflatten(structure, restored), about["extra"]

    def latest(self) -> int | None:
        """The round of the newest complete checkpoint, or None."""
        return max((int(path.name) for path in self.dir.glob("*") if path.name.isdecimal() and path.is_dir()), default=None)

    def close(self) -> None:
        """Waits for what is being written and releases the folder."""
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _writer(self):
        if self._manager is None:
            for torn in self.dir.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(torn, ignore_errors=True)
            options = ocp.CheckpointManagerOptions(max_to_keep=self.keep, create=True, enable_async_checkpointing=False)
            self._manager = ocp.CheckpointManager(self.dir, options=options)
        return self._manager

    def _read(self, manager, round, **arguments):
        try:
            return manager.restore(round, args=ocp.args.Composite(**arguments))
        except (OSError, KeyError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{self.dir}: the checkpoint of round {round} cannot be read ({reason})") from error

    def _check(self, round, wanted, found):
        differences = [f"{name} is missing" for name in wanted if name not in found]
        differences += [f"{name} is unexpected" for name in found if name not in wanted]
        differences += [
            f"{name} is {found[name]}, expected {wanted[name]}" for name in wanted if found.get(name, wanted[name]) != wanted[name]
        ]
        if differences:
            more = f" and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
            raise ValueError(f"{self.dir}: round {round} differs from the run: {'; '.join(differences[:_SHOWN])}{more}")


def _flatten(tree):
    """Path -> leaf, in the order of the leaves. Numbers become arrays."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): value if hasattr(value, "dtype") else np.asarray(value) for path, value in leaves}


def _is_key(value):
    return jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def _describe(value):
    """Type and shape, as "float32[3,4]"."""
    return f"{value.dtype}[{','.join(map(str, value.shape))}]"


def _data(value):
    if _is_key(value):
        return jax.random.key_data(value)
    return value if isinstance(value, jax.Array) else np.asarray(value)


def _abstract(value):
    """The shape, type and placement to restore a leaf of the template into; a key's data stand for the key."""
    if _is_key(value):
        value = jax.random.key_data(value) if isinstance(value, jax.Array) else jax.eval_shape(jax.random.key_data, value)
    if isinstance(value, np.ndarray | np.generic):
        return jax.ShapeDtypeStruct(value.shape, value.dtype)
    sharding = getattr(value, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)


def _undata(array, value):
    """What was read (None for an array without elements), as the kind of leaf that the template has there."""
    if isinstance(value, bool | int | float | complex) and not isinstance(value, np.generic):
        return type(value)(array.item())
    if array is None:
        abstract = _abstract(value)
        array = np.zeros(abstract.shape, abstract.dtype)
        if abstract.sharding is not None:
            array = jax.device_put(array, abstract.sharding)
    if _is_key(value):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(jnp.empty((), value.dtype)))
    return np.asarray(array) if isinstance(value, np.ndarray | np.generic) else jnp.asarray(array)
