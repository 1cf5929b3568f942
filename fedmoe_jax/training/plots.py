"""The pictures of a run and of a comparison, drawn from its records as PNG files, without a display or global state."""

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from fedmoe_jax.training.comparison import mean_interval
from fedmoe_jax.training.metrics import Record

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito: safe for colour-blind readers
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LABELS = {
    "train_loss": "training loss",
    "eval_loss": "global test loss",
    "eval_accuracy": "global test accuracy",
    "client_accuracy_mean": "client accuracy, mean",
    "client_accuracy_p10": "client accuracy, 10th percentile",
    "client_accuracy_prior_mean": "client accuracy with label prior, mean",
    "client_accuracy_prior_p10": "client accuracy with label prior, 10th percentile",
    "client_accuracy_fittest_mean": "client accuracy with its fittest experts, mean",
    "load_cv": "CV of clients per expert, this round",
    "load_cv_total": "CV of tokens per expert, whole run",
}
COMPARED_CURVES = ("eval_accuracy", "client_accuracy_mean", "client_accuracy_p10", "eval_loss", "load_cv", "load_cv_total")
FEW_SEEDS = 4  # up to which the curves of a comparison show single seeds: an interval of so few says little
_MOST_ROWS = 400  # clients drawn in the fitness map
_UNKNOWN = "#dddddd"
_MOST_MARKERS = 15
_DENSE = 300  # points from which a line is drawn thin


def learning_curves(records: Sequence[Record], path: str | Path) -> Path:
    """Loss, and accuracy of the global model and of the clients, over the rounds."""
    figure, (loss, accuracy) = _figure(1, 2, size=(11, 4))
    _lines(loss, records, ("train_loss", "eval_loss"))
    _lines(accuracy, records, ("eval_accuracy", "client_accuracy_mean", "client_accuracy_p10"))
    _finish(loss, "round", "loss (nats)")
    _finish(accuracy, "round", "accuracy")
    return _save(figure, path)


def load_heatmap(records: Sequence[Record], path: str | Path) -> Path:
    """Load of each expert in each round, relative to the round's mean, and how uneven it is."""
    figure, (heat, spread) = _figure(2, 1, size=(11, 5.5), sharex=True, height_ratios=(2.4, 1))
    known = [line for line in records if line.get("load")]
    if known:
        load = np.array([line["load"] for line in known], float).T
        mean = load.mean(0, keepdims=True)
        relative = np.divide(load, mean, out=np.zeros_like(load), where=mean > 0)
        most = max(2.0, float(np.quantile(relative, 0.99)))
        extent = (known[0]["round"] + 0.5, known[-1]["round"] + 1.5, len(load) - 0.5, -0.5)
        norm = TwoSlopeNorm(1.0, 0.0, most)
        image = heat.imshow(relative, aspect="auto", cmap="PuOr_r", norm=norm, extent=extent, interpolation_stage="data")
        bar = figure.colorbar(
            image, ax=heat, extend="max" if relative.max() > most else "neither", ticks=[0, 0.5, 1, (1 + most) / 2, most], format="{x:.2g}"
        )
        bar.set_label("load / mean of the round")
        heat.set_xlim(extent[:2])
    _whole_numbers(heat.yaxis)
    _lines(spread, records, ("load_cv", "load_cv_total"), markers=False)
    spread.set_ylim(bottom=0)
    _finish(heat, None, "expert", grid=False, empty=not known)
    _finish(spread, "round", "CV", legend_above=True)
    return _save(figure, path)


