"""Readers of the usual image folders: IDX files (MNIST, Fashion-MNIST) and CIFAR-10 and CIFAR-100."""

import gzip
import io
import pickle
import pickletools
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, Any]

_CIFAR_PIXELS = 32 * 32 * 3


def read_folder(folder: Path) -> Arrays:
    """Reads a folder, or the one folder inside it that has images, into x, y, test_x, test_y and num_classes.

    Known are IDX files (`train-images-idx3-ubyte`, also `.gz`) and CIFAR-10 and CIFAR-100, in their python and binary
    versions. Images are uint8 [example, height, width, channel].

    Raises:
      ValueError: naming the file that is missing or damaged, or the folder if it is of no known kind.
    """
    found = [(place, reader) for place in (folder, *_folders(folder)) for test, reader in _READERS if test(place)]
    inner = [place for place, _ in found if place != folder]
    if not found:
        raise ValueError(f"data {folder}: no IDX files (train-images-idx3-ubyte) and no CIFAR files (data_batch_1, train.bin)")
    if len(inner) == len(found) > 1:
        raise ValueError(f"data {folder}: several data sets in this folder, name one of {', '.join(place.name for place in inner)}")
    place, reader = found[0]
    return reader(place)


def read_idx(path: Path) -> np.ndarray:
    """Reads one IDX file of unsigned bytes, compressed or not.

    Raises:
      ValueError: if the file is damaged, or its header does not match its size.
    """
    data = _read(path)
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"data {path}: damaged gzip file ({error})") from None
    if len(data) < 4 or data[:3] != b"\0\0\x08" or len(data) < 4 + 4 * data[3]:
        raise ValueError(f"data {path}: not an IDX file of unsigned bytes")
    shape = [int(size) for size in np.frombuffer(data, ">u4", data[3], 4)]
    start, size = 4 + 4 * len(shape), 1
    for length in shape:
        size *= length
    if len(data) - start != size or not size:
        raise ValueError(f"data {path}: the header says {shape}, {size} bytes, and {len(data) - start} follow")
    return np.frombuffer(data, np.uint8, size, start).reshape(shape)


def _folders(folder):
    return sorted(path for path in folder.iterdir() if path.is_dir())


def _read(path):
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"data {path}: cannot read the file ({error.strerror})") from None


def _is_idx(folder):
    return _idx_file(folder, "train-images", 3) is not None


def _idx_file(folder, name, ndim):
    names = (f"{name}{mark}idx{ndim}-ubyte{end}" for mark in "-." for end in ("", ".gz"))
    return next((folder / file for file in names if (folder / file).is_file()), None)


def _read_idx_folder(folder):
    arrays = {}
    for prefix, part in (("", "train"), ("test_", "t10k")):
        for key, kind, ndim in (("x", "images", 3), ("y", "labels", 1)):
            path = _idx_file(folder, f"{part}-{kind}", ndim)
            if path is None:
                raise ValueError(f"data {folder}: {part}-{kind}-idx{ndim}-ubyte is missing")
            array = read_idx(path)
            if array.ndim != ndim:
                raise ValueError(f"data {path}: expected {ndim} dimensions, not shape {list(array.shape)}")
            arrays[prefix + key] = array[..., None] if key == "x" else array
        if len(arrays[prefix + "x"]) != len(arrays[prefix + "y"]):
            raise ValueError(f"data {path}: {len(arrays[prefix + 'y'])} labels for {len(arrays[prefix + 'x'])} images")
    return arrays


def _is_cifar(folder):
    return any((folder / name).is_file() for name in ("data_batch_1", "data_batch_1.bin", "train.bin")) or (
        (folder / "train").is_file() and (folder / "test").is_file()
    )


def _read_cifar_folder(folder):
    binary = any((folder / name).is_file() for name in ("data_batch_1.bin", "train.bin"))
    end = ".bin" if binary else ""
    ten = (folder / f"data_batch_1{end}").is_file()
    if ten:
        pattern = re.compile(rf"data_batch_(\d+){re.escape(end)}")
        numbers = [int(match[1]) for path in folder.iterdir() if (match := pattern.fullmatch(path.name))]
        train, test = [f"data_batch_{number}{end}" for number in range(1, max(numbers) + 1)], f"test_batch{end}"
    else:
        train, test = [f"train{end}"], f"test{end}"
    num_classes = 10 if ten else 100
    read = _read_cifar_binary if binary else _read_cifar_pickle
    parts = [read(folder / name, num_classes) for name in train]
    test_x, test_y = read(folder / test, num_classes)
    x, y = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return {"x": x, "y": y, "test_x": test_x, "test_y": test_y, "num_classes": num_classes}


