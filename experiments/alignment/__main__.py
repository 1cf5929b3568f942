"""Compares aligners on each cell of the grid: one TOML file a cell beside this one.

    python -m experiments.alignment [CELL ...] --seeds 5 --out experiments/results/alignment

writes OUT/CELL.json, what every seed of every aligner reached at each evaluation. Without names it runs all cells.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from fedmoe_jax.training import metrics
from fedmoe_jax.training.compare import compare
from fedmoe_jax.training.config import TrainConfig, from_toml

HERE = Path(__file__).parent
CELLS = {path.stem: path for path in sorted(HERE.glob("*.toml"))}
ALIGNERS = {
    "random": "random",
    "load_only": "load_only",
    "greedy": "greedy",
    "paper-style greedy": "experiments.alignment.aligners:paper_greedy",
    "balanced": "balanced",
    "full": "full",
}
EVALUATED = (
    "eval_accuracy",
    "client_accuracy_mean",
    "client_accuracy_p10",
    "client_accuracy_prior_mean",
    "client_accuracy_prior_p10",
    "load_cv_total",
)


def run(name, *, aligners=tuple(ALIGNERS), seeds=5, **changes):
    """What the aligners reached on a cell with some of its fields changed, as it is written down."""
    config, start = TrainConfig(**{**from_toml(CELLS[name]), **changes}), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        table = compare(config, out, aligners=[ALIGNERS[aligner] for aligner in aligners], seeds=seeds)
        of_aligner = {aligner: out / ALIGNERS[aligner].replace(":", "-") for aligner in aligners}
        runs = {
            aligner: [curve(metrics.read(path / f"seed-{config.seed + seed}" / "metrics.jsonl")) for seed in range(seeds)]
            for aligner, path in of_aligner.items()
        }
    about = {key: table[key] for key in ("device", "versions", "config")} | {"cell": name, "seconds": round(time.monotonic() - start)}
    about["config"] = about["config"] | {"data": Path(config.data).name}
    return metrics.plain(about | {"runs": runs})


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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", metavar="CELL", help=", ".join(CELLS))
    parser.add_argument(
        "--aligners", nargs="+", choices=list(ALIGNERS), default=list(ALIGNERS), help="random and balanced are always there"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("experiments/results/alignment"))
    arguments = parser.parse_args()
    if unknown := set(arguments.cells) - set(CELLS):
        parser.error(f"no cell {', '.join(sorted(unknown))}; there are {', '.join(CELLS)}")
    aligners = [name for name in ALIGNERS if name in {*arguments.aligners, "random", "balanced"}]
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.cells or CELLS:
        metrics.write_json(arguments.out / f"{name}.json", run(name, aligners=aligners, seeds=arguments.seeds))


if __name__ == "__main__":
    main()
