"""Real processes on one machine that train one run together, and one of which is killed: python tests/processes.py --out FILE.

Each run is compared with that of one process; the killed one goes on with other numbers of processes.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

CONFIG = [
    "--population", "20", "--cohort", "7", "--experts", "4", "--eval_every", "2", "--checkpoint_every", "2", "--aligner", "random",
    "--fitness", "usage", "--probes", "0", "--rounds", "12", "--client_lr", "0.05", "--model_options", "hidden=16",
]  # fmt: skip
MEASURED = ("wall_seconds", "clients_per_second", "peak_memory_bytes")
PATIENCE = 400  # seconds for a run on a busy machine


def start(out, number, *flags, expert_devices=2, slurm=False):
    """The processes of a run, which are told where they are, or find it in the variables of their environment that Slurm sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    made = []
    for process in range(number):
        together = ["--coordinator", f"127.0.0.1:{port}", "--processes", str(number), "--process", str(process)] if number > 1 else []
        own = environment
        if slurm:
            together = ["--coordinator", "auto"]
            own = environment | {f"SLURM_{name}": str(value) for name, value in _slurm(number, process, port).items()}
        sizes = ["--expert_devices", str(expert_devices if number > 1 else 1)]
        command = [sys.executable, "-m", "fedmoe_jax.cli", "train", *CONFIG, *sizes, *flags, *together, "--out", str(out)]
        made.append(subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    return made


def _slurm(number, process, port):
    """What Slurm tells a task on one host; JAX makes a port of the job's number."""
    return dict(JOB_ID=port, STEP_NODELIST="localhost", NTASKS=number, PROCID=process, LOCALID=process)


def ended(processes):
    """(status, standard output, standard error) of each when all have ended."""
    outputs = [process.communicate(timeout=PATIENCE) for process in processes]
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def records(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def apart(out, reference):
    """The largest relative difference of a number in metrics.jsonl that is not measured."""
    found, wanted = records(out), records(reference)
    assert [record["round"] for record in found] == [record["round"] for record in wanted]
    most = 0.0
    for a, b in zip(found, wanted, strict=True):
        for name in set(b) - set(MEASURED):
            if b[name] is None or a[name] is None:
                assert a[name] is b[name], name
            else:
                x, y = np.asarray(a[name], float), np.asarray(b[name], float)
                most = max(most, float((np.abs(x - y) / np.maximum(np.abs(y), 1)).max()))
    return most


def together(folder, number, reference, slurm=False):
    """A run of several processes from its start to its end."""
    out = folder / f"of-{number}{'-slurm' * slurm}"
    done = ended(start(out, number, slurm=slurm))
    lines = [sum(not line.startswith("[Gloo]") for line in output.splitlines()) for _, output, _ in done]
    return dict(
        check="together",
        processes=number,
        statuses=[status for status, *_ in done],
        lines=lines,
        apart=apart(out, reference),
        slurm=slurm,
    )


def saved(out, after, running):
    """Waits for a checkpoint of a later round, as long as all run."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and all(process.poll() is None for process in running):
        if any(int(folder.name) > after for folder in out.glob("checkpoints/[0-9]*") if folder.name.isdigit()):
            return
        time.sleep(0.05)
    raise RuntimeError(f"no checkpoint after round {after} in {out}")


def killed(folder, victim, then, reference):
    """One process of two is killed in training; the other ends, and `then` processes go on."""
    out = folder / f"killed-{victim}-{then}"
    both = start(out, 2)
    saved(out, 0, both)
    both[victim].send_signal(signal.SIGKILL)
    start_of_wait = time.monotonic()
    _, error = both[1 - victim].communicate(timeout=PATIENCE)
    waited = time.monotonic() - start_of_wait
    both[victim].communicate()
    rounds = len(records(out))
    resumed = ended(start(out, then, "--resume"))
    said = [line for line in error.splitlines() if "another process has ended" in line or "another task died" in line]
    return dict(
        check="killed", victim=victim, status=both[1 - victim].returncode, seconds=round(waited, 1), said=len(said), rounds=rounds,
        then=then, statuses=[status for status, *_ in resumed], apart=apart(out, reference),
    )  # fmt: skip


def moved(folder, numbers, reference):
    """A run that is stopped and goes on with another number of processes, each time after a checkpoint."""
    out, stopped, rounds = folder / "moved", [], []
    for turn, number in enumerate(numbers):
        running = start(out, number, *["--resume"] * (turn > 0))
        if turn < len(numbers) - 1:
            saved(out, rounds[-1] if rounds else 0, running)
            for process in running:
                process.send_signal(signal.SIGTERM)
        statuses = [status for status, *_ in ended(running)]
        stopped.append(statuses)
        rounds.append(len(records(out)))
    return dict(
        check="moved", processes=numbers, stopped=stopped[:-1], statuses=stopped[-1], rounds=rounds, apart=apart(out, reference)
    )  # fmt: skip


def campaign(folder):
    ((status, *_),) = ended(start(folder / "alone", 1))
    assert status == 0
    yield killed(folder, 1, 1, folder / "alone")
    yield together(folder, 2, folder / "alone")
    yield killed(folder, 0, 2, folder / "alone")
    yield together(folder, 4, folder / "alone")
    yield together(folder, 2, folder / "alone", slurm=True)
    yield moved(folder, [1, 4, 2], folder / "alone")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="file of results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        results = []
        for line in campaign(Path(made)):
            print(json.dumps(line), flush=True)
            results.append(line)
            Path(options.out).write_text(json.dumps(results, indent=1) + "\n")
