"""Does `fedmoe compare` gain by training several seeds in one vmapped program? One JSON line a case.

    python benchmarks/seeds.py [OUT.jsonl]

The ratio is (seeds x time of a round of one seed) / (time of a round of all seeds in one program); above 1, one program
is faster. Medians over blocks of 20 rounds, the two sides taking turns in one process.
"""

import dataclasses
import datetime
import json
import statistics
import sys
import time

from fedmoe_jax.training import metrics
from fedmoe_jax.training.config import TrainConfig
from fedmoe_jax.training.setup import build, variant
from fedmoe_jax.training.trainer import Run

ROUNDS, BLOCKS = 20, 7
CASES = {
    "digits mlp, random": dict(aligner="random"),
    "digits mlp, balanced": dict(aligner="balanced"),
    "digits mlp, 16 experts, cohort 50, balanced": dict(aligner="balanced", experts=16, cohort=50),
    "digits resnet, balanced": dict(aligner="balanced", model="resnet", cohort=10),
}
SEEDS = (2, 5)


def block(run, first=False):
    """Seconds that a round takes."""
    start = time.perf_counter()
    run._advance(run.setup.population, ROUNDS, first=first)
    return (time.perf_counter() - start) / ROUNDS


def measure(case, options, seeds):
    config = TrainConfig(rounds=1000, eval_every=ROUNDS, **options)
    one = build(config)
    setups = [one, *(variant(one, dataclasses.replace(config, seed=seed)) for seed in range(1, seeds))]
    runs = Run(one), Run(*setups)
    first = [ROUNDS * block(run, first=True) for run in runs]
    pairs = [[block(run) for run in runs] for _ in range(BLOCKS)]
    alone, together = (statistics.median(times) for times in zip(*pairs, strict=True))
    return {
        "bench": "seeds",
        "case": f"{case}, {seeds} seeds",
        "metric": "seconds_per_round",
        "value": together,
        "unit": "s",
        "against": f"{seeds} runs one after the other, {seeds} x {alone:.6f} s",
        "ratio": statistics.median(seeds * a / b for a, b in pairs),
        "first_block": dict(zip(("alone", "together"), first, strict=True)),
        "device": metrics.device(),
        "versions": metrics.versions(),
        "date": datetime.date.today().isoformat(),
    }


def main(arguments):
    for case, options in CASES.items():
        for seeds in SEEDS:
            line = json.dumps(measure(case, options, seeds))
            print(line, flush=True)
            if arguments:
                with open(arguments[0], "a", encoding="utf-8") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
