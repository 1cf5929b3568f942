"""Flower's two apps: the server's loop on a grid of nodes, and a client app that hands messages to the client's own process.

Messages travel as bytes in an array record. The server app finds what to do in the environment variable `SETTINGS`, which
`launch.serve` sets, a client app the socket of the client's process in the configuration of its node, which `launch.join` sets.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable
from multiprocessing import connection
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

SETTINGS = "FEDMOE_SERVE"
"""The environment variable with what `serve` was asked for, as JSON."""
_NAME = "fedmoe"
_TYPES = {"hello": MessageType.QUERY, "task": MessageType.TRAIN}

client_app = ClientApp()
server_app = ServerApp()


def pack(data: bytes) -> RecordDict:
    """Bytes as Flower's records."""
    return RecordDict({_NAME: ArrayRecord({_NAME: Array(dtype="uint8", shape=(len(data),), stype="bytes", data=data)})})


def unpack(content: RecordDict) -> bytes:
    """The bytes of `pack`; empty if there are none."""
    record = content.array_records.get(_NAME)
    return record[_NAME].data if record is not None and _NAME in record else b""


def _ask(kind: bytes, message: Message, context: Context) -> Message:
    """Lets the client's process answer."""
    with connection.Client(str(context.node_config["socket"]), "AF_UNIX") as client:
        client.send_bytes(kind + unpack(message.content))
        answer = client.recv_bytes()
    if answer[:1] != b"+":
        raise RuntimeError(answer[1:].decode(errors="replace"))
    return Message(pack(answer[1:]), reply_to=message)


@client_app.query()
def hello(message: Message, context: Context) -> Message:
    """What the client says of itself."""
    return _ask(b"h", message, context)


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """A round of the client."""
    return _ask(b"t", message, context)


class GridLink:
    """A `loop.Link` on Flower's grid.

    Args:
      grid: of the server app.
      allowed: names of the nodes that may take part, see `node_name`; None for all.
      note: told of nodes that may not, in one line.
    """

    def __init__(self, grid: Grid, allowed: set[str] | None, note: Any):
        self.grid, self.allowed, self.note = grid, allowed, note
        self._ids: dict[str, int] = {}
        self._refused: set[str] = set()
        self._pending: dict[str, tuple[str, str]] = {}
        self._last: dict[tuple[str, str], str] = {}

    def nodes(self) -> Iterable[str]:
        """Names of the connected nodes that may take part."""
        nodes = self.grid.get_nodes()
        self._ids = {node_name(node.public_key) if node.public_key else f"id-{node.node_id}": node.node_id for node in nodes}
        for name in self._ids.keys() - self._refused if self.allowed is not None else ():
            if self.allowed is not None and name not in self.allowed:
                self._refused.add(name)
                self.note(f"node {name} is refused: its key is not among those of --keys")
        return [name for name in self._ids if self.allowed is None or name in self.allowed]

    def push(self, kind: str, messages: dict[str, bytes], seconds: float) -> None:
        """Sends a message each. Answers to earlier ones of the kind are stale then; Flower ends those that are void with an error."""
        for name, data in messages.items():
            message = Message(pack(data), self._ids[name], _TYPES[kind], ttl=seconds)
            for key in self.grid.push_messages([message]):
                if key:
                    self._pending[key] = name, kind
                    self._last[name, kind] = key

    def poll(self) -> list[Any]:
        """The answers that have come."""
        from fedmoe_jax.deploy.loop import Reply

        replies = []
        for message in self.grid.pull_messages(list(self._pending)) if self._pending else ():
            key = message.metadata.reply_to_message_id
            name, kind = self._pending.pop(key, ("", ""))
            stale = self._last.get((name, kind)) != key
            if name and message.has_error():
                replies.append(Reply(name, kind, None, message.error.reason or "", stale))
            elif name:
                replies.append(Reply(name, kind, unpack(message.content), stale=stale))
        return replies


def node_name(public_key: bytes) -> str:
    """The name of a node for good: a digest of the public key that authenticates it, in Flower's form."""
    return hashlib.sha256(public_key).hexdigest()[:16]


def _alone(folder: Path, seconds: float = 30.0) -> contextlib.ExitStack:
    """`interrupt.alone`, once the server of an earlier SuperLink, which ends with it, is gone."""
    from fedmoe_jax.training.config import UsageError
    from fedmoe_jax.training.interrupt import alone

    stack, end = contextlib.ExitStack(), time.monotonic() + seconds
    while True:
        try:
            stack.enter_context(alone(folder))
            return stack
        except UsageError:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs what `launch.serve` was asked for."""
    from fedmoe_jax.deploy.loop import serve
    from fedmoe_jax.deploy.server import Server
    from fedmoe_jax.training.config import TrainConfig, from_toml

    settings = json.loads(os.environ[SETTINGS])
    out = Path(settings["out"])

    def note(line: str) -> None:
        with (out / "server.log").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    try:
        with _alone(out):
            server = Server(TrainConfig(**from_toml(out / "config.toml")), out, note=note)
            serve(server, GridLink(grid, set(settings["allowed"]), note), least=settings["least"], patience=settings["patience"])
    except Exception as error:
        note(f"failed: {type(error).__name__}: {' '.join(str(error).split())}")
        raise
