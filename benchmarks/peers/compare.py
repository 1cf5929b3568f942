"""Simulators on one workload, in turns: clients per second of each, the ratio to ours, and whether all learn the same.

    python benchmarks/peers/compare.py --workloads W1 W2 --fedjax PYTHON --pfl PYTHON --flower PYTHON >> benchmarks/results/peers.jsonl

Each run is a process of its own. A peer runs where an interpreter is given that has it: FedJAX (`pip install fedjax dm-haiku`),
pfl-research (`pip install pfl torch`), Flower (`pip install "flwr[simulation]==1.41.*" torch`).
The products of the workload alone, at the rate of a large one (limit.py), stand beside them.
One JSON line for each simulator and workload: the median over the repeats and its least and most. Test losses may differ by
2%, as cohorts and the order of batches do, or the command fails.
"""

import argparse
import datetime
import json
import os
import pathlib
import statistics
import subprocess
import sys

from fedmoe_jax.training.metrics import environment

HERE = pathlib.Path(__file__).parent
OURS = [("ours.py", "primal"), ("ours.py", "auto"), ("ours.py", "auto", "2")]  # the last one on a CPU of two cores or more
PLAIN = [("plain.py", "vmap"), ("plain.py", "vmap", "drawn"), ("plain.py", "scan"), ("limit.py",)]
PEERS = {"fedjax": [("with_fedjax.py",)], "pfl": [("with_pfl.py",), ("with_pfl.py", "2")], "flower": [("with_flower.py",)]}


def run(python, script, *arguments):
    """What one simulator reports."""
    done = subprocess.run([python, str(HERE / script), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{script} {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    print(line := done.stdout.splitlines()[-1], file=sys.stderr)  # so that a run that is cut short has told something
    return json.loads(line)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=["W1", "W2"])
    parser.add_argument("--repeats", type=int, default=3)
    for peer in PEERS:
        parser.add_argument(f"--{peer}", metavar="PYTHON", help="an interpreter that has it")
    arguments = parser.parse_args()
    about = environment()
    ours = OURS if about["device"].endswith("cpu") and (os.cpu_count() or 1) > 1 else OURS[:2]
    peers = [(sys.executable, *script) for script in ours + PLAIN]
    peers += [(python, *script) for peer in PEERS if (python := getattr(arguments, peer)) for script in PEERS[peer]]
    about = dict(device=about["device"], versions=about["versions"], date=datetime.date.today().isoformat())
    for name in arguments.workloads:
        runs = [[run(python, script, name, *rest) for python, script, *rest in peers] for _ in range(arguments.repeats)]
        losses = [result["test_loss"] for results in runs for result in results if result["test_loss"] is not None]
        if max(losses) > 1.02 * min(losses):
            raise SystemExit(f"{name}: test losses disagree, {sorted(losses)}")
        columns = list(zip(*runs, strict=True))
        fastest = max(statistics.median(result["clients_per_second"] for result in column) for column in columns[: len(ours)])
        for column in columns:
            rates = [result["clients_per_second"] for result in column]
            rate = statistics.median(rates)
            figure = dict(bench="peers", case=f"{name}, {column[0]['peer']}", metric="clients a second", value=rate, unit="1/s")
            figure |= dict(least=min(rates), most=max(rates), against="the fastest of ours", ratio=fastest / rate)
            print(json.dumps(figure | dict(peer_version=column[0]["version"], test_loss=column[0]["test_loss"]) | about), flush=True)


if __name__ == "__main__":
    main()
