"""The server's loop over whatever carries its messages: greets who comes, opens rounds, takes in updates, closes them in time."""

import math
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol, runtime_checkable

from fedmoe_jax.deploy.messages import line
from fedmoe_jax.deploy.server import Server
from fedmoe_jax.training.interrupt import StoppedError
from fedmoe_jax.training.metrics import Record

HELLO, TASK = "hello", "task"
"""What a client may be asked: what it is, and a round of training."""
_MOST_IDLE = 10


class Reply(NamedTuple):
    """What came from a node that was asked something of a kind: bytes, or None and the reason why there are none.

    `stale` if the node has been asked something of the kind again since.
    """

    node: str
    kind: str
    data: bytes | None
    reason: str = ""
    stale: bool = False


@runtime_checkable
class Link(Protocol):
    """What carries messages. Nodes are named by what authenticates them, so that they have the same names for good."""

    def nodes(self) -> Iterable[str]:
        """The nodes that are connected now."""
        ...

    def push(self, kind: str, messages: dict[str, bytes], seconds: float) -> None:
        """Asks nodes; what they are asked is void after so many seconds."""
        ...

    def poll(self) -> list[Reply]:
        """What came since, in any order."""
        ...


def serve(
    server: Server,
    link: Link,
    *,
    least: int,
    patience: float,
    pause: float = 1.0,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Runs all rounds that are left, and finishes the run.

    Args:
      server: not yet started.
      link: to the clients.
      least: clients that must be connected for a round to begin.
      patience: seconds after which a round ends without those that have not answered, and those that are not in are greeted again.
      pause: seconds between two looks at the link.
      clock, sleep: seconds, and how they pass.

    Raises:
      StoppedError: after ten rounds in a row in which nobody trained.
    """
    ready: set[str] = set()
    asked: dict[str, float] = {}  # until when an answer to a hello is waited for
    until: float | None = None
    idle = 0
    while True:
        connected = set(link.nodes())
        ready &= connected
        asked = {node: end for node, end in asked.items() if node in connected}
        new = {node for node in connected - ready if clock() >= asked.get(node, -math.inf)}
        if new:
            link.push(HELLO, dict.fromkeys(new, b""), patience)
            asked |= dict.fromkeys(new, clock() + patience)
        for reply in link.poll():
            if reply.kind == HELLO and reply.data is not None and server.enter(reply.node, reply.data) is not None:
                ready.add(reply.node)
            elif reply.kind == HELLO and reply.data is None:
                server.note(f"node {reply.node} does not say what it is: {line(reply.reason)}")
            elif reply.kind == TASK and reply.data is not None:
                server.accept(reply.node, reply.data, stale=reply.stale)
            elif reply.kind == TASK and not reply.stale:  # of an earlier task it is known that nothing came
                server.refuse(reply.node, reply.reason)
        if until is not None and (not server.waiting or clock() >= until):
            record, until = server.close(), None
            server.note(told(record, server.config.rounds))
            idle = 0 if record["clients_per_second"] > 0 else idle + 1
            if idle >= _MOST_IDLE:
                raise StoppedError(f"nobody has trained in {idle} rounds in a row, see above why; started again, it goes on")
        if server.started and server.done >= server.config.rounds:
            break
        if until is None and len(ready) >= least:
            if not server.started:
                server.start()
                continue
            link.push(TASK, server.open(ready), patience)
            until = clock() + patience
        sleep(pause)
    server.finish()


def told(record: Record, rounds: int) -> str:
    """What is printed of a round that has ended."""
    facts = [f"round {record['round'] + 1}/{rounds}"]
    formats = (
        ("dropped", "dropped_clients", "{:.0f}"),
        ("loss", "train_loss", "{:.3f}"),
        ("test loss", "eval_loss", "{:.3f}"),
        ("accuracy", "eval_accuracy", "{:.3f}"),
    )
    facts += [f"{label} {form.format(record[name])}" for label, name, form in formats if record.get(name) is not None]
    return "  ".join(facts)