def fitness_map(values: Float[np.ndarray, "client expert"], path: str | Path) -> Path:
    """Fitness of each client for each expert; clients are sorted by their best expert, so that specialisation shows as steps.

    Pairs that are NaN, whose fitness is not known, are grey, and clients that have no others come last.
    """
    values = np.asarray(values, float)
    num_clients = len(values)
    known = np.where(np.isfinite(values), values, -np.inf)
    order = np.lexsort((-known.max(1), known.argmax(1), np.isneginf(known).all(1)))
    shown = order[np.unique(np.linspace(0, num_clients - 1, min(num_clients, _MOST_ROWS)).round().astype(int))]
    figure, axes = _figure(1, 1, size=(7, 5.5))
    rows = np.where(np.isfinite(values[shown]), values[shown], np.nan)
    axes.set_facecolor(_UNKNOWN)
    image = axes.imshow(rows, aspect="auto", cmap="viridis", interpolation="nearest")
    figure.colorbar(image, ax=axes).set_label("fitness (higher is better)")
    _whole_numbers(axes.xaxis)
    _whole_numbers(axes.yaxis)
    if not np.isfinite(rows).all():
        grey = Patch(facecolor=_UNKNOWN, label="still at the prior, as pairs never tried are")
        axes.legend(handles=[grey], frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1.0, 0.99))
    some = f"{len(shown)} of {num_clients:,} clients" if len(shown) < num_clients else "clients"
    _finish(axes, "expert", f"{some}, sorted by best expert", grid=False, empty=not np.isfinite(rows).any())
    return _save(figure, path)


def cost_curves(records: Sequence[Record], path: str | Path) -> Path:
    """Accuracy against what it took: bytes down and up of all clients, and simulated seconds, both summed over the rounds."""
    figure, (traffic, duration) = _figure(1, 2, size=(11, 4), sharey=True)
    num_bytes = np.cumsum([(line.get("bytes_down") or 0) + (line.get("bytes_up") or 0) for line in records])
    seconds = np.cumsum([line.get("simulated_seconds") or 0 for line in records])
    metrics = ("eval_accuracy", "client_accuracy_mean")
    for axes, amount, units, label in (
        (traffic, num_bytes, (("B", 1), ("kB", 1e3), ("MB", 1e6), ("GB", 1e9), ("TB", 1e12)), "bytes down and up"),
        (duration, seconds, (("s", 1), ("min", 60), ("h", 3600), ("days", 86400)), "simulated time"),
    ):
        unit, size = max((u for u in units if u[1] * 2 <= (amount[-1] if len(amount) else 0)), key=lambda u: u[1], default=units[0])
        _lines(axes, records, metrics, x=amount / size)
        _finish(axes, f"{label} ({unit})", "accuracy" if axes is traffic else None, integer=False)
    return _save(figure, path)


def compare_curves(runs: Mapping[str, Sequence[Sequence[Record]]], metric: str, path: str | Path) -> Path:
    """One metric over the rounds: for each aligner the mean of its seeds, and how far they differ.

    Up to FEW_SEEDS seeds are drawn one by one, more as a 95% band (Student's t), cut to what the metric can be.
    """
    figure, axes = _figure(1, 1, size=(8, 4.8))
    shown = ["mean"]
    for place, (aligner, seeds) in enumerate(runs.items()):
        curves = [{line["round"] + 1: line[metric] for line in records if line.get(metric) is not None} for records in seeds]
        rounds = np.array(sorted(set().union(*curves)))
        if not len(rounds):
            continue
        values = [[curve[round] for curve in curves if round in curve] for round in rounds.tolist()]
        color, marker = COLORS[place % len(COLORS)], MARKERS[place % len(MARKERS)]
        mean = [mean_interval(each)[0] for each in values]
        axes.plot(rounds, mean, color=color, marker=marker, markevery=_every(rounds), markersize=4, label=f"{aligner} ({len(seeds)})")
        if len(seeds) > FEW_SEEDS:
            shown += ["95% interval", *_band(axes, rounds, values, _possible(metric), color)]
        elif len(seeds) > 1:
            shown.append("each seed (thin)")
            for curve in curves:
                axes.plot(list(curve), list(curve.values()), color=color, linewidth=0.7, alpha=0.6)
    title = f"aligner (seeds): {', '.join(dict.fromkeys(shown))}"
    _finish(axes, "round", LABELS.get(metric, metric.replace("_", " ")), legend_title=title)
    return _save(figure, path)


