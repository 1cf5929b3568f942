"""`fedmoe serve` and `fedmoe join`: Flower's processes around the server's loop and the client's process."""

import contextlib
import importlib
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from fedmoe_jax.deploy.client import Client
from fedmoe_jax.deploy.server import Server
from fedmoe_jax.deploy.worker import listener, work
from fedmoe_jax.training.config import TrainConfig, UsageError
from fedmoe_jax.training.interrupt import Interrupts, StoppedError, alone

_APP = """[project]
name = "fedmoe"
version = "0.1.0"
description = "Federated Mixture-of-Experts"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedmoe-jax"

[tool.flwr.app.components]
serverapp = "fedmoe_jax.deploy.flower:server_app"
clientapp = "fedmoe_jax.deploy.flower:client_app"
"""
_START_SECONDS = 60.0
_SHORT_SECONDS, _PAUSE_SECONDS = 30.0, 3.0  # a SuperNode that was up for less was refused


def serve(
    config: TrainConfig, out: Path, *, certificates: Path, keys: Path, host: str, port: int, least: int, patience: float, say: Any = print
) -> None:
    """Serves a run to real clients until its rounds are done; continues what is in `out`.

    Args:
      config: a valid configuration.
      out: folder of the run: absent, empty, or the run to continue.
      certificates: folder with ca.crt, server.crt and server.key.
      keys: folder with the public keys of the clients that may take part, *.pub.
      host, port: where the SuperLink listens, on all addresses, 0.0.0.0, or for this machine only, 127.0.0.1.
      least: clients that must be connected for a round to begin.
      patience: seconds that clients have for a round.
      say: told what happens, line by line.

    Raises:
      UsageError: if a file is missing, the folder or the port cannot be used, or an argument is out of its range.
      Interrupted: after SIGTERM or SIGINT; the round in flight is lost.
      StoppedError: if the server or the SuperLink has ended before the run is done.
    """
    names = _checked(certificates, keys)
    _check_given(config, host, port, least, patience)
    Server(config, out, note=say)  # tells what cannot be before anything is started, and claims the folder
    if (out / "summary.json").exists():
        return
    home = out.absolute() / "flower"
    with alone(home):
        _check_free(host, port)
        _serve(out, home, names, certificates=certificates, keys=keys, host=host, port=port, least=least, patience=patience, say=say)


def _serve(out, home, names, *, certificates, keys, host, port, least, patience, say) -> None:
    """Runs the SuperLink, and in it the server's app, until the run has ended."""
    (home / "app" / "fedmoe").mkdir(parents=True, exist_ok=True)
    (home / "app" / "fedmoe" / "pyproject.toml").write_text(_APP)
    settings = {"out": str(out.absolute()), "least": least, "patience": patience, "allowed": sorted(names)}
    environment = _environment(home) | {"FEDMOE_SERVE": json.dumps(settings)}
    ca, crt, key = (str((certificates / name).absolute()) for name in ("ca.crt", "server.crt", "server.key"))
    command = [sys.executable, "-m", "fedmoe_jax.deploy.superlink", "--host", host, "--port", str(port), "--enable-supernode-auth"]
    command += ["--ssl-ca-certfile", ca, "--ssl-certfile", crt, "--ssl-keyfile", key, "--disable-runtime-dependency-installation"]
    here = f"127.0.0.1:{port}"
    connection = f"[superlink.here]\naddress = {json.dumps(here)}\nroot-certificates = {json.dumps(ca)}\n"
    (home / "config.toml").write_text(f"[superlink]\ndefault = 'here'\n\n{connection}")
    log = out / "server.log"
    log.touch()
    running = _process(command, environment, home / "superlink.log")
    with Interrupts(), running as superlink, log.open(encoding="utf-8") as lines:
        lines.seek(0, os.SEEK_END)
        _wait_for("127.0.0.1", port, superlink, home / "superlink.log")
        for path in sorted(keys.glob("*.pub")):
            _flwr(environment, "supernode", "register", str(path.absolute()), "here")
        _flwr(environment, "run", str(home / "app" / "fedmoe"), "here")
        say(f"listening on {host}:{port}; a round begins when {least} clients are there")
        while not (out / "summary.json").exists():
            failed = superlink.poll() is not None
            for line in iter(lines.readline, ""):
                say(line.rstrip("\n"))
                if line.startswith("failed: "):
                    raise StoppedError(line.strip())
            if failed:
                raise StoppedError(f"the SuperLink has ended with status {superlink.returncode}: see {home / 'superlink.log'}")
            time.sleep(0.5)
        for line in lines:
            say(line.rstrip("\n"))


