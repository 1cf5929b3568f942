"""Messages between server and clients: named arrays and a small JSON header as safetensors bytes, and what is refused of them.

Nothing is unpickled or executed. Whoever reads a message says what must be in it; anything else is refused with a reason of one line.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

PROTOCOL = 1
"""Number of the form of messages; others are refused."""
MOST_HEADER_BYTES = 1 << 20
"""Most bytes of names, shapes and header, of a message of any size."""
_LINE_BYTES = 160  # dtype, shape and place of an array in the header
_SLACK = 1 << 16
_KEY = "fedmoe"


class RefusedError(ValueError):
    """A message that is not what it must be: the reason, as `line` makes it."""

    def __init__(self, reason: str):
        super().__init__(line(reason))


class Array(NamedTuple):
    """What an array of a message must be: its shape, and the name of its NumPy dtype. Floats must be finite, others at least 0."""

    shape: tuple[int, ...]
    dtype: str = "float32"


class Message(NamedTuple):
    """A kind, such as "task", a JSON object, and arrays by name."""

    kind: str
    header: dict[str, Any]
    arrays: dict[str, np.ndarray]


def encode(kind: str, header: Mapping[str, Any], arrays: Mapping[str, Any]) -> bytes:
    """A message as bytes."""
    from safetensors.numpy import save

    text = json.dumps({"protocol": PROTOCOL, "kind": kind, **header}, allow_nan=False, separators=(",", ":"))
    return save({name: np.ascontiguousarray(value) for name, value in arrays.items()}, metadata={_KEY: text})


def decode(data: bytes, kind: str, *, most_bytes: int) -> Message:
    """The message of this kind that the bytes hold, its arrays and header not yet checked.

    Raises:
      RefusedError: if they are more than `most_bytes`, no message, or of another kind or protocol.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    if not isinstance(data, bytes):
        raise RefusedError(f"it is no bytes but {type(data).__name__}")
    if len(data) > most_bytes:
        raise RefusedError(f"it has {len(data)} bytes, at most {most_bytes} are accepted")
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > min(MOST_HEADER_BYTES, len(data) - 8):
        raise RefusedError("it is no message")
    try:
        text = json.loads(data[8 : 8 + size])["__metadata__"][_KEY]
        header = json.loads(text)
        arrays = load(data)
        found = header.pop("protocol"), header.pop("kind")
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RefusedError(f"it is no message ({_short(error)})") from None
    if found[0] != PROTOCOL:
        raise RefusedError(f"it is of protocol {_short(found[0])}, this is {PROTOCOL}")
    if found[1] != kind:
        raise RefusedError(f"it is a {_short(found[1])}, not a {kind}")
    return Message(kind, header, arrays)


def check_header(header: Mapping[str, Any], types: Mapping[str, Any]) -> None:
    """Checks that a header has fields of these names and types, and no others; `bool` is no number, and floats are finite.

    Raises:
      RefusedError: naming the field.
    """
    if set(header) != set(types):
        odd = sorted(map(_short, set(header) ^ set(types)))
        raise RefusedError(f"its header has or lacks {', '.join(odd[:3])}")
    for name, wanted in types.items():
        value = header[name]
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            raise RefusedError(f"{name} of its header is {_short(value)}")
        if isinstance(value, float) and not np.isfinite(value):
            raise RefusedError(f"{name} of its header is not finite")


def check_arrays(arrays: Mapping[str, np.ndarray], wanted: Mapping[str, Array]) -> None:
    """Checks that there are arrays of these names, shapes and dtypes, and no others, floats finite and whole numbers at least 0.

    Raises:
      RefusedError: naming the array.
    """
    for name in wanted.keys() ^ arrays.keys():
        raise RefusedError(f"it {'lacks' if name in wanted else 'has'} {_short(name)}")
    for name, (shape, dtype) in wanted.items():
        value = arrays[name]
        if value.shape != tuple(shape) or value.dtype.name != dtype:
            raise RefusedError(f"{name} is {value.dtype.name}{list(value.shape)}, not {dtype}{list(shape)}")
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise RefusedError(f"{name} is not finite")
        if value.dtype.kind == "i" and (value < 0).any():
            raise RefusedError(f"{name} has numbers below 0")


def most_bytes(arrays: Mapping[str, Array]) -> int:
    """Most bytes of a message with these arrays: their values, a line of each in the header, and what else may be there."""
    values = sum(math.prod(array.shape) * np.dtype(array.dtype).itemsize for array in arrays.values())
    return values + sum(len(name) + _LINE_BYTES for name in arrays) + _SLACK


def line(text: Any, most: int = 300) -> str:
    """What others say, as one short line that any log and terminal can take: what cannot be printed is a question mark."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(str(text).split())[:most])


def _short(value: Any) -> str:
    return line(value, 100)
