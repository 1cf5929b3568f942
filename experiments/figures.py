"""The figure of experiments/README.md: accuracy of clients against rounds, small panels side by side."""

import math

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fedmoe_jax.training import metrics
from fedmoe_jax.training.comparison import mean_interval
from fedmoe_jax.training.plots import COLORS, MARKERS

COLUMNS = 4
SERVING = {"client_accuracy_mean": "", "client_accuracy_prior_mean": ", with label prior"}
MATTERS = 0.01  # what a label prior has to change of the target for a panel of its own
LATER = 0.2  # the share of the rounds after which all is shown; the steep start may lie below the panel


def curves(panels, path):
    """Draws mean and 95% interval over seeds of each aligner, one panel a cell, and one more where the label prior matters.

    Args:
      panels: title, runs (aligner -> seeds) and targets (metric -> accuracy) of each cell.
      path: the PNG file.
    """
    drawn = [
        (name + words, runs, metric, goals[metric])
        for name, runs, goals in panels
        for metric, words in SERVING.items()
        if not words or max(goals.values()) - min(goals.values()) > MATTERS
    ]
    rows = math.ceil((len(drawn) + 1) / COLUMNS)
    figure = Figure(figsize=(4 * COLUMNS, 3.3 * rows), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    places = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    styles = list(dict.fromkeys(aligner for _, runs, _ in panels for aligner in runs))
    for axes, each in zip(places, drawn, strict=False):
        _panel(axes, styles, *each)
    for axes in places[len(drawn) :]:
        axes.set_axis_off()
    about = "mean and 95% interval of seeds,\nfrom a fifth of the rounds on"
    lines = places[0].get_legend_handles_labels()
    places[len(drawn)].legend(*lines, loc="center left", frameon=False, fontsize=11, title=about)
    for row in range(rows):
        places[row * COLUMNS].set_ylabel("accuracy of clients (%)")
    metrics.write_bytes(path, lambda file: figure.savefig(file, format="png"))


def _panel(axes, styles, name, runs, metric, goal):
    """One cell; an aligner looks the same in all panels, also where others are missing."""
    later = [100 * np.array(run[metric])[np.array(run["round"]) >= LATER * run["round"][-1]] for seeds in runs.values() for run in seeds]
    low, high = np.min(later), np.max(later)
    axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    for aligner, seeds in runs.items():
        place = styles.index(aligner)
        values = 100 * np.array([run[metric] for run in seeds])
        mean, half = np.array([[number or 0 for number in mean_interval(column)] for column in values.T.tolist()]).T
        rounds, style = seeds[0]["round"], place % len(COLORS)
        axes.fill_between(rounds, mean - half, mean + half, color=COLORS[style], alpha=0.18, linewidth=0)
        axes.plot(rounds, mean, color=COLORS[style], marker=MARKERS[style], markevery=(place % 4, 4), markersize=4, label=aligner)
    axes.axhline(100 * goal, color="#777777", linewidth=0.8, linestyle=":", label="target: 99% of random's end")
    axes.set_title(name.replace(", ", "\n", 1), fontsize=11)
    axes.set_xlabel("round")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
