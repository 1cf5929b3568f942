"""The flags of `fedmoe serve` and `fedmoe join`."""

import dataclasses
from pathlib import Path
from typing import Any

from fedmoe_jax.training.config import TrainConfig, UsageError, from_toml, parse


@dataclasses.dataclass(frozen=True)
class ServeOptions:
    """Flags of `fedmoe serve` that are not part of the configuration."""

    out: str | None = None
    """Folder of the run: absent, empty, or the run to continue."""
    certificates: str = "certificates"
    """Folder with ca.crt, server.crt and server.key."""
    keys: str = "keys"
    """Folder with the public keys of the clients that may take part, *.pub."""
    host: str = "0.0.0.0"
    """Address to listen on: 0.0.0.0 for all, or 127.0.0.1 for this machine only."""
    port: int = 8443
    """Port to listen on."""
    least: int = 1
    """Clients that must be connected for a round to begin."""
    patience: float = 600.0
    """Seconds that clients have for a round."""


@dataclasses.dataclass(frozen=True)
class JoinOptions:
    """Takes part in a run as one real client."""

    server: str = "127.0.0.1:8443"
    """HOST:PORT of the server."""
    data: str = "data"
    """This client's examples: an .npz file with x and y, or a folder with data.npz."""
    state: str = "state"
    """Folder in which the client keeps what it has of the model."""
    ca: str = "ca.crt"
    """Certificate of the authority that signed the server's."""
    key: str = "client"
    """This client's private key."""
    number: int | None = None
    """Which client of the population this is, from 0; the server chooses if not given."""
    downlink: float | None = None
    """Bytes per second from the server; taken as unlimited if not given."""
    uplink: float | None = None
    """Bytes per second to the server, likewise."""
    trust: str | None = None
    """The model package.module:name that may be imported, where the run's is no built-in one."""


def serve(words: list[str], out: str | None) -> None:
    """`fedmoe serve [CONFIG.toml] [--field value ...] --out DIR`, where `out` is DIR."""
    stored = Path(out or "none") / "config.toml"
    default = TrainConfig(**from_toml(stored)) if stored.is_file() else None
    config, options = parse(TrainConfig, words, "fedmoe serve", default=default, options=ServeOptions)
    if options.out is None:
        raise UsageError("--out is missing: give the folder that the run is written to")
    from fedmoe_jax.deploy import launch

    given: dict[str, Any] = {name: getattr(options, name) for name in ("host", "port", "least", "patience")}
    launch.serve(config, Path(options.out), certificates=Path(options.certificates), keys=Path(options.keys), **given)
    print(f"done: {options.out}/summary.json")


def join(words: list[str]) -> None:
    """`fedmoe join --server HOST:PORT --data DATA --state DIR --ca ca.crt --key KEY`."""
    options, _ = parse(JoinOptions, words, "fedmoe join")
    from fedmoe_jax.deploy import launch
    from fedmoe_jax.deploy.client import Client

    links = dict(downlink=options.downlink, uplink=options.uplink)
    client = Client(options.data, options.state, number=options.number, trusted=options.trust, **links)
    launch.join(client, server=options.server, ca=Path(options.ca), key=Path(options.key))