def _possible(metric):
    """The least and the largest value that a metric can have."""
    if "accuracy" in metric:
        return 0.0, 1.0
    return (0.0 if "loss" in metric or "cv" in metric else -np.inf), np.inf


def _band(axes, rounds, values, possible, color):
    """Draws the 95% interval of each round's values within what is possible; says in words whether that cut it."""
    intervals = [mean_interval(each) for each in values]
    low, high = np.array([(mean - (half or 0), mean + (half or 0)) for mean, half in intervals]).T
    axes.fill_between(rounds, low.clip(*possible), high.clip(*possible), color=color, alpha=0.18, linewidth=0)
    return ["cut to what can be"] if (low < possible[0]).any() or (high > possible[1]).any() else []


def draw_run(records: Sequence[Record], folder: str | Path, fitness: Float[np.ndarray, "client expert"] | None = None) -> None:
    """The pictures of a run: learning.png, load.png, cost.png, and fitness.png where `fitness` is given."""
    learning_curves(records, Path(folder) / "learning.png")
    load_heatmap(records, Path(folder) / "load.png")
    cost_curves(records, Path(folder) / "cost.png")
    if fitness is not None:
        fitness_map(fitness, Path(folder) / "fitness.png")


def draw_comparison(runs: Mapping[str, Sequence[Sequence[Record]]], folder: str | Path) -> None:
    """The pictures of a comparison: compare-METRIC.png for the metrics that a reader asks for first."""
    for metric in COMPARED_CURVES:
        compare_curves(runs, metric, Path(folder) / f"compare-{metric}.png")


def _figure(rows, columns, *, size, **options):
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    height_ratios = options.pop("height_ratios", None)
    return figure, figure.subplots(rows, columns, gridspec_kw={"height_ratios": height_ratios} if height_ratios else None, **options)


def _lines(axes: Any, records: Sequence[Record], metrics: Sequence[str], *, x: Any = None, markers: bool = True) -> None:
    """One line a metric, through its values that are not null."""
    for metric in metrics:
        style = list(LABELS).index(metric) % len(COLORS)
        points = [
            (line["round"] + 1 if x is None else x[place], line[metric])
            for place, line in enumerate(records)
            if line.get(metric) is not None
        ]
        if points:
            across, up = np.array(points, float).T
            mark = MARKERS[style] if (markers and metric != "train_loss") or len(points) == 1 else None
            width = 0.7 if len(points) > _DENSE else 1.5
            axes.plot(
                across, up, color=COLORS[style], marker=mark, markersize=4, markevery=_every(across), linewidth=width, label=LABELS[metric]
            )
    if len(records) == 1 and x is None:
        axes.set_xlim(0.5, 1.5)


def _every(points):
    return max(1, len(points) // _MOST_MARKERS)


def _whole_numbers(axis):
    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _finish(axes, across, up, *, grid=True, integer=True, empty=None, legend_title=None, legend_above=False):
    """Labels, light grid and legend; says so where there is nothing to draw."""
    axes.set_xlabel(across or "")
    axes.set_ylabel(up or "")
    axes.spines[["top", "right"]].set_visible(False)
    if grid:
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
    if across == "round" and integer:
        _whole_numbers(axes.xaxis)
    if empty if empty is not None else not axes.has_data():
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color="#777777")
        axes.set_xticks([])
        axes.set_yticks([])
    elif axes.get_legend_handles_labels()[0]:
        place = {"loc": "lower right", "bbox_to_anchor": (1.0, 0.97), "ncols": 2} if legend_above else {"loc": "best"}
        axes.legend(frameon=False, fontsize=9, title=legend_title, title_fontsize=9, **place)


def _save(figure, path):
    """Writes the picture at once, so that a report never reads half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(buffer.getvalue())
    os.replace(temporary, path)
    return path
