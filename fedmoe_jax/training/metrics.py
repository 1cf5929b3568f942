"""What a run writes down: metrics.jsonl, one object a round, and summary.json, one for the run."""

import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

CLIENT_ACCURACIES = tuple(
    f"client_accuracy{experts}{prior}_{of}" for experts in ("", "_fittest") for prior in ("", "_prior") for of in ("mean", "p10")
)
"""Mean and 10th percentile over clients, with the experts that the aligner gives each of them or (fittest) with those of its highest
fitness, and with or without its label prior."""

METRIC_FIELDS = (
    "round",
    "train_loss",
    "eval_loss",
    "eval_accuracy",
    *CLIENT_ACCURACIES,
    "load",
    "load_violation",
    "load_cv",
    "load_cv_total",
    "load_gini_total",
    "load_entropy_total",
    "load_least_total",
    "coverage",
    "staleness_max",
    "fitness_mean",
    "assignment_value",
    "bytes_down",
    "bytes_up",
    "simulated_seconds",
    "wall_seconds",
    "clients_per_second",
    "peak_memory_bytes",
    "unavailable_clients",
    "dropped_clients",
    "rejected_updates",
)
"""The fields of a line of metrics.jsonl, in order. `round` counts from 0; bytes and seconds are those of the round."""

HIGHER_IS_BETTER = (
    "eval_accuracy",
    *CLIENT_ACCURACIES,
    "load_entropy_total",
    "load_least_total",
    "coverage",
    "fitness_mean",
    "assignment_value",
    "clients_per_second",
)

Record = dict[str, Any]


def record(round: int, **values: Any) -> Record:
    """One round as metrics.jsonl stores it: all fields in order, absent ones None, numbers and lists only.

    Raises:
      ValueError: for a field that is not in METRIC_FIELDS.
    """
    unknown = sorted(set(values) - set(METRIC_FIELDS))
    if unknown:
        raise ValueError(f"record has unknown metrics: {', '.join(unknown)}")
    return {name: plain(value) for name, value in ({**dict.fromkeys(METRIC_FIELDS), "round": round, **values}).items()}


def plain(value: Any) -> Any:
    """NumPy and JAX values, and containers of them, as what JSON can hold; NaN and infinities become None."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return plain(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"{value!r} is no number, text or list of them")


def write_bytes(path: str | Path, write: Callable[[Any], Any]) -> None:
    """Lets `write(file)` write a binary file that is never seen half written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def is_unfinished(path: Path) -> bool:
    """Whether this is what a killed `write_bytes` leaves."""
    return path.name.startswith(".") and path.suffix == ".tmp"


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file that is never seen half written."""
    write_bytes(path, lambda file: file.write(text.encode()))


def write_json(path: str | Path, value: Any) -> None:
    """Writes an object as indented JSON, at once."""
    write_text(path, json.dumps(plain(value), indent=2) + "\n")


class MetricsLog:
    """metrics.jsonl of a run, open for appending."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def append(self, values: Mapping[str, Any]) -> None:
        """Writes one round as one line, and flushes it.

        Raises:
          ValueError: if a field of METRIC_FIELDS is missing, or another is there.
        """
        missing = [name for name in METRIC_FIELDS if name not in values]
        if missing:
            raise ValueError(f"record lacks metrics: {', '.join(missing)}")
        line = json.dumps(record(**values), allow_nan=False)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def whole(self) -> int:
        """Rounds that the file has from 0 on, up to the first that is missing or damaged."""
        lines = self._lines()
        return next((number for number, line in enumerate(lines) if (_round(line) or {}).get("round") != number), len(lines))

    def truncate(self, round: int) -> None:
        """Drops the lines of `round` and later, and a torn last line: what a resumed run will write again."""
        if self.path.exists():
            write_text(self.path, "".join(line + "\n" for line in self._lines()[:round]))

    def _lines(self):
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
        return text.split("\n")[:-1]  # what follows the last newline is empty or torn


def read(path: str | Path) -> list[Record]:
    """The rounds of a metrics.jsonl. A torn last line, which a killed run leaves, is left out.

    Raises:
      ValueError: if the file cannot be read, or another line is not a round.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
    records = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is empty or torn
        value = _round(line)
        if value is None:
            raise ValueError(f"{path}: line {number} is not a round of metrics")
        records.append(value)
    return records


def _round(line):
    """The round that a line holds, or None."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and type(value.get("round")) is int else None


def final(records: Sequence[Record], metric: str) -> int | float | None:
    """The last value of a metric that is not null, or None."""
    return next((line[metric] for line in reversed(records) if line.get(metric) is not None), None)


def best(records: Sequence[Record], metric: str) -> int | float | None:
    """The largest value of a metric in HIGHER_IS_BETTER, the smallest of another; None without values."""
    values = [line[metric] for line in records if line.get(metric) is not None]
    return (max if metric in HIGHER_IS_BETTER else min)(values) if values else None


def total(records: Sequence[Record], *metrics: str) -> int | float:
    """The sum of metrics over all rounds, null as 0."""
    return sum(line.get(metric) or 0 for line in records for metric in metrics)


def to_target(records: Sequence[Record], target: float | None) -> tuple[int | None, int | float | None]:
    """Rounds, and bytes down and up, until the first evaluation with eval_accuracy >= target; None if there is none."""
    if target is not None:
        for place, line in enumerate(records):
            if line.get("eval_accuracy") is not None and line["eval_accuracy"] >= target:
                return line["round"] + 1, total(records[: place + 1], "bytes_down", "bytes_up")
    return None, None


def summarise(records: Sequence[Record], config_target: float | None = None, *, seed: int | None = None) -> dict[str, Any]:
    """The object of summary.json: last and best values, totals, rounds and bytes to target, and where it ran.

    `last` and `best` skip nulls, so that their evaluation is the last one made. `load` is a list, and is left out.
    """
    numeric = [name for name in METRIC_FIELDS if name not in ("round", "load")]
    rounds, num_bytes = to_target(records, config_target)
    return {
        "rounds": records[-1]["round"] + 1 if records else 0,
        "last": {name: final(records, name) for name in numeric},
        "best": {name: best(records, name) for name in numeric},
        "total": {name: total(records, name) for name in ("bytes_down", "bytes_up", "simulated_seconds", "wall_seconds")},
        "target": config_target,
        "rounds_to_target": rounds,
        "bytes_to_target": num_bytes,
        "seed": seed,
        **environment(),
    }


def environment() -> dict[str, Any]:
    """Versions, device ("8 x cpu") and git revision (None outside a checkout) of this process."""
    return {"versions": versions(), "device": device(), "git_revision": git_revision()}


def versions() -> dict[str, str | None]:
    """The versions of what computes."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("jax", "flax", "optax", "numpy", "fedmoe_jax"):
        try:
            found[name] = importlib.metadata.version(name.replace("_", "-"))
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def device() -> str:
    """Number and kind of the devices, as "8 x cpu"."""
    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind}"


def git_revision() -> str | None:
    """The commit of the checkout that holds this package, or None if it is not in one."""

    def git(*arguments):
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # an installed copy may lie inside another project's checkout
        return git("rev-parse", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None


def read_json(path: str | Path) -> Any:
    """The content of a JSON file.

    Raises:
      ValueError: in one line with the file, if it is damaged.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
