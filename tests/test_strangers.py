"""What reaches real clients and their server from outside: damaged messages, other machines, and configurations that cannot be."""

import asyncio
import dataclasses
import socket
import sys

import numpy as np
import pytest
import real_clients as real

from fedmoe_jax import cli
from fedmoe_jax.deploy import launch, messages, superlink, terms
from fedmoe_jax.deploy.messages import RefusedError
from fedmoe_jax.training.config import UsageError, to_toml
from fedmoe_jax.training.interrupt import alone

pytest.importorskip("safetensors", reason="safetensors is not installed")


@pytest.mark.parametrize("place", [0, 5, 40, 100, -20, -1])
def test_damaged_messages_are_refused_or_other_numbers(place):
    data = messages.encode("kind", {"a": 1}, {"x": np.ones(8, np.float32)})
    for flip in (1, 64, 255):
        broken = bytearray(data)
        broken[place] ^= flip
        try:
            found = messages.decode(bytes(broken), "kind", most_bytes=1 << 20)
            messages.check_header(found.header, {"a": int})
            messages.check_arrays(found.arrays, {"x": messages.Array((8,))})
        except RefusedError as error:
            assert "\n" not in str(error)


def test_configurations_that_cannot_be_deployed_are_told(tmp_path):
    beside = (("noise_multiplier", 1.0), ("devices", 2), ("on_divergence", "rollback"))
    for name, value in (("router", "statistics"), ("compress_bits", 8), ("control_variates", True), ("availability", 0.5), *beside):
        with pytest.raises(ValueError, match=f"{name}: {value} cannot be had with real clients"):
            terms.deployable(dataclasses.replace(real.config(tmp_path), **{name: value}))


@pytest.mark.parametrize(
    ("path", "peer", "passes"),
    [
        ("/v1/fleet/pull-messages", "10.0.0.9", True),
        ("/v1/control/start-run", "10.0.0.9", False),
        ("/v1/control/start-run", "::ffff:10.0.0.9", False),
        ("/v1/fleet/../control/start-run", "10.0.0.9", False),
        ("/v1/runtime/acquire-task", "10.0.0.9", False),
        ("/v1/control/start-run", "127.0.0.1", True),
        ("/v1/control/start-run", "::1", True),
        ("/v1/control/start-run", None, False),
    ],
)
def test_other_machines_reach_the_fleet_only(path, peer, passes):
    sent, passed = [], []

    async def app(scope, receive, send):
        passed.append(scope["path"])

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": path, "client": peer and (peer, 1)}
    asyncio.run(superlink.Guard(app)(scope, None, send))
    assert bool(passed) == passes and (passes or sent[0]["status"] == 403)


def test_mistakes_on_the_command_line_are_told_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def told(*words, status=2):
        assert cli.main([*words]) == status
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        return line

    assert "--out is missing" in told("serve")
    assert "patience: expected a number" in told("serve", "--patience", "x", "--out", "run")
    assert "data: nowhere/data.npz holds no examples" in told("join", "--data", "nowhere/data.npz")
    monkeypatch.setitem(sys.modules, "flwr", None)
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "data.npz", x=np.zeros((2, 3), np.float32), y=np.arange(2))
    assert "pip install 'fedmoe-jax[flower]'" in told("join")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("flwr", reason="flwr is not installed")
    assert "ca: ca.crt is no file" in told("join")
    assert "certificates: certificates has no ca.crt" in told("serve", "--out", "run")
    (tmp_path / "certificates").mkdir()
    for name in ("ca.crt", "server.crt", "server.key"):
        (tmp_path / "certificates" / name).touch()
    assert "keys: keys has no public keys" in told("serve", "--out", "run")
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "a.pub").write_text("nonsense")
    assert "keys/a.pub is no public key" in told("serve", "--out", "run")
    assert not (tmp_path / "run").exists()


def test_what_serve_is_asked_for_is_looked_at_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "_checked", lambda *_: {"a"})
    real.write(tmp_path, real.data())
    of, out = real.config(tmp_path), tmp_path / "run"

    def told(**changes):
        given = dict(certificates=tmp_path, keys=tmp_path, host="127.0.0.1", port=8443, least=1, patience=1.0)
        with pytest.raises(UsageError) as caught:
            launch.serve(of, out, **(given | changes))
        return str(caught.value)

    for name, values in {"least": (0, 6), "patience": (0.0, -5.0, float("nan")), "port": (0, 70_000), "host": ("192.0.2.2", "")}.items():
        for value in values:
            assert told(**{name: value}).startswith(f"{name}: must be")
    assert not out.exists()
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert "cannot be listened on (Address already in use)" in told(port=other.getsockname()[1])
    with alone(out / "flower"):  # of another `fedmoe serve`, which a second one would end
        assert "is in use" in told()


@pytest.mark.parametrize("words", [["--out", "run"], ["--out=run"]])
def test_serve_goes_on_with_the_configuration_of_the_run(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(to_toml(real.config(tmp_path, rounds=7)))
    seen = []
    monkeypatch.setattr(launch, "serve", lambda config, *_, **given: seen.append(config.rounds))
    assert cli.main(["serve", *words]) == 0 and seen == [7]
