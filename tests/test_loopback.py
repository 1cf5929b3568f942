"""Real clients as real processes over TLS on loopback: a SuperLink, four SuperNodes, and one whose key nobody knows."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import real_clients as real

from fedmoe_jax.deploy import layout as layouts
from fedmoe_jax.training import metrics
from fedmoe_jax.training.config import to_toml

pytest.importorskip("flwr", reason="flwr is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (shutil.which("openssl") and shutil.which("ssh-keygen")), reason="openssl or ssh-keygen is not installed"),
]

HERE = Path(__file__).parent
WIDE = {"model_options": {"hidden": 128, "expert_hidden": 512}, "client_lr": 0.05}
"""Few bytes on the wire are no weights, and training is stable: with a client_lr of 0.3 the loss rises, and rounding grows to 1e-5."""


class Relay:
    """Passes connections on to a port, and counts the bytes each way."""

    def __init__(self, port):
        self.target, self.up, self.down = port, 0, 0
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.server.accept()
                threading.Thread(target=self._connect, args=(near,), daemon=True).start()

    def _connect(self, near):
        with near, contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.target)) as far:
            up = threading.Thread(target=self._pump, args=("up", near, far))
            up.start()
            self._pump("down", far, near)
            up.join()

    def _pump(self, way, source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                setattr(self, way, getattr(self, way) + len(data))
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self):
        with contextlib.suppress(OSError):
            self.server.shutdown(socket.SHUT_RDWR)
        self.server.close()


class Network:
    """The processes of a run in a folder; all end with the block."""

    def __init__(self, folder):
        self.folder, self.processes = folder, []
        self.port = self.free()
        commands = re.search(r"```sh\n(mkdir -p certificates.*?)```", (HERE.parent / "README.md").read_text(), re.DOTALL).group(1)
        subprocess.run(["bash", "-euc", commands], cwd=folder, check=True, capture_output=True)

    @staticmethod
    def free():
        with socket.socket() as any_port:
            any_port.bind(("127.0.0.1", 0))
            return any_port.getsockname()[1]

    def start(self, name, *words):
        environment = dict(os.environ) | {"PYTHONPATH": str(HERE.parent), "JAX_PLATFORMS": "cpu"}
        with (self.folder / f"{name}.log").open("ab") as log:
            command = [sys.executable, "-m", "fedmoe_jax.cli", *words]
            process = subprocess.Popen(command, cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True)
        self.processes.append(process)
        return process

    def serve(self, **flags):
        flags = {"port": self.port, "host": "127.0.0.1", "least": 4, "patience": 120} | flags
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        return self.start("serve", "serve", "run.toml", "--out", "out", *words)

    def join(self, number, port, key=None):
        place = ["--data", f"client-{number}", "--state", f"client-{number}/kept", "--number", str(number)]
        keys = ["--ca", "certificates/ca.crt", "--key", key or f"client-{number}.key"]
        return self.start(f"join-{number}", "join", "--server", f"127.0.0.1:{port}", *place, *keys)

    def log(self, name):
        path = self.folder / name
        return path.read_text(errors="replace") if path.exists() else ""

    def until(self, true, seconds, what):
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, f"{what}: {self.log('serve.log')[-2000:]} {self.log('out/flower/superlink.log')[-2000:]}"
            time.sleep(0.5)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=30)
            with contextlib.suppress(ProcessLookupError):
                process.kill()


def prepared(folder, **changes):
    made = real.data()
    real.write(folder, made)
    of = real.config(folder, population=4, cohort=4, **changes)
    (folder / "run.toml").write_text(to_toml(of))
    real.clients(folder)
    return made, of


def rounds(folder):
    path = folder / "out" / "metrics.jsonl"
    return metrics.read(path) if path.exists() else []


def test_four_clients_over_tls_train_the_model_of_the_simulation(tmp_path):
    made, of = prepared(tmp_path, **WIDE)
    states, infos, _ = real.simulated(made, of)
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", str(tmp_path / "stranger")], check=True)
    with Network(tmp_path) as network, contextlib.closing(Relay(network.port)) as relay:
        server = network.serve()
        (tmp_path / "client-9").mkdir()
        shutil.copy(tmp_path / "client-0" / "data.npz", tmp_path / "client-9")
        stranger = network.join(9, network.port, key="stranger")
        for number in range(4):
            network.join(number, relay.port)
        network.until(lambda: server.poll() is not None, 300, "no end")
        assert server.returncode == 0, network.log("serve.log")
        network.until(lambda: stranger.poll() is not None, 90, "the stranger stays")
        assert stranger.returncode == 1 and "refuses this client" in network.log("join-9.log")
        wire = {"bytes_down": relay.down, "bytes_up": relay.up}
    records = rounds(tmp_path)
    assert [record["clients_per_second"] > 0 for record in records] == [True] * 3
    assert json.loads((tmp_path / "out" / "roster.json").read_text())["clients"].keys() == {
        line.split()[1] for line in network.log("out/server.log").splitlines() if " is client " in line
    }
    weights = np.load(tmp_path / "out" / "weights.npz")
    for path, value in (layouts.host(states[3].experts) | layouts.host(states[3].shared)).items():
        np.testing.assert_allclose(weights[path.replace(".", "/")], value, rtol=1e-5, atol=1e-6)
    found = {}
    for name, measured in wire.items():
        simulated = sum(float(getattr(info, name)) for info in infos)
        assert sum(record[name] for record in records) == pytest.approx(simulated, rel=1e-6)
        found[name] = {"simulated": simulated, "wire": measured, "ratio": round(measured / simulated, 4)}
        assert 1 <= found[name]["ratio"] < 1.05
    found["seconds"] = [round(record["wall_seconds"], 1) for record in records]
    if "FEDMOE_RESULTS" in os.environ:
        metrics.write_json(Path(os.environ["FEDMOE_RESULTS"]) / "loopback.json", found)


def test_a_run_outlives_its_server_and_a_client(tmp_path):
    prepared(tmp_path, rounds=4)
    with Network(tmp_path) as network:
        server = network.serve()
        members = [network.join(number, network.port) for number in range(4)]
        network.until(lambda: len(rounds(tmp_path)) >= 1, 240, "no first round")
        started = psutil.Process(server.pid).children(recursive=True)
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=60)
        assert server.returncode == 143
        assert len(started) >= 3 and psutil.wait_procs(started, timeout=1)[1] == []  # SuperLink, its SuperExec, the server's app
        before = rounds(tmp_path)
        os.killpg(members[3].pid, signal.SIGKILL)
        again = network.serve(least=3, patience=45)
        network.until(lambda: again.poll() is not None, 400, "no end")
        assert again.returncode == 0, network.log("serve.log")
    after = rounds(tmp_path)
    assert [record["round"] for record in after] == [0, 1, 2, 3] and after[: len(before)] == before
    assert sum(after[-1]["load"]) == 6  # of the three clients that are left
    assert after[-1]["unavailable_clients"] + after[-1]["dropped_clients"] == 1
