"""Who the clients of a run are: the number that each has for good, and what it said of itself."""

import dataclasses
import secrets
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from fedmoe_jax.base import ClientProfile
from fedmoe_jax.data.population import Population
from fedmoe_jax.deploy import messages
from fedmoe_jax.deploy.client import PROFILE
from fedmoe_jax.deploy.messages import Array, RefusedError
from fedmoe_jax.devices import PLAIN
from fedmoe_jax.training.config import MAX_INT
from fedmoe_jax.training.metrics import read_json, write_json

_MOST_BYTES = 1 << 16


@dataclasses.dataclass
class Roster:
    """The clients of a run by the name of their node. It is written down whenever it changes.

    `run` names the run, `solo` are the examples of its solo evaluation, settled by the clients that are there when it starts.
    """

    path: Path
    places: int
    run: str = dataclasses.field(default_factory=lambda: secrets.token_hex(8))
    solo: int | None = None
    clients: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    @classmethod
    def at(cls, path: Path, places: int) -> "Roster":
        """The roster of a file, or a new one with room for so many clients."""
        return cls(path, places, **read_json(path)) if path.exists() else cls(path, places)

    def save(self) -> None:
        """Writes it down."""
        write_json(self.path, {"run": self.run, "solo": self.solo, "clients": self.clients})

    def number(self, node: str) -> int | None:
        """The number of a node's client, or None."""
        return self.clients[node]["number"] if node in self.clients else None

    def examples(self, number: int) -> int:
        """The examples of a client, 0 if nobody knows it."""
        return next((client["examples"] for client in self.clients.values() if client["number"] == number), 0)

    def enter(self, node: str, data: bytes, *, input_shape: tuple[int, ...], label_shape: tuple[int, ...], num_classes: int) -> int:
        """Takes in what a client says of itself: its number, the one that it asks for or the lowest that is free.

        Raises:
          RefusedError: if it cannot be read, its data are not those of the run, or its number or all numbers are taken.
        """
        header, arrays = messages.decode(data, "hello", most_bytes=_MOST_BYTES)[1:]
        messages.check_header(header, dict(number=int, examples=int, classes=int, shape=list, label_shape=list))
        messages.check_arrays(arrays, {"profile": Array((len(PROFILE),))})
        if tuple(header["shape"]) != input_shape or tuple(header["label_shape"]) != label_shape or header["classes"] > num_classes:
            found = f"{header['shape']}, labels of {header['label_shape']} and {header['classes']} classes"
            raise RefusedError(f"its examples are of {found}, not {list(input_shape)}, {list(label_shape)} and {num_classes}")
        if not 0 < header["examples"] <= MAX_INT // self.places or not (arrays["profile"] > 0).all():
            raise RefusedError(f"it says to have {header['examples']} examples and to afford {arrays['profile'].tolist()}")
        others = {client["number"] for name, client in self.clients.items() if name != node}
        known = self.number(node)
        number = header["number"] if header["number"] >= 0 else known
        if number is None:
            number = next((free for free in range(self.places) if free not in others), self.places)
        if number in others or number >= self.places or known not in (None, number):
            raise RefusedError(f"number {number} is not free for it, of {self.places}")
        self.clients[node] = {"number": number, "examples": header["examples"], "profile": arrays["profile"].tolist()}
        self.save()
        return number

    def population(self, input_shape: tuple[int, ...], label_shape: tuple[int, ...], dtype: Any, *, known: bool = False) -> Population:
        """The clients without their examples, as the stages of a round read them; only those that are `known`, or all places."""
        sizes = np.zeros(self.places, np.int64)
        profile = np.array([[getattr(PLAIN, name) for name in PROFILE]] * self.places, np.float32)
        for client in self.clients.values():
            sizes[client["number"]], profile[client["number"]] = client["examples"], client["profile"]
        rows = np.flatnonzero(sizes) if known else np.arange(self.places)
        offsets = jnp.asarray(np.concatenate([[0], np.cumsum(sizes[rows])]), jnp.int32)
        x, y = jnp.zeros((1, *input_shape), dtype), jnp.zeros((1, *label_shape), jnp.int32)
        return Population(x, y, jnp.zeros(1, jnp.int32), offsets, ClientProfile(*jnp.asarray(profile[rows].T)), largest=1)
