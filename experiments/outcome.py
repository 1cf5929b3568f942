"""What runs of the grid reached and took, and how the tables of experiments/ say it, with 95% intervals by Student's t."""

import json
from pathlib import Path

import numpy as np

from fedmoe_jax.training.comparison import TARGET_SHARE, mean_interval

RESULTS = Path(__file__).parent / "results"
OURS, BASE, FREE, PAPER = "balanced", "random", "greedy", "paper-style greedy"
FITTEST = f"{BASE}, fittest experts"
GLOBAL, PLAIN, PRIOR = "eval_accuracy", "client_accuracy_mean", "client_accuracy_prior_mean"
COSTS = {"rounds": ("round", 1), "MB": ("bytes", 1e6), "simulated s": ("simulated_seconds", 1)}
DATA = {"fashion_mnist.npz": "Fashion-MNIST", "cifar10.npz": "CIFAR-10", "shakespeare.npz": "Shakespeare"}
KINDS = {
    "iid": "IID",
    "dirichlet": "Dirichlet {alpha:g}",
    "classes": "{classes_per_client} classes a client",
    "features": "feature shift",
    "concepts": "concept shift",
    "both": "both shifts",
    "natural": "natural clients",
}


def read(folder):
    """What has been run, by cell, in the order of tables."""
    found = ordered(json.loads(path.read_text()) for path in sorted((RESULTS / folder).glob("*.json")))
    return {result["cell"]: result for result in found}


def ordered(results):
    """By data, then from nothing to align to much, each cell before those with a factor."""

    def place(result):
        config = result["config"]
        cell, *others = result["cell"].split("+")
        return config["data"], list(KINDS).index(_kind(config)), -config["alpha"], cell, others

    return sorted(results, key=place)


def factors(result):
    """What changes the cell of a result."""
    return result["cell"].split("+")[1:]


def title(config):
    """What a cell is, in words."""
    return f"{DATA.get(config['data'], config['data'])}, {KINDS[_kind(config)].format(**config)}"


def minutes(results):
    """What all processes of some results took, in words."""
    return f"{sum(result['seconds'] for result in results) / 60:.0f} minutes"


def goals(runs):
    """The targets, by the metric that is to reach them: a share of what `random` ends with, in the mean over its seeds."""
    return {metric: TARGET_SHARE * np.mean([run[metric][-1] for run in runs[BASE]]) for metric in (PLAIN, PRIOR)}


def served_fittest(runs):
    """`runs` and, after `random`, the same runs with each client served its fittest experts, where that was measured."""
    rows = {}
    for name, seeds in runs.items():
        rows[name] = seeds
        if name == BASE:
            fair = [run | {key.replace("_fittest", ""): value for key, value in run.items() if "_fittest" in key} for run in seeds]
            rows |= {} if any(value is None for run in fair for value in run[PLAIN]) else {FITTEST: fair}
    return rows


def accuracy(seeds, metric, interval=True):
    """Percent at the end."""
    return percent(last(seeds, metric), interval=interval)


def gain(ours, others, metric):
    """Points between what runs of the same seeds end with."""
    return percent([a - b for a, b in zip(last(ours, metric), last(others, metric), strict=True)], sign="+")


def last(seeds, metric):
    """Percent at the end, of each seed."""
    return [100 * run[metric][-1] for run in seeds]


def total(seeds, cost):
    """What all rounds took, of each seed."""
    return [run[cost][-1] for run in seeds]


def costs(seeds, metric, goal):
    """Means of what a target took, in the order of COSTS; of runs that never reach it what all their rounds took."""
    places = [_first(run, metric, goal) for run in seeds]
    means = [np.mean([run[cost][place] for run, (place, _) in zip(seeds, places, strict=True)]) / unit for cost, unit in COSTS.values()]
    rounds, *others = [f"{mean:.0f}" for mean in means]
    return [rounds + _never([reached for _, reached in places]), *others]


def share(ours, others, cost, metric, goal):
    """How much less of a cost `ours` needs to the target than `others`, in the mean over pairs of the same seed; – if none reaches it."""
    mine, theirs = ([_first(run, metric, goal) for run in seeds] for seeds in (ours, others))
    reached = [found for _, found in mine + theirs]
    if not any(reached):
        return "–"
    pairs = zip(ours, mine, others, theirs, strict=True)
    less = [100 * (a[cost][i] / b[cost][j] - 1) for a, (i, _), b, (j, _) in pairs]
    return percent(less, sign="+", digits=0, unit="%") + _never(reached)


def number(seeds, metric, interval=True):
    """A metric at the end, as it is."""
    mean, half = mean_interval([run[metric][-1] for run in seeds])
    return f"{mean:.3f}" + (f" ± {half:.3f}" if interval and half is not None else "")


def percent(values, sign="", digits=1, unit="", interval=True):
    """Mean and half of the interval."""
    mean, half = mean_interval(values)
    return f"{mean:{sign}z.{digits}f}{unit}" + (f" ± {half:.{digits}f}" if interval and half is not None else "")


def table(head, rows):
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _never(reached):
    return "" if all(reached) else f", {reached.count(False)} of {len(reached)} never"


def _first(run, metric, goal):
    """The place of the first evaluation at or above a target, and True; or that of the last, and False."""
    return next(((place, True) for place, value in enumerate(run[metric]) if value >= goal), (-1, False))


def _kind(config):
    return config["split"] if config["shift"] == "none" else config["shift"]
