"""Cells of experiments and how they are run: a process for each cell and aligner, or each seed, side by side on the devices there are.

A cell is a TOML file of fields of `fedmoe train`. CELL+FACTOR is the cell with what the file FACTOR.toml changes of it.
"""

import argparse
import concurrent.futures
import dataclasses
import hashlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedmoe_jax.training import metrics
from fedmoe_jax.training.compare import compare
from fedmoe_jax.training.config import TrainConfig, from_toml

HERE = Path(__file__).parent
CELLS = {path.stem: path for path in sorted((HERE / "alignment").glob("*.toml"))}
FACTORS = {path.stem: path for path in sorted((HERE / "factors").glob("*.toml"))}
ALIGNERS = {
    "random": "random",
    "load_only": "load_only",
    "greedy": "greedy",
    "paper-style greedy": "experiments.alignment.aligners:paper_greedy",
    "balanced": "balanced",
    "full": "full",
    **{f"fitness + {weight} deficit": f"experiments.alignment.aligners:deficit_{weight.replace('.', '_')}" for weight in ("0.3", "1", "3")},
    "balanced, UCB": "experiments.alignment.aligners:balanced_ucb",
    "balanced, forgetting": "experiments.alignment.aligners:balanced_forgetting",
}
COMPARED = ("random", "load_only", "greedy", "paper-style greedy", "balanced", "full")
DEFAULTS = metrics.plain(dataclasses.asdict(TrainConfig()))
EVALUATED = ("eval_accuracy", *metrics.CLIENT_ACCURACIES, "load_cv_total", "load_least_total")


def configuration(name, **changes):
    """The configuration of a cell, CELL or CELL+FACTOR+..., with some fields changed once more."""
    cell, *factors = name.split("+")
    fields = dataclasses.asdict(TrainConfig(**from_toml(CELLS[cell])))
    for factor in factors:
        changed = from_toml(FACTORS[factor])
        fields |= changed | {"model_options": fields["model_options"] | changed.get("model_options", {})}
    return TrainConfig(**(fields | changes))


def run(name, *, aligners=COMPARED, seeds=5, first=0, **changes):
    """What the aligners reached on a cell with some of its fields changed, as it is written down, from seed number `first` on."""
    config, start = configuration(name, **changes), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        table = compare(config, out, aligners=[ALIGNERS[aligner] for aligner in aligners], seeds=seeds, first=first)
        of_aligner = {aligner: out / ALIGNERS[aligner].replace(":", "-") for aligner in aligners}
        runs = {
            aligner: [curve(metrics.read(path / f"seed-{config.seed + seed}" / "metrics.jsonl")) for seed in range(first, first + seeds)]
            for aligner, path in of_aligner.items()
        }
    about = {key: table[key] for key in ("device", "versions", "config")} | {"cell": name, "seconds": round(time.monotonic() - start)}
    about["config"] = about["config"] | {"data": Path(config.data).name}
    made = {"source": source(), "device": about["device"], "versions": about["versions"]}
    return metrics.plain(about | {"made": dict.fromkeys(aligners, made), "runs": runs})


