"""Seed-averaged figures of several aligners: what comparison.json holds."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit

from fedmoe_jax.training import metrics
from fedmoe_jax.training.metrics import Record

COMPARED = (
    "eval_accuracy",
    "eval_accuracy_best",
    "eval_loss",
    *metrics.CLIENT_ACCURACIES,
    "load_cv",
    "load_cv_total",
    "rounds_to_target",
    "bytes_to_target",
    "bytes_total",
    "simulated_seconds_total",
)
"""The figures of a run: final values of metrics, the best accuracy, what the target took, and totals over the rounds."""

TARGET_SHARE = 0.99


def mean_interval(values: Sequence[int | float]) -> tuple[float | None, float | None]:
    """Mean, and half the width of its 95% interval by Student's t; the latter None for one value, both for none."""
    if not len(values):
        return None, None
    if len(values) == 1:
        return float(values[0]), None
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return float(np.mean(values)), float(stdtrit(len(values) - 1, 0.975)) * error


def compare_table(runs: Mapping[str, Sequence[Sequence[Record]]], target: float | None = None) -> dict[str, Any]:
    """Means over seeds with 95% intervals, for each aligner and each figure of COMPARED.

    The target is `target`, or else 99% of the mean final eval_accuracy of the aligner `random` where that is among `runs`.
    What the target took is a mean over the runs that reach it; the others are counted in `censored`.

    Args:
      runs: aligner -> one list of metrics.jsonl objects for each seed.
      target: eval_accuracy to reach.

    Returns:
      {"target", "target_rule", "metrics": [figure, ...], "aligners": {aligner: {figure: {"mean", "half_width", "n",
      "censored"}}}}; `n` runs have a value, and `mean` and `half_width` are None where there are too few.

    Raises:
      ValueError: if `runs` or an aligner's list is empty, or a run has no rounds.
    """
    if not runs:
        raise ValueError("runs is empty: at least one aligner is needed")
    for aligner, seeds in runs.items():
        if not seeds or not all(seeds):
            raise ValueError(f"runs: {aligner} has no rounds to compare")
    target, rule = _target(runs, target)
    return {
        "target": target,
        "target_rule": rule,
        "metrics": list(COMPARED),
        "aligners": {aligner: _figures([_run(records, target) for records in seeds]) for aligner, seeds in runs.items()},
    }


def _target(runs, target):
    if target is not None:
        return target, "given"
    finals = [metrics.final(records, "eval_accuracy") for records in runs.get("random", [])]
    finals = [value for value in finals if value is not None]
    if not finals:
        return None, "none"
    return TARGET_SHARE * float(np.mean(finals)), "99% of the mean final global test accuracy of random"


def _run(records, target):
    """The figures of one run, and whether it is censored."""
    rounds, num_bytes = metrics.to_target(records, target)
    return {
        **{name: metrics.final(records, name) for name in COMPARED if name in metrics.METRIC_FIELDS},
        "eval_accuracy_best": metrics.best(records, "eval_accuracy"),
        "rounds_to_target": rounds,
        "bytes_to_target": num_bytes,
        "bytes_total": metrics.total(records, "bytes_down", "bytes_up"),
        "simulated_seconds_total": metrics.total(records, "simulated_seconds"),
        "censored": target is not None and rounds is None,
    }


def _figures(rows):
    censored = sum(row["censored"] for row in rows)
    figures = {}
    for name in COMPARED:
        values = [row[name] for row in rows if row[name] is not None]
        mean, half_width = mean_interval(values)
        figures[name] = {
            "mean": mean,
            "half_width": half_width,
            "n": len(values),
            "censored": censored if name.endswith("_to_target") else 0,
        }
    return figures
