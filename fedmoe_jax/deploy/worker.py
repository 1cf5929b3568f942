"""The client's own process: it keeps what is compiled, and answers the client app of each message on a socket of this machine."""

import os
from multiprocessing import connection
from pathlib import Path

from fedmoe_jax.deploy.client import Client
from fedmoe_jax.deploy.messages import RefusedError

_KINDS = {b"h": lambda client, data: client.hello(), b"t": lambda client, data: client.train(data)}


def listener(folder: Path) -> connection.Listener:
    """A socket in a folder that only this user may enter."""
    folder.mkdir(mode=0o700, exist_ok=True)
    os.chmod(folder, 0o700)
    return connection.Listener(str(folder / "socket"), "AF_UNIX")


def answer(client: Client, request: bytes) -> bytes:
    """The answer to a request, a letter for its kind and the message: "+" and a message, or "-" and why there is none."""
    try:
        return b"+" + _KINDS[request[:1]](client, request[1:])
    except RefusedError as error:
        return b"-" + str(error).encode()
    except Exception as error:  # a client that fails in a round is there in the next
        return b"-" + f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".encode()


def work(client: Client, socket: connection.Listener) -> None:
    """Answers one request after the other, until the socket is closed."""
    while True:
        try:
            with socket.accept() as asked:
                asked.send_bytes(answer(client, asked.recv_bytes()))
        except (EOFError, ConnectionError):
            continue
        except OSError:
            return