def source():
    """A hash of the package's source, so that results tell which state of it they are of."""
    digest = hashlib.sha256()
    for path in sorted((HERE.parent / "fedmoe_jax").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def curve(records):
    """The evaluations of a run, bytes and simulated seconds being totals until then."""
    seen = [place for place, record in enumerate(records) if record["eval_accuracy"] is not None]
    totals = {
        "bytes": np.cumsum([record["bytes_down"] + record["bytes_up"] for record in records]),
        "simulated_seconds": np.cumsum([record["simulated_seconds"] for record in records]),
    }
    columns = {name: [records[place][name] for place in seen] for name in EVALUATED}
    columns |= {name: total[seen].tolist() for name, total in totals.items()}
    short = {name: [value if value is None else float(f"{value:.5g}") for value in column] for name, column in columns.items()}
    return {"round": [records[place]["round"] + 1 for place in seen]} | short


def merge(path, parts):
    """Writes results of some aligners to a file that may have others of the same cell already, on the same configuration.

    Raises:
      ValueError: if the configurations or the numbers of seeds differ.
    """
    found = [*([metrics.read_json(path)] if path.is_file() else []), *parts]
    _require_alike(path, found)
    runs = {aligner: seeds for part in found for aligner, seeds in part["runs"].items()}
    ordered = {aligner: runs[aligner] for aligner in ALIGNERS if aligner in runs}
    made = {aligner: how for part in found for aligner, how in part.get("made", {}).items()}
    about = found[-1] | {"seconds": sum(part["seconds"] for part in found), "made": made, "runs": ordered}
    metrics.write_text(path, json.dumps(about) + "\n")


def _require_alike(path, parts):
    first, *others = (DEFAULTS | part["config"] | {"seeds": {len(seeds) for seeds in part["runs"].values()}} for part in parts)
    for other in others:
        if names := [name for name in first | other if other.get(name) != first.get(name)]:
            raise ValueError(f"{path}: has results with another {', '.join(names)}; move it away")


class Task(NamedTuple):
    """What one process runs: all seeds of an aligner on a cell, or one."""

    cell: str
    aligner: str
    seed: int | None = None

    def __str__(self):
        return f"{self.cell} with {self.aligner}" + ("" if self.seed is None else f", seed {self.seed}")

    def part(self, out):
        """Where the results of one seed wait for those of the others."""
        return out / "parts" / f"{self.cell}, {self.aligner}, {self.seed}.json"


def gather(out, cell, aligner, seeds):
    """Merges the results of an aligner's seeds into those of the cell, if all are there."""
    paths = [Task(cell, aligner, seed).part(out) for seed in range(seeds)]
    if not all(path.is_file() for path in paths):
        return
    parts = [metrics.read_json(path) for path in paths]
    for path, part in zip(paths, parts, strict=True):
        _require_alike(path, [parts[0], part])
    runs = {aligner: [run for part in parts for run in part["runs"][aligner]]}
    merge(out / f"{cell}.json", [parts[-1] | {"seconds": sum(part["seconds"] for part in parts), "runs": runs}])
    for path in paths:
        path.unlink()


def main(description, module, plan):
    """The command of an experiment: runs the cells that its arguments name, or all of `plan`, which has the aligners of each."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", metavar="CELL", help=f"CELL or CELL+FACTOR: {', '.join(plan)}")
    parser.add_argument("--aligners", nargs="+", choices=list(ALIGNERS), help="in place of those planned")
    parser.add_argument("--seeds", type=_positive, default=5)
    parser.add_argument("--out", type=Path, default=HERE / "results" / module.rpartition(".")[2])
    parser.add_argument("--jobs", type=_positive, default=1, help="processes side by side")
    parser.add_argument("--devices", type=_positive, help="GPUs over which they are spread")
    parser.add_argument(
        "--apart", action="store_true", help="a process for each seed; those that an earlier command finished are not run again"
    )
    parser.add_argument("--only", type=int, metavar="SEED", help="this seed of one cell and aligner")
    chosen = parser.parse_args()
    for name in chosen.cells:
        cell, *factors = name.split("+")
        if cell not in CELLS or not set(factors) <= set(FACTORS):
            parser.error(f"no cell {name}; there are {', '.join(CELLS)}, and factors {', '.join(FACTORS)}")
    chosen.out.mkdir(parents=True, exist_ok=True)
    pairs = [(cell, aligner) for cell in chosen.cells or plan for aligner in chosen.aligners or plan.get(cell, COMPARED)]
    if len(pairs) == 1 and not chosen.apart:
        ((cell, aligner),) = pairs
        which = dict(seeds=chosen.seeds) if chosen.only is None else dict(seeds=1, first=chosen.only)
        merge(chosen.out / f"{cell}.json", [run(cell, aligners=[aligner], **which)])
    elif failed := _side_by_side(module, pairs, chosen):
        sys.exit(f"{len(failed)} failed: {', '.join(failed)}")


def _positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def _side_by_side(module, pairs, chosen):
    """Runs each task in a process of its own, and keeps its results as soon as they are there; those that failed."""
    failed, devices = [], queue.SimpleQueue()
    for job in range(chosen.jobs):
        devices.put(job % (chosen.devices or 1))
    tasks = [Task(*pair, seed) for seed in (range(chosen.seeds) if chosen.apart else [None]) for pair in pairs]
    tasks = [task for task in tasks if not task.part(chosen.out).is_file()]
    for pair in pairs if chosen.apart else []:
        gather(chosen.out, *pair, chosen.seeds)
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(chosen.jobs) as pool:
        parts = [Path(folder) / str(number) for number in range(len(tasks))]
        running = {pool.submit(_process, module, devices, *each, chosen): each for each in zip(tasks, parts, strict=True)}
        try:
            for future in concurrent.futures.as_completed(running):
                task, part = running[future]
                try:
                    future.result()
                    _keep(task, metrics.read_json(part / f"{task.cell}.json"), chosen)
                except (OSError, ValueError, subprocess.CalledProcessError) as error:
                    print(error, file=sys.stderr)
                    failed.append(str(task))
        finally:
            pool.shutdown(cancel_futures=True)
    return failed


def _keep(task, result, chosen):
    """Puts the results of a task where they belong."""
    if task.seed is None:
        return merge(chosen.out / f"{task.cell}.json", [result])
    path = task.part(chosen.out)
    path.parent.mkdir(exist_ok=True)
    metrics.write_text(path, json.dumps(result) + "\n")
    return gather(chosen.out, task.cell, task.aligner, chosen.seeds)


def _process(module, devices, task, out, chosen):
    """Runs a task on a device of which no more than a fair number of other processes have a part."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(out.parent / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5"}
    environment, device = cache | os.environ, devices.get()
    if chosen.devices:
        share = 0.9 / -(-chosen.jobs // chosen.devices)
        environment |= {"CUDA_VISIBLE_DEVICES": str(device), "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{share:.2f}"}
    seeds = ["--seeds", str(chosen.seeds)] if task.seed is None else ["--only", str(task.seed)]
    words = [sys.executable, "-m", module, task.cell, "--aligners", task.aligner, *seeds, "--out", str(out)]
    try:
        subprocess.run(words, env=environment, check=True)
    finally:
        devices.put(device)