def join(client: Client, *, server: str, ca: Path, key: Path, attempts: int = 5, say: Any = print) -> None:
    """Takes part in a run until interrupted, waiting for the server when it is away.

    Args:
      client: with its data and folder.
      server: HOST:PORT of the SuperLink.
      ca: certificate of the authority that signed the server's.
      key: this client's private key, whose public one the server knows.
      attempts: how often in a row the server may refuse it, as it does while it is about to start.

    Raises:
      UsageError: if a file is missing.
      Interrupted: after SIGTERM or SIGINT.
      StoppedError: if the server refuses it.
    """
    importlib.import_module("flwr")
    for name, path in (("ca", ca), ("key", key)):
        if not path.is_file():
            raise UsageError(f"{name}: {path} is no file")
    home = client.shelf.folder.absolute() / "flower"
    home.mkdir(exist_ok=True)
    if not re.fullmatch(r"\S+:\d+", server):
        raise UsageError(f"--server is {server}, it must be HOST:PORT")
    log, private = home / "supernode.log", Path(tempfile.mkdtemp(prefix="fedmoe-"))  # names of sockets must be short
    command = ["flower-supernode", "--superlink", server, "--root-certificates", str(ca.absolute())]
    command += ["--auth-supernode-private-key", str(key.absolute()), "--node-config", f'socket="{private / "socket"}"']
    try:
        with Interrupts(), listener(private) as waiting:
            threading.Thread(target=work, args=(client, waiting), daemon=True).start()
            say(f"joining {server}; {log} tells more")
            failed = 0
            while failed < attempts:
                start = time.monotonic()
                with _process([*command, "--port", str(_free_port())], _environment(home), log) as supernode:
                    supernode.wait()
                failed = failed + 1 if time.monotonic() - start < _SHORT_SECONDS else 0
                time.sleep(_PAUSE_SECONDS)
            reason = next((line for line in _lines(log) if line.startswith("[code:")), "no reason is given")
            raise StoppedError(f"the server at {server} refuses this client, or is none: {reason} ({log})")
    finally:
        shutil.rmtree(private, ignore_errors=True)


def _check_given(config: TrainConfig, host: str, port: int, least: int, patience: float) -> None:
    most = math.inf if config.population is None else config.population
    if not 1 <= least <= most:
        raise UsageError(f"least: must be from 1 to population ({config.population}), got {least}")
    if not 0 < patience < math.inf:
        raise UsageError(f"patience: must be a number of seconds above 0, got {patience}")
    if not 1 <= port < 1 << 16:
        raise UsageError(f"port: must be from 1 to 65535, got {port}")
    if host not in ("0.0.0.0", "127.0.0.1", "localhost"):
        raise UsageError(f"host: must be 0.0.0.0 or 127.0.0.1, got {host}: parts of the server talk to each other at the latter")


def _check_free(host: str, port: int) -> None:
    """What already listens there would be taken for the SuperLink that is about to start."""
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise UsageError(f"port: {host}:{port} cannot be listened on ({os.strerror(error.errno or 0)})") from None


def _checked(certificates: Path, keys: Path) -> set[str]:
    """The names of the nodes of all public keys; certificates must be there."""
    from cryptography.hazmat.primitives import serialization
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    from fedmoe_jax.deploy.flower import node_name

    for name in ("ca.crt", "server.crt", "server.key"):
        if not (certificates / name).is_file():
            raise UsageError(f"certificates: {certificates} has no {name}")
    names = set()
    for path in keys.glob("*.pub"):
        try:
            public: Any = serialization.load_ssh_public_key(path.read_bytes())
            names.add(node_name(public_key_to_bytes(public)))
        except Exception as error:
            raise UsageError(f"keys: {path} is no public key of ssh-keygen -t ecdsa ({' '.join(str(error).split())[:100]})") from None
    if not names:
        raise UsageError(f"keys: {keys} has no public keys, *.pub")
    return names


def _environment(home: Path) -> dict[str, str]:
    """That of Flower's processes: its commands are those of this Python, and it sends nothing home."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.25"}
    return dict(os.environ) | quiet | {"PATH": path, "FLWR_HOME": str(home)}


@contextlib.contextmanager
def _process(command: Sequence[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen]:
    """A process with a group of its own, which ends with all that it has started, in other groups too, when the block ends."""
    with log.open("ab") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        yield process
    finally:
        started = _descendants(process.pid)
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            for other in started:
                with contextlib.suppress(psutil.NoSuchProcess):
                    other.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
            psutil.wait_procs(started, timeout=10)


def _descendants(number: int) -> list[psutil.Process]:
    try:
        return psutil.Process(number).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _flwr(environment: dict[str, str], *words: str) -> None:
    """Runs a command of Flower. A key that is registered already is as well."""
    quiet: dict[str, Any] = dict(capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=_START_SECONDS)
    done = subprocess.run(["flwr", *words], env=environment, **quiet)
    said = " ".join((done.stdout + done.stderr).split())
    if done.returncode and "already" not in said:
        raise StoppedError(f"flwr {' '.join(words[:2])} has failed: {said[-300:]}")


def _wait_for(host: str, port: int, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
            return
        time.sleep(0.2)
    raise StoppedError(f"the SuperLink does not listen on port {port}: {next(iter(_lines(log)), '')[:300]}")


def _free_port() -> int:
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        return any_port.getsockname()[1]


def _lines(log: Path) -> list[str]:
    """What a log says, the last line first."""
    return [line.strip() for line in reversed(log.read_text(errors="replace").split("\n")) if line.strip()]
