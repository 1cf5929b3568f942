"""Several aligners on several seeds: the same clients and split, and for each seed the same weights and cohorts."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fedmoe_jax.experts import Partition
from fedmoe_jax.training import accountant, metrics
from fedmoe_jax.training.comparison import compare_table
from fedmoe_jax.training.config import TrainConfig, UsageError, located, to_toml, validate
from fedmoe_jax.training.memory import memory_bytes
from fedmoe_jax.training.metrics import MetricsLog, Record
from fedmoe_jax.training.plots import draw_comparison
from fedmoe_jax.training.progress import Progress
from fedmoe_jax.training.report import write_report
from fedmoe_jax.training.setup import Setup, build, variant
from fedmoe_jax.training.trainer import Run, claim


def compare(config: TrainConfig, out: str | Path, *, aligners: list[str], seeds: int, first: int = 0) -> dict[str, Any]:
    """Runs every aligner with every seed, writes each run's metrics, comparison.json, plots and report.

    Args:
      config: what all runs share; run n has the seed `config.seed + n`, and the split is that of `config.seed`.
      out: an absent or empty folder.
      aligners: names as in `config.aligner`.
      seeds: runs of each aligner, at least 1.
      first: number of the first of them.

    Returns:
      The content of comparison.json.

    Raises:
      UsageError, ValueError: naming what cannot be.
    """
    validate(config)
    config, out = located(config), Path(out)
    if out.is_dir() and any(out.iterdir()):
        raise UsageError(f"--out {out} is not empty: choose a new folder")
    claim(out, config, resume=False)
    if seeds < 1:
        raise UsageError(f"--seeds is {seeds}, it must be at least 1")
    if len(set(aligners)) < len(aligners) or not aligners:
        raise UsageError("--aligners must be different names")
    if config.on_divergence == "rollback":
        raise UsageError("on_divergence: compare keeps no checkpoints to go back to; choose continue or stop")
    if (config.devices or 1) * config.expert_devices > 1:
        raise UsageError("devices: compare trains on one device; leave devices and expert_devices out")
    configs = {aligner: dataclasses.replace(config, aligner=aligner) for aligner in aligners}
    for one in configs.values():
        validate(one)
        accountant.of_run(one, one.rounds)
    data = build(config)
    setups = {
        aligner: [variant(data, dataclasses.replace(one, seed=config.seed + n)) for n in range(first, first + seeds)]
        for aligner, one in configs.items()
    }
    metrics.write_text(out / "config.toml", to_toml(config))
    runs: dict[str, list[list[Record]]] = {}
    with Progress(len(aligners) * seeds * config.rounds) as progress:
        for aligner, each in setups.items():
            folders = [out / aligner.replace(":", "-") / f"seed-{one.config.seed}" for one in each]
            together = side_by_side(each, memory_bytes())
            how = "" if seeds == 1 else ", side by side in one program" if together else ", one after the other"
            progress.note(f"{aligner}: {seeds} {'seed' if seeds == 1 else 'seeds'} of {config.rounds} rounds{how}")
            runs[aligner] = _run(each, folders, together, progress, sum(map(len, runs.values())) * config.rounds)
    table = compare_table(runs, config.target) | metrics.environment() | {"config": dataclasses.asdict(config)}
    table |= accountant.account(config, config.rounds)
    metrics.write_json(out / "comparison.json", table)
    draw_comparison(runs, out / "plots")
    write_report(out)
    return table


def side_by_side(setups: Sequence[Setup], memory_bytes: float) -> bool:
    """Whether the runs of several seeds are to be vmapped in one program rather than follow each other.

    They are where the device is an accelerator, all clients of all runs fit into its memory, and the seeds differ in
    weights only. On a CPU they are not: it gains nothing there (benchmarks/seeds.py).
    """
    first, width = setups[0], len(setups)
    if width == 1 or jax.default_backend() == "cpu":
        return False
    fits = first.fitting(memory_bytes / width) >= min(first.config.chunk or first.config.cohort, first.config.cohort)
    return fits and one_program(setups)


def one_program(setups: Sequence[Setup]) -> bool:
    """Whether models of different seeds have the same structure and untrained state, so that one program serves all."""
    first, *others = (setup.parts for setup in setups)

    def same(other: Partition) -> bool:
        leaves = zip(jax.tree.leaves(first.rest), jax.tree.leaves(other.rest), strict=True)
        return other.graphdef == first.graphdef and all(np.array_equal(a, b) for a, b in leaves)

    return all(map(same, others))


def _run(setups: Sequence[Setup], folders: Sequence[Path], together: bool, progress: Progress, done: int) -> list[list[Record]]:
    """The records of each seed's run, which are also written to its folder; `done` rounds came before."""
    logs = []
    for setup, folder in zip(setups, folders, strict=True):
        folder.mkdir(parents=True)
        metrics.write_text(folder / "config.toml", to_toml(setup.config))
        logs.append(MetricsLog(folder / "metrics.jsonl"))
    pairs = list(zip(setups, logs, strict=True))
    reuse, run = one_program(setups), None
    for batch in [pairs] if together else [[pair] for pair in pairs]:
        these = [setup for setup, _ in batch]
        if run is None or not reuse:
            run = Run(*these, note=progress.note)
        else:
            run.start(*these)
        for records in run.blocks():
            for (setup, log), record in zip(batch, records, strict=True):
                log.append(record)
                done += 1
                progress.update(record, done, f"{setup.config.aligner}, seed {setup.config.seed}")
    return [metrics.read(log.path) for log in logs]
