"""The tables and the figure of experiments.communication: accuracy against bytes and simulated seconds."""

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments import outcome
from experiments.outcome import GLOBAL, PLAIN, PRIOR
from fedmoe_jax.training import metrics
from fedmoe_jax.training.comparison import TARGET_SHARE
from fedmoe_jax.training.plots import COLORS, MARKERS

LINKS, FULL = "links", "full"
NONE = "Nothing has been run yet.\n"
LINES = ("-", "--", ":", "-.")


def savings(results):
    """A table for each cell: what each aligner reached, plain and compressed, and what travelled, against `full` without compression."""
    parts = [_savings(cell, variants) for cell, variants in variants_of(results).items()]
    if not parts:
        return NONE
    return f"The processes of these {len(results)} files took {outcome.minutes(results.values())} in all.\n\n" + "\n".join(parts)


def variants_of(results):
    """What each cell is that has `full` without compression, the seeds of its variants, (aligner, compression), and where they ran."""
    found = {}
    for name, result in results.items():
        cell, *changes = name.split("+")
        if LINKS not in changes:
            raise ValueError(f"{name}: only cells with `{LINKS}` can be compared")
        compression = "+".join(change for change in changes if change != LINKS)
        _, runs, devices = found.setdefault(cell, (result["config"], {}, {}))
        for aligner, seeds in result["runs"].items():
            runs[aligner, compression] = seeds
            devices[aligner, compression] = result["made"][aligner]["device"]
    return {cell: each for cell, each in found.items() if (FULL, "") in each[1]}


def _savings(cell, variants):
    config, runs, devices = variants
    for (aligner, compression), seeds in [*runs.items()]:
        for name, served in outcome.served_fittest({aligner: seeds}).items():
            runs |= {(name, compression): served}
            devices |= {(name, compression): devices[aligner, compression]}
    full = runs[FULL, ""]
    goal = TARGET_SHARE * np.mean([run[PRIOR][-1] for run in full])
    head = [outcome.title(config), "clients", "clients, prior", f"less `{FULL}`, prior", "global", "MB", f"`{FULL}` / this", "simulated s"]
    head += [f"rounds to {100 * goal:.1f}%, prior", "MB to it", "on"]
    megabytes = np.mean(outcome.total(full, "bytes")) / 1e6
    body = []
    for (aligner, compression), seeds in sorted(runs.items(), key=lambda item: -np.mean(outcome.total(item[1], "bytes"))):
        own = np.mean(outcome.total(seeds, "bytes")) / 1e6
        rounds, until, _ = outcome.costs(seeds, PRIOR, goal)
        body.append(
            [
                label(aligner, compression),
                *(outcome.accuracy(seeds, metric) for metric in (PLAIN, PRIOR)),
                "" if seeds is full else outcome.gain(seeds, full, PRIOR),
                outcome.accuracy(seeds, GLOBAL),
                f"{own:.0f}",
                f"{megabytes / own:.1f}",
                f"{np.mean(outcome.total(seeds, 'simulated_seconds')):.0f}",
                rounds,
                until,
                devices[aligner, compression].removeprefix("1 x ").removeprefix("NVIDIA "),
            ]
        )
    return outcome.table(head, body)


def label(aligner, compression):
    """A variant in words."""
    return f"`{aligner}`" + (f", `{compression}`" if compression else "")


def curves(results, path):
    """Draws the accuracy of clients, with label prior, against bytes so far, a panel for each cell."""
    cells = variants_of(results)
    figure = Figure(figsize=(6.4 * max(len(cells), 1), 4.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    aligners, links = (list(dict.fromkeys(key[place] for _, runs, _ in cells.values() for key in runs)) for place in (0, 1))
    for axes, (config, runs, _) in zip(figure.subplots(1, len(cells), squeeze=False)[0], cells.values(), strict=True):
        for (aligner, compression), seeds in sorted(runs.items(), key=lambda item: (aligners.index(item[0][0]), links.index(item[0][1]))):
            place = links.index(compression)
            megabytes = np.mean([run["bytes"] for run in seeds], axis=0) / 1e6
            accuracy = 100 * np.mean([run[PRIOR] for run in seeds], axis=0)
            style = dict(color=COLORS[aligners.index(aligner)], marker=MARKERS[place % len(MARKERS)], linestyle=LINES[place % len(LINES)])
            axes.plot(megabytes, accuracy, label=label(aligner, compression).replace("`", ""), markersize=4, **style)
        axes.set_xscale("log")
        axes.set_title(outcome.title(config))
        axes.set_xlabel("MB down and up, all clients")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.legend(frameon=False, fontsize=9, loc="lower right")
        axes.set_ylabel("accuracy of clients, with label prior (%)")
    metrics.write_bytes(path, lambda file: figure.savefig(file, format="png"))
