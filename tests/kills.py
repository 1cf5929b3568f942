"""Runs that are killed and resumed until they end, against one that was left alone: python tests/kills.py --kills 30 --out FILE."""

import argparse
import datetime
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

from fedmoe_jax.training import metrics

MEASURED = ("wall_seconds", "clients_per_second", "peak_memory_bytes")
CONFIG = [
    "--population", "20", "--cohort", "5", "--experts", "4", "--rounds", "60", "--eval_every", "2", "--checkpoint_every", "4",
    "--model_options", "hidden=16",
]  # fmt: skip
SECONDS = {"setup": 3.0, "compilation": 3.0, "training": 0.02, "evaluation": 0.02, "checkpoint": 0.1, "restoring": 0.5, "end": 1.5}
"""How long each phase of such a run may take; a kill comes after a random part of it."""

CHILD = """
import sys
from fedmoe_jax import cli
from fedmoe_jax.training import trainer

log, stack, advanced = open(sys.argv[1], "a", buffering=1), ["start"], []

def mark(owner, name, phase):
    real = getattr(owner, name)
    def marked(*args, **kwargs):
        stack.append(phase())
        print(stack[-1], file=log)
        try:
            return real(*args, **kwargs)
        finally:
            stack.pop()
            print("loop" if stack[-1] == "start" else stack[-1], file=log)
    setattr(owner, name, marked)

def advancing():
    advanced.append(1)
    return "compilation" if len(advanced) == 1 else "training"

mark(trainer, "build", lambda: "setup")
mark(trainer, "_finish", lambda: "end")
mark(trainer.Run, "_advance", advancing)
mark(trainer.Run, "_evaluate", lambda: "evaluation")
mark(trainer.Run, "restore", lambda: "restoring")

write = trainer.Checkpoints._write
def writing(*args):
    # on a thread of its own, beside what the run does meanwhile
    print("checkpoint", file=log)
    write(*args)
    print(stack[-1], file=log)
trainer.Checkpoints._write = writing
sys.exit(cli.main(sys.argv[2:]))
"""


def launch(phases, words, cache):
    """`fedmoe` in a process of its own, which writes each phase that it enters to a file."""
    root = str(Path(__file__).parents[1])
    kept = dict(JAX_COMPILATION_CACHE_DIR=str(cache), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.2")
    kept |= dict(JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1", PYTHONPATH=root, JAX_PLATFORMS="cpu")
    command = [sys.executable, "-c", CHILD, str(phases), *map(str, words)]
    return subprocess.Popen(command, env=os.environ | kept, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def entered(phases):
    """The phases that a process has entered so far."""
    return phases.read_text().split("\n")[:-1] if phases.exists() else []


def wait_for(process, phases, phase, count, timeout=300.0):
    """Waits until a process has entered a phase so many times; False if it ended before."""
    end = time.monotonic() + timeout
    while process.poll() is None and time.monotonic() < end:
        if entered(phases).count(phase) >= count:
            return True
        time.sleep(0.001)
    return False


def save_digits(path):
    """Digits as a file, so that the processes need not load scikit-learn."""
    from fedmoe_jax.data.sources import load

    data = load("digits")
    np.savez(path, x=data.x, y=data.y, test_x=data.test_x, test_y=data.test_y, num_classes=10)


def exact(out):
    """The metrics of a run that do not depend on the machine's speed."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in MEASURED} for line in lines]


def arrays(out):
    """The weights of a run, and all of its last state."""
    with np.load(out / "weights.npz") as file:
        weights = {name: file[name] for name in file.files}
    newest = max((out / "checkpoints").iterdir(), key=lambda path: int(path.name))  # and nothing that is not complete
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        state = checkpointer.restore(newest / "state")
    return weights | {f"state {name}": np.asarray(value) for name, value in state.items()}


def differences(out, alone):
    """What two runs do not have in common: metrics, weights, state and files; empty if they are the same."""
    found = [] if exact(out) == exact(alone) else ["metrics.jsonl"]
    ours, theirs = arrays(out), arrays(alone)
    found += [name for name in sorted(ours.keys() | theirs.keys()) if not same(ours.get(name), theirs.get(name))]
    files = [sorted(path.name for path in folder.iterdir()) for folder in (out, alone)]
    return found + (["files"] if files[0] != files[1] else [])


def same(one, other):
    """Whether two arrays have the same bits."""
    alike = one is not None and other is not None and (one.dtype, one.shape) == (other.dtype, other.shape)
    return alike and one.tobytes() == other.tobytes()


def again(words, out):
    """The command that continues a run, or starts it where it has left nothing yet."""
    return ["train", "--resume", "--out", out] if (out / "config.toml").exists() else [*words, "--out", out]


def campaign(folder, kills, seed=0):
    """Kills runs `kills` times at random moments of all phases; where each fell, and what differs at the end of each run."""
    draw, cache = random.Random(seed), folder / "compiled"
    save_digits(folder / "digits.npz")
    words = ["train", *CONFIG, "--data", folder / "digits.npz"]
    alone = folder / "alone"
    process = launch(folder / "alone.phases", [*words, "--out", alone], cache)
    _, err = process.communicate()
    assert process.returncode == 0, err
    fallen, runs = [], []
    while len(fallen) < kills:
        out, number = folder / f"run-{len(runs)}", len(runs)
        for _ in range(min(draw.randint(2, 5), kills - len(fallen))):
            phase, phases = draw.choice(list(SECONDS)), folder / f"{number}-{len(fallen)}.phases"
            count = draw.randint(1, 6) if phase in ("training", "evaluation", "checkpoint") else 1
            process = launch(phases, again(words, out), cache)
            if wait_for(process, phases, phase, count):
                time.sleep(draw.random() * SECONDS[phase])
            process.kill()
            _, err = process.communicate()
            if process.returncode == -9:
                rounds = metrics.MetricsLog(out / "metrics.jsonl").whole()
                fallen.append({"run": number, "in": (entered(phases) or ["start"])[-1], "aimed_at": phase, "rounds_written": rounds})
                print(json.dumps(fallen[-1]), flush=True)
            else:
                assert process.returncode == 0, err
        process = launch(folder / f"{number}.phases", again(words, out), cache)
        _, err = process.communicate()
        runs.append({"run": number, "status": process.returncode, "differs": differences(out, alone) if process.returncode == 0 else err})
        print(json.dumps(runs[-1]), flush=True)
    return {"kills": fallen, "where": dict(Counter(kill["in"] for kill in fallen)), "runs": runs}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = campaign(Path(folder), options.kills, options.seed)
    about = metrics.environment() | {"date": datetime.date.today().isoformat(), "config": CONFIG}
    metrics.write_json(options.out, found | about)
    return any(run["differs"] or run["status"] for run in found["runs"])


if __name__ == "__main__":
    sys.exit(main())
