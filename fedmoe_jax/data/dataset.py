"""A data set in memory: checked arrays for training and a global test set, and its split over clients."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fedmoe_jax.data import partition

_SPLITS = ("iid", "dirichlet", "classes", "natural")
_BLOCK = 1 << 22
_KEYS = ("x", "y", "test_x", "test_y", "client_ids", "num_classes", "task")


@dataclass(frozen=True)
class Dataset:
    """Examples to train on, and a global test set that shares no example with them.

    Attributes:
      x, test_x: one example a row. Classification: float32, or uint8 pixels that models divide by 255. Next token:
        int32 tokens [example, position].
      y, test_y: int32. The class of each example, or the token that follows each position; -1 there is padding.
      client_ids: the natural client of each training example, or None.
      num_classes: classes, or distinct tokens.
      name: what it was loaded from.
      task: "classification" or "next_token".
      held_out: whether the test set was drawn from the examples, for want of one of their own.
    """

    x: np.ndarray
    y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    client_ids: np.ndarray | None
    num_classes: int
    name: str
    task: Literal["classification", "next_token"]
    held_out: bool = False

    def digest(self) -> str:
        """A digest of all arrays: their dtypes, shapes and bytes."""
        arrays = (self.x, self.y, self.test_x, self.test_y, self.client_ids)
        return digest_of(array for array in arrays if array is not None)


def digest_of(arrays: Iterable[np.ndarray]) -> str:
    """SHA-256 of the dtypes, shapes and bytes of arrays, a few megabytes at a time."""
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(f"{array.dtype.str}{array.shape}".encode())
        flat, step = array.reshape(-1), max(1, _BLOCK // max(1, array.itemsize))
        for start in range(0, flat.size, step):
            sha.update(np.ascontiguousarray(flat[start : start + step]).view(np.uint8).data)
    return sha.hexdigest()


def from_arrays(arrays: Mapping[str, Any], name: str, *, seed: int = 0, test_fraction: float = 0.2) -> Dataset:
    """Checks arrays and makes a data set of them.

    Labels are integers from 0. Floats become float32; integers within 0 to 255 that have the shape of images become
    uint8, other integers float32. With integer `y` of two dimensions, of the shape of `x`, the task is "next_token",
    unless `task` says otherwise. Without a test set, `test_fraction` of each class (of everything for next_token) is
    held out at random.

    Args:
      arrays: "x" and "y"; optionally "test_x" with "test_y", "client_ids", "num_classes", "task".
      name: what errors call the data.
      seed: of the held-out test set.
      test_fraction: above 0 and below 1.

    Raises:
      ValueError: in one line with `name`, if the arrays do not fit each other or hold what no model can read.
    """
    try:
        return _from_arrays(arrays, name, seed, test_fraction)
    except ValueError as error:
        raise ValueError(f"data {name}: {error}") from None


def split(
    dataset: Dataset,
    *,
    kind: str,
    num_clients: int | None = None,
    alpha: float = 0.3,
    classes_per_client: int = 2,
    seed: int = 0,
) -> partition.ClientIndices:
    """The training examples of each client.

    Args:
      dataset: what to split; the global test set is not touched.
      kind: "iid", "dirichlet" (`alpha`), "classes" (`classes_per_client`), or "natural" (the data's own clients).
      num_clients: for "natural" at most the natural clients: fewer are a random subset, None is all of them.
      alpha, classes_per_client: see `partition.dirichlet` and `partition.classes`.
      seed: the split is a function of the arguments.

    Raises:
      ValueError: if an argument is out of its range, or the data have no client IDs or no labels for this kind.
    """
    if kind not in _SPLITS:
        raise ValueError(f"split must be one of {', '.join(_SPLITS)}, not {kind!r}")
    if kind == "natural":
        return _natural(dataset, num_clients, seed)
    if num_clients is None:
        raise ValueError(f"num_clients must be given for split {kind!r}")
    if kind == "iid":
        return partition.iid(len(dataset.x), num_clients, seed)
    if dataset.task != "classification":
        raise ValueError(f"split {kind!r} needs a class for each example, and data {dataset.name} has none: use iid or natural")
    if kind == "dirichlet":
        return partition.dirichlet(dataset.y, num_clients, alpha, seed)
    return partition.classes(dataset.y, num_clients, classes_per_client, seed)


def _natural(dataset, num_clients, seed):
    if dataset.client_ids is None:
        raise ValueError(f"split 'natural' needs client IDs, and data {dataset.name} has none: use iid, dirichlet or classes")
    clients = partition.natural(dataset.client_ids)
    if num_clients is None or num_clients == len(clients):
        return clients
    if not 1 <= num_clients <= len(clients):
        raise ValueError(f"num_clients must be 1 to {len(clients)}, the natural clients of data {dataset.name}, not {num_clients}")
    chosen = np.sort(np.random.default_rng(seed).choice(len(clients), num_clients, replace=False))
    return [clients[client] for client in chosen]


def _from_arrays(arrays, name, seed, test_fraction):
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction must be above 0 and below 1, not {test_fraction}")
    for key in ("x", "y"):
        if arrays.get(key) is None:
            raise ValueError(f"{key!r} is missing; expected x and y, optionally test_x, test_y, client_ids, num_classes, task")
    given = {key: np.asarray(arrays[key]) for key in _KEYS if arrays.get(key) is not None}
    if ("test_x" in given) != ("test_y" in given):
        raise ValueError("test_x and test_y must be given together")
    task = _task(given)
    x = _inputs(given["x"], task, "x")
    y = _targets(given["y"], task, "y")
    _check_rows(x, y, "x", "y", task)
    ids = given.get("client_ids")
    if ids is not None and (ids.shape != (len(x),) or ids.dtype.kind not in "iuSU"):
        raise ValueError(f"client_ids must be {len(x)} integers or strings, one an example, not {ids.dtype} of shape {ids.shape}")
    if "test_x" in given:
        test_x, test_y = _inputs(given["test_x"], task, "test_x"), _targets(given["test_y"], task, "test_y")
        _check_rows(test_x, test_y, "test_x", "test_y", task)
        if test_x.shape[1:] != x.shape[1:] or test_x.dtype != x.dtype:
            raise ValueError(f"test_x must look like x: {test_x.dtype} of shape {test_x.shape[1:]} against {x.dtype} of {x.shape[1:]}")
    else:
        train, test = _hold_out(y, task, seed, test_fraction)
        x, y, test_x, test_y = x[train], y[train], x[test], y[test]
        ids = None if ids is None else ids[train]
    num_classes = _num_classes(given, [y, test_y] + ([x, test_x] if task == "next_token" else []))
    return Dataset(x, y, test_x, test_y, ids, num_classes, name, task, held_out="test_x" not in given)


def _task(given):
    x, y = given["x"], given["y"]
    if "task" not in given:
        integers = x.dtype.kind in "iu" and y.dtype.kind in "iu"
        return "next_token" if integers and y.ndim == 2 and y.shape == x.shape and y.shape[1] > 1 else "classification"
    task = str(given["task"])
    if task not in ("classification", "next_token"):
        raise ValueError(f"task must be classification or next_token, not {task!r}")
    return task


def _inputs(x, task, key):
    if task == "next_token":
        if x.dtype.kind not in "iu" or x.ndim != 2 or x.size == 0 or x.min() < 0 or x.max() >= 2**31:
            raise ValueError(f"{key} must hold tokens, integers from 0 of shape [example, position], not {x.dtype} of shape {x.shape}")
        return x.astype(np.int32)
    if x.dtype.kind not in "biuf" or x.ndim < 2 or x.size == 0:
        raise ValueError(f"{key} must hold numbers of shape [example, ...features], not {x.dtype} of shape {x.shape}")
    if x.dtype == np.uint8 or (x.dtype.kind in "iu" and x.ndim >= 3 and x.min() >= 0 and x.max() <= 255):
        return x.astype(np.uint8)
    with np.errstate(over="ignore"):
        x = x.astype(np.float32)
    if not np.isfinite(x).all():
        raise ValueError(f"{key} must be finite, and holds nan or inf")
    return x


def _targets(y, task, key):
    if task == "classification" and y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    ndim, least = (2, -1) if task == "next_token" else (1, 0)
    if y.dtype.kind not in "iu" or y.ndim != ndim:
        form = "the tokens that follow x, in its shape" if task == "next_token" else "one class an example"
        raise ValueError(f"{key} must hold integers, {form}, not {y.dtype} of shape {y.shape}")
    if y.size and (y.min() < least or y.max() >= 2**31 - 1):
        raise ValueError(f"{key} must hold integers from {least}, and reaches from {y.min()} to {y.max()}")
    return y.astype(np.int32)


def _check_rows(x, y, x_key, y_key, task):
    if len(x) != len(y):
        raise ValueError(f"{y_key} has {len(y)} rows for the {len(x)} of {x_key}")
    if task == "next_token" and x.shape != y.shape:
        raise ValueError(f"{y_key} must have the shape of {x_key}: {y.shape} against {x.shape}")


def _hold_out(y, task, seed, test_fraction):
    groups = partition.natural(y) if task == "classification" else [np.arange(len(y))]
    train, test = partition.holdout(groups, test_fraction, seed)
    if not any(len(rows) for rows in test):
        raise ValueError(f"{len(y)} examples are too few to hold out a test set")
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(test))


def _num_classes(given, arrays):
    needed = max(int(values.max()) for values in arrays) + 1
    if "num_classes" not in given:
        return needed
    stated = given["num_classes"]
    if stated.ndim or stated.dtype.kind not in "iu" or stated < needed:
        raise ValueError(f"num_classes must be an integer of at least {needed}, as the labels need, not {stated}")
    return int(stated)
