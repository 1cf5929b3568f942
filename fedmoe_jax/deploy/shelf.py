"""What a client keeps in its folder between rounds: the experts of its last round, by version, and router rows of its own."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fedmoe_jax.deploy import messages
from fedmoe_jax.deploy.messages import RefusedError
from fedmoe_jax.training.metrics import write_bytes

MOST_BYTES = 1 << 31
"""Bytes of a message or file that a client reads."""


class Shelf:
    """The files of a client. They are of one run; those of another are as if they were not there."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def experts(self, run: str) -> dict[int, tuple[int, dict[str, np.ndarray]]]:
        """The version of each expert that it has, and its arrays, named as in messages."""
        found = self._read("experts", run)
        if found is None:
            return {}
        kept: dict[int, tuple[int, dict[str, np.ndarray]]] = {int(e): (version, {}) for e, version in found.header["versions"].items()}
        for name, value in found.arrays.items():
            kept[int(name.split(".")[1])][1][name] = value
        return kept

    def keep(self, run: str, versions: Mapping[int, int], arrays: Mapping[str, np.ndarray]) -> None:
        """Keeps these experts in place of all others."""
        self._write("experts", {"run": run, "versions": {str(expert): version for expert, version in versions.items()}}, arrays)

    def routers(self, run: str, round: int) -> dict[str, np.ndarray] | None:
        """Its own router rows [expert, ...] by path, as they were before a round; None before it has any.

        A server that has died asks for a round again, and what the client learnt in it the first time is lost.
        """
        found = self._read("routers", run)
        if found is None:
            return None
        kind = "before." if found.header["round"] >= round else "after."
        return {name.removeprefix(kind): value for name, value in found.arrays.items() if name.startswith(kind)}

    def keep_routers(self, run: str, round: int, before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]) -> None:
        """Keeps the rows before and after a round."""
        rows = {f"before.{path}": value for path, value in before.items()} | {f"after.{path}": value for path, value in after.items()}
        self._write("routers", {"run": run, "round": round}, rows)

    def _read(self, kind, run):
        try:
            found = messages.decode((self.folder / f"{kind}.safetensors").read_bytes(), kind, most_bytes=MOST_BYTES)
        except (OSError, RefusedError):
            return None
        return found if found.header["run"] == run else None

    def _write(self, kind, header, arrays):
        write_bytes(self.folder / f"{kind}.safetensors", lambda file: file.write(messages.encode(kind, header, arrays)))
