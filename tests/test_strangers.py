"""What reaches real clients and their server from outside: damaged messages, other machines, and configurations that cannot be."""

import asyncio
import dataclasses
import os
import socket
import subprocess
import sys
import time
import types

import numpy as np
import psutil
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


GUARDED = """
import asyncio, sys, httpx, uvicorn
from fedmoe_jax.deploy import superlink

made = []
uvicorn.run = lambda app, **options: made.append(app)
sys.argv = ["flower-superlink", "--insecure", "--isolation", "process"]
superlink.main()

async def ask(path, peer):
    wire = httpx.ASGITransport(made[0], client=(peer, 1), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=wire, base_url="http://server") as client:
        return (await client.post(path)).text == "only from this machine"

for path in ("/v1/control/start-run", "/v1/runtime/acquire-task", "/health", "/v1/fleet/pull-messages"):
    print(path, *(asyncio.run(ask(path, peer)) for peer in ("10.0.0.9", "127.0.0.1")))
"""


def test_the_superlink_asks_the_guard(tmp_path):
    pytest.importorskip("flwr", reason="flwr is not installed")
    environment = dict(os.environ) | {"FLWR_HOME": str(tmp_path), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    done = subprocess.run([sys.executable, "-c", GUARDED], env=environment, capture_output=True, text=True, timeout=120)
    answers = [line.split() for line in done.stdout.splitlines() if line.startswith(("/v1/", "/health"))]
    assert [words[1:] for words in answers] == [["True", "False"]] * 3 + [["False", "False"]], done.stderr[-2000:]


class FakeGrid:
    """Flower's grid with nodes of which tests make the answers."""

    def __init__(self, *keys):
        self.nodes = [types.SimpleNamespace(node_id=number, public_key=key) for number, key in enumerate(keys, 1)]
        self.sent, self.answers, self.asked = [], [], []

    def get_nodes(self):
        return self.nodes

    def push_messages(self, messages):
        self.sent += messages
        return [f"message-{len(self.sent)}" for _ in messages]

    def pull_messages(self, keys):
        self.asked = list(keys)
        found, self.answers = self.answers, []
        return found

    def answer(self, key, data=None, reason=""):
        from fedmoe_jax.deploy import flower

        about = types.SimpleNamespace(reply_to_message_id=key)
        error, content = types.SimpleNamespace(reason=reason), None if data is None else flower.pack(data)
        self.answers.append(types.SimpleNamespace(metadata=about, has_error=lambda: data is None, error=error, content=content))


def test_the_link_tells_answers_to_earlier_tasks_from_those_to_the_last(monkeypatch):
    pytest.importorskip("flwr", reason="flwr is not installed")
    from flwr.serverapp import Grid
    from flwr.supercore.task_identity import TaskIdentity

    from fedmoe_jax.deploy import flower

    Grid.register(FakeGrid)
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    names, told = [flower.node_name(key) for key in (b"one", b"two", b"three")], []
    grid = FakeGrid(b"one", b"two", b"three")
    link = flower.GridLink(grid, set(names[:2]), told.append)
    assert sorted(link.nodes()) == sorted(names[:2]) and sorted(link.nodes()) == sorted(names[:2])
    assert told == [f"node {names[2]} is refused: its key is not among those of --keys"]
    assert link.poll() == [] and grid.asked == []
    link.push("hello", {names[0]: b""}, 5.0)
    link.push("task", {names[0]: b"first", names[1]: b"other"}, 5.0)
    link.push("task", {names[0]: b"second"}, 5.0)
    assert [(m.metadata.dst_node_id, m.metadata.message_type, flower.unpack(m.content)) for m in grid.sent] == [
        (1, "query", b""), (1, "train", b"first"), (2, "train", b"other"), (1, "train", b"second"),
    ]  # fmt: skip
    for key, data in (("message-2", b"late"), ("message-1", b"hello"), ("message-4", b"update"), ("unknown", b"x")):
        grid.answer(key, data)
    grid.answer("message-3", reason="it broke")
    assert link.poll() == [
        (names[0], "task", b"late", "", True), (names[0], "hello", b"hello", "", False), (names[0], "task", b"update", "", False),
        (names[1], "task", None, "it broke", False),
    ]  # fmt: skip
    assert grid.asked == [f"message-{number}" for number in (1, 2, 3, 4)] and link.poll() == []


STARTS = """
import subprocess, sys, time
inner = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '600'], start_new_session=True).pid, flush=True); time.sleep(600)"
print(subprocess.Popen([sys.executable, "-c", inner], start_new_session=True).pid, flush=True)
time.sleep(600)
"""


def test_what_a_process_has_started_ends_with_it_in_groups_of_its_own_too(tmp_path):
    log, end = tmp_path / "log", time.monotonic() + 30
    with launch._process([sys.executable, "-c", STARTS], dict(os.environ), log):
        while len(log.read_text().split()) < 2:
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        numbers = [int(word) for word in log.read_text().split()]
        assert all(psutil.pid_exists(number) for number in numbers)
    assert not any(psutil.pid_exists(number) and psutil.Process(number).status() != psutil.STATUS_ZOMBIE for number in numbers)


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
