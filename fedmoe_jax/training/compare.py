"""Several aligners on several seeds: the same clients and split, and for each seed the same weights and cohorts."""

import dataclasses
from pathlib import Path
from typing import Any

from fedmoe_jax.training import metrics
from fedmoe_jax.training.comparison import compare_table
from fedmoe_jax.training.config import TrainConfig, UsageError, to_toml, validate
from fedmoe_jax.training.metrics import MetricsLog, Record
from fedmoe_jax.training.plots import draw_comparison
from fedmoe_jax.training.progress import Progress
from fedmoe_jax.training.report import write_report
from fedmoe_jax.training.setup import build
from fedmoe_jax.training.trainer import Run, claim


def compare(config: TrainConfig, out: str | Path, *, aligners: list[str], seeds: int) -> dict[str, Any]:
    """Runs every aligner with every seed, writes each run's metrics, comparison.json, plots and report.

    Args:
      config: what all runs share; run n has the seed `config.seed + n`, and the split is that of `config.seed`.
      out: an absent or empty folder.
      aligners: names as in `config.aligner`.
      seeds: runs of each aligner, at least 1.

    Returns:
      The content of comparison.json.

    Raises:
      UsageError, ValueError: naming what cannot be.
    """
    out = Path(out)
    claim(out, config, resume=False)
    if seeds < 1:
        raise UsageError(f"--seeds is {seeds}, it must be at least 1")
    if len(set(aligners)) < len(aligners) or not aligners:
        raise UsageError("--aligners must be different names")
    configs = {aligner: [dataclasses.replace(config, aligner=aligner, seed=config.seed + n) for n in range(seeds)] for aligner in aligners}
    for each in configs.values():
        validate(each[0])
    build(config, split_seed=config.seed)
    metrics.write_text(out / "config.toml", to_toml(config))
    runs: dict[str, list[list[Record]]] = {}
    with Progress(len(aligners) * seeds * config.rounds) as progress:
        for aligner, each in configs.items():
            progress.note(f"{aligner}: {seeds} seeds of {config.rounds} rounds")
            runs[aligner] = [_run(one, config.seed, out / aligner.replace(":", "-") / f"seed-{one.seed}", progress) for one in each]
    table = compare_table(runs, config.target) | metrics.environment() | {"config": dataclasses.asdict(config)}
    metrics.write_json(out / "comparison.json", table)
    draw_comparison(runs, out / "plots")
    write_report(out)
    return table


def _run(config: TrainConfig, split_seed: int, folder: Path, progress: Progress) -> list[Record]:
    folder.mkdir(parents=True)
    metrics.write_text(folder / "config.toml", to_toml(config))
    log = MetricsLog(folder / "metrics.jsonl")
    for record in Run(build(config, split_seed=split_seed), progress.note).blocks():
        log.append(record)
        progress.update(record)
    return metrics.read(log.path)
