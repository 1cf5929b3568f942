"""Data sets of the Hugging Face hub, as arrays. Needs the `hub` extra."""

import importlib
import logging
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import numpy as np

Arrays = dict[str, Any]

_LABELS = ("label", "labels", "fine_label", "y", "target", "class")
_INPUTS = ("image", "img", "x", "pixel_values", "features", "input")
_CLIENTS = ("client_id", "client_ids", "client", "writer_id", "writer", "user_id", "user")
_TESTS = ("test", "validation")


@runtime_checkable
class Table(Protocol):
    """What is read of a `datasets.Dataset`."""

    @property
    def column_names(self) -> list[str]: ...

    def __getitem__(self, column: str) -> Sequence[Any]: ...


def read_hub(name: str) -> Arrays:
    """Downloads a data set and converts its splits "train" and "test" (or "validation", or none).

    Args:
      name: of the data set, as "owner/name" or "owner/name:configuration".

    Raises:
      ValueError: if the package `datasets` is missing, or the data cannot be had or converted.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise ValueError(
            f"data {name!r} is no file or folder here; to load it from the Hugging Face hub: pip install '.[hub]' in a checkout"
        ) from None
    path, _, configuration = name.partition(":")
    try:
        with _quiet():
            splits = datasets.load_dataset(path, configuration or None)
    except Exception as error:  # the network, the hub and the readers of files each have their own errors
        raise ValueError(f"data {name!r} cannot be loaded from the Hugging Face hub: {_one_line(error)}") from None
    if "train" not in splits:
        raise ValueError(f"data {name!r} has no split 'train', only {', '.join(splits)}")
    test = next((splits[key] for key in _TESTS if key in splits), None)
    return to_arrays(splits["train"], test, name)


def to_arrays(train: Table, test: Table | None, name: str) -> Arrays:
    """Columns as arrays: the image or feature column is x, the label column y, a writer or user column client_ids.

    Labels that are strings are numbered in sorted order. Without a column of a usual input name, x is the only other
    column, or all other columns side by side if each holds one number a row.

    Raises:
      ValueError: naming `name` and the column that is missing or cannot be an array.
    """
    columns = list(train.column_names)
    label = next((column for column in _LABELS if column in columns), None)
    if label is None:
        raise ValueError(f"data {name!r} has no label column ({', '.join(_LABELS)}) among {', '.join(columns)}")
    client = next((column for column in _CLIENTS if column in columns), None)
    usual = [column for column in _INPUTS if column in columns][:1]
    inputs = usual or [column for column in columns if column not in (label, client)]
    if not inputs:
        raise ValueError(f"data {name!r} has no input column beside {label!r}")
    x, y = _inputs(train, inputs, name), np.asarray(list(train[label]))
    names = np.unique(y) if y.dtype.kind in "SU" else None
    arrays = {"x": x, "y": _numbered(y, names, name)}
    if test is not None:
        arrays |= {"test_x": _inputs(test, inputs, name), "test_y": _numbered(np.asarray(list(test[label])), names, name)}
    if client is not None:
        arrays["client_ids"] = np.asarray(list(train[client]))
    return arrays


def _inputs(table, columns, name):
    arrays = [_column(table, column, name) for column in columns]
    if len(arrays) == 1:
        return arrays[0] if arrays[0].ndim > 1 else arrays[0][:, None]
    for column, array in zip(columns, arrays, strict=True):
        if array.ndim > 1:
            raise ValueError(f"data {name!r}: which column is the input? {', '.join(columns)} (and {column!r} has several numbers a row)")
    return np.stack(arrays, axis=1)


def _column(table, column, name):
    """One column as an array of numbers; images get a channel axis."""
    values = list(table[column])
    images = bool(values) and hasattr(values[0], "getbands")
    if images:
        bands = {value.mode for value in values}
        mode = bands.pop() if len(bands) == 1 else "RGB"
        mode = mode if mode in ("L", "RGB") else ("L" if mode == "1" else "RGB")
        values = [np.asarray(value.convert(mode)) for value in values]
    shapes = {np.shape(value) for value in values}
    if len(shapes) > 1:
        raise ValueError(f"data {name!r}: rows of column {column!r} differ in size, such as {' and '.join(map(str, sorted(shapes)[:2]))}")
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"data {name!r}: column {column!r} holds no numbers or images; turn it into an .npz file with x and y")
    return array[..., None] if images and array.ndim == 3 else array


def _numbered(labels, names, name):
    if names is None:
        return labels
    unknown = np.setdiff1d(labels, names)
    if unknown.size:
        raise ValueError(f"data {name!r}: the test set has the label {str(unknown[0])!r}, which the training set lacks")
    return np.searchsorted(names, labels)


@contextmanager
def _quiet():
    """Without the hub's line for each of its retries: the error that follows says it once."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _one_line(error):
    return " ".join(str(error).split())[:300] or type(error).__name__
