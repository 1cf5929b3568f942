"""What real clients can afford, read from a file of what `fedmoe profile` printed on each of them."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from fedmoe_jax.base import ClientProfile
from fedmoe_jax.devices import PLAIN

_WHAT = {
    "flops_per_second": "the client's float32 FLOP/s",
    "memory_bytes": "the client's memory in bytes",
    "downlink_bytes_per_second": "the speed of the client's downlink in bytes per second",
    "uplink_bytes_per_second": "the speed of the client's uplink in bytes per second",
}


def read(path: str | Path) -> ClientProfile:
    """The clients of a file: JSON objects one after the other, as `fedmoe profile` prints them, or one JSON list of such objects.

    An object has the fields of `ClientProfile` as positive numbers; others, such as "device", are ignored. `fedmoe profile`
    does not know the links, so their speeds must be filled in.

    Raises:
      ValueError: "profile: ...", with the file, the line and the field where there is one: not readable, not JSON, no client, or
        a number that is missing, not positive or not finite in float32.
    """
    try:
        values = list(_values(Path(path).read_text(encoding="utf-8-sig")))
    except OSError as error:
        raise ValueError(f"profile: {path} cannot be read ({error.strerror or error})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"profile: {path}, line {error.lineno}: not JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, or a number or nesting beyond what Python reads
        raise ValueError(f"profile: {path}: not JSON ({error})") from None
    if not values:
        raise ValueError(f"profile: {path} holds no client; write one line for each, as `fedmoe profile` prints it")
    rows = [_row(f"{path}, line {line}", value) for line, value in values]
    return ClientProfile(*jnp.array(rows, jnp.float32).T)


def _values(text: str) -> Iterator[tuple[int, Any]]:
    """Each JSON value of a text, or each item of the list that it is, with the line where it starts."""
    is_list = text.lstrip().startswith("[")
    if is_list:
        json.loads(text)  # so that what stands between the items is right
    decoder, gap = json.JSONDecoder(), re.compile(r"[\s,]*" if is_list else r"\s*")
    end = text.index("[") + 1 if is_list else 0
    line = 1 + text.count("\n", 0, end)
    while True:
        start = gap.match(text, end).end()  # type: ignore[union-attr]
        line += text.count("\n", end, start)
        if start == len(text) or (is_list and text[start] == "]"):
            return
        value, end = decoder.raw_decode(text, start)
        yield line, value
        line += text.count("\n", start, end)


def _row(place: str, value: Any) -> list[float]:
    """The numbers of one client, in the order of the fields."""
    if not isinstance(value, dict):
        raise ValueError(f"profile: {place}: expected an object with {', '.join(_WHAT)}, got {_short(value)}")
    return [_number(f"profile: {place}: {name}", name, value) for name in _WHAT]


def _number(place: str, name: str, row: dict[str, Any]) -> float:
    number = row.get(name)
    if number is None:
        state = "is null" if name in row else "is missing"
        raise ValueError(f"{place} {state}; write {_WHAT[name]}, such as {getattr(PLAIN, name):.0f}")
    limits = np.finfo(np.float32)
    is_number = isinstance(number, int | float) and not isinstance(number, bool)
    if not (is_number and float(limits.tiny) <= number <= float(limits.max)):
        raise ValueError(f"{place} must be a positive finite number, got {_short(number)}; write {_WHAT[name]}")
    return float(number)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
