"""Where data come from: a name, a file, a folder, the Hugging Face hub or a function, as a `Dataset`."""

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np

from fedmoe_jax.data import hub, images
from fedmoe_jax.data.dataset import Dataset, from_arrays, split
from fedmoe_jax.data.npz import read_npz

__all__ = ["Dataset", "from_arrays", "load", "split"]


def load(name_or_path: str | Path, *, seed: int = 0, test_fraction: float = 0.2) -> Dataset:
    """Loads a data set into memory.

    Args:
      name_or_path: one of
        "digits": 1,797 images of 8x8 pixels that come with scikit-learn;
        a `.npz` file with x and y, optionally test_x with test_y, client_ids (or clients), num_classes, task;
        a folder of IDX files (MNIST, Fashion-MNIST) or of CIFAR-10 or CIFAR-100, python or binary version;
        "package.module:name": a function without arguments that returns a `Dataset`, (x, y), (x, y, test_x, test_y)
        or a dict with the names of the `.npz` file;
        "hf:NAME", "hf:NAME:CONFIGURATION" or "owner/name": a data set of the Hugging Face hub.
      seed: of the test set that is held out where the data have none.
      test_fraction: its share of each class, or of all examples if they have no classes.

    Raises:
      ValueError: in one line with the name or path, if there are no such data or they are damaged.
    """
    text = str(name_or_path)
    path = Path(text).expanduser()
    if not text:
        raise ValueError("data must name a data set, and is empty")
    if text == "digits":
        arrays: Any = _digits()
    elif text.startswith("hf:"):
        arrays = hub.read_hub(text.removeprefix("hf:"))
    elif _exists(path):
        arrays = _read_path(path)
    elif re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", text):
        arrays = _call(text)
    elif re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text) and path.suffix not in (".npz", ".npy", ".gz"):
        arrays = hub.read_hub(text)
    else:
        raise ValueError(
            f"data {text}: no such file or folder, and no name of data (digits, package.module:name, or owner/name of the Hugging Face hub)"
        )
    if isinstance(arrays, Dataset):
        return arrays
    return from_arrays(arrays, text, seed=seed, test_fraction=test_fraction)


def _exists(path):
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long for a path, or with a null byte
        return False


def _digits():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return {"x": (bunch.images / 16).astype(np.float32)[..., None], "y": bunch.target, "num_classes": 10}


def _read_path(path):
    try:
        if path.is_dir():
            return images.read_folder(path)
        if path.suffix == ".npz":
            return _read_npz(path)
    except OSError as error:
        raise ValueError(f"data {path}: cannot be read ({error.strerror or error})") from None
    raise ValueError(f"data {path}: expected an .npz file or a folder of IDX or CIFAR files")


def _read_npz(path):
    try:
        arrays: dict[str, Any] = dict(read_npz(path))
    except ValueError as error:
        raise ValueError(f"data {path}: not a readable .npz file ({error})") from None
    if "clients" in arrays:
        arrays.setdefault("client_ids", arrays.pop("clients"))
    return arrays


def _call(text):
    module_name, _, attribute = text.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"data {text}: {error}") from None
    if isinstance(function, Dataset):
        return function
    if not callable(function):
        raise ValueError(f"data {text}: must be a function that returns a Dataset or (x, y), not {type(function).__name__}")
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise ValueError(f"data {text}: must be a function without arguments ({error})") from None
    result = function()
    if isinstance(result, tuple) and len(result) in (2, 4):
        return dict(zip(("x", "y", "test_x", "test_y"), result, strict=False))
    if isinstance(result, (Dataset, dict)):
        return result
    raise ValueError(f"data {text}: must return a Dataset, (x, y), (x, y, test_x, test_y) or a dict, not {type(result).__name__}")