def _read_cifar_binary(path, num_classes):
    data = np.frombuffer(_read(path), np.uint8)
    num_labels = 1 if num_classes == 10 else 2  # CIFAR-100 has the coarse label first
    record = num_labels + _CIFAR_PIXELS
    if data.size == 0 or data.size % record:
        raise ValueError(f"data {path}: {data.size} bytes are not a whole number of CIFAR-{num_classes} records of {record} bytes")
    rows = data.reshape(-1, record)
    return _cifar_arrays(path, rows[:, num_labels:], rows[:, num_labels - 1], num_classes)


def _read_cifar_pickle(path, num_classes):
    data = _read(path)
    try:
        _check_opcodes(data)
        batch = _ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()
        batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
        pixels = _plain(batch["data"])
        labels = _plain(batch["labels" if num_classes == 10 else "fine_labels"])
    except Exception as error:  # a damaged or hostile pickle can raise anything
        raise ValueError(f"data {path}: not a CIFAR-{num_classes} batch ({' '.join(str(error).split())[:200]})") from None
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), _CIFAR_PIXELS) or labels.dtype.kind not in "iu" or not labels.size:
        raise ValueError(f"data {path}: {labels.size} labels for {pixels.dtype} pixels of shape {list(pixels.shape)}")
    return _cifar_arrays(path, pixels, labels, num_classes)


def _cifar_arrays(path, pixels, labels, num_classes):
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"data {path}: labels reach from {labels.min()} to {labels.max()}, not 0 to {num_classes - 1}")
    return np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), labels.astype(np.int32)


_READERS = ((_is_idx, _read_idx_folder), (_is_cifar, _read_cifar_folder))
_NDARRAY = "numpy.ndarray"  # stands for the class, so that a pickle can name it but not call it


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles containers, numbers, bytes and plain arrays; any other name in the pickle is an error.

    NumPy's own classes never see the pickle: their `__setstate__` trusts what it is given.
    """

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("numpy", "ndarray"): _NDARRAY,
            ("numpy", "dtype"): _PickledDtype,
            ("multiarray", "_reconstruct"): _PickledArray,
            ("numeric", "_frombuffer"): _array_from_buffer,
            ("_codecs", "encode"): _encode_latin1,
        }
        short = re.sub(r"^numpy\._?core\.", "", module)
        if (short, name) not in allowed:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is refused")
        return allowed[short, name]


class _PickledDtype:
    """What a pickle says about a dtype; integers only."""

    def __init__(self, name, *_):
        self.name = name.decode() if isinstance(name, bytes) else name
        self.byte_order = "<"

    def __setstate__(self, state):
        self.byte_order = state[1].decode() if isinstance(state[1], bytes) else state[1]

    def numpy(self):
        if not re.fullmatch(r"[<>|=][biu][1248]", self.byte_order + self.name):
            raise pickle.UnpicklingError(f"it holds an array of dtype {self.name}, which is refused")
        return np.dtype(self.byte_order + self.name)


class _PickledArray:
    """What a pickle says about an array."""

    def __init__(self, *_):
        self.value = np.empty(0)

    def __setstate__(self, state):
        _, shape, dtype, fortran, data = state
        self.value = np.frombuffer(data, dtype.numpy()).reshape(shape, order="F" if fortran else "C")


def _array_from_buffer(buffer, dtype, shape, order):
    array = _PickledArray()
    array.__setstate__((1, shape, dtype, order == "F", buffer))
    return array


def _encode_latin1(text, encoding):
    if encoding != "latin1":
        raise pickle.UnpicklingError("it holds text in an unknown encoding")
    return text.encode("latin1")


def _check_opcodes(data):
    """Refuses what makes an unpickler allocate more than the pickle holds; `genops` itself refuses lengths beyond its end."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name.endswith("PUT") and int(argument) > len(data):
            raise pickle.UnpicklingError(f"it has {opcode.name} {argument!r:.20}, which is refused")


def _plain(value):
    if isinstance(value, _PickledArray):
        return value.value
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise pickle.UnpicklingError("it holds neither an array nor a list of whole numbers")
    return np.asarray(value)
