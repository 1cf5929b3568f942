"""Writes the tables of experiments/README.md again from the raw results beside it: python -m experiments.tables

Between the two marks there is, for each cell of experiments/alignment that has results, what each aligner reached and how far
`balanced` is from the others on the same seeds, with 95% intervals by Student's t.
"""

import json
from pathlib import Path

import numpy as np

from fedmoe_jax.training.comparison import mean_interval

HERE = Path(__file__).parent
BEGIN, END = "<!-- tables -->\n", "<!-- end of tables -->\n"
OURS, BASE, TARGET_SHARE = "balanced", "random", 0.99
FINAL = {
    "global": "eval_accuracy",
    "clients": "client_accuracy_mean",
    "clients with label prior": "client_accuracy_prior_mean",
    "worst decile": "client_accuracy_p10",
}


def render(results):
    """The tables of all results, in Markdown."""
    cells = [_cell(result) for result in sorted(results, key=lambda result: result["cell"])]
    return "\n".join(cells) or "No cell has been run yet.\n"


def _cell(result):
    config, runs = result["config"], result["runs"]
    goal = TARGET_SHARE * np.mean([run["client_accuracy_mean"][-1] for run in runs[BASE]])
    number = {len(seeds) for seeds in runs.values()}.pop()
    head = ["aligner", *FINAL, "CV of tokens", "rounds to target", "MB to target"]
    rows = [[name, *_finals(seeds), *_to_target(seeds, goal, config["rounds"])] for name, seeds in runs.items()]
    versus = [f"{OURS} less", *(f"{name}, points" for name in FINAL), "rounds to target", "bytes to target"]
    against = [[name, *_gains(runs[OURS], seeds, goal)] for name, seeds in runs.items() if name != OURS]
    about = (
        f"{number} seeds of weights and cohorts on one split, {config['rounds']} rounds, evaluated every {config['eval_every']}; "
        f"{config['population'] or 'all'} clients, cohort {config['cohort']}, {config['experts']} experts of which a client holds "
        f"{config['slots']} (`full`: all); target {100 * goal:.1f}%, {100 * TARGET_SHARE:.0f}% of what clients of `{BASE}` end with. "
        f"{result['device']}, JAX {result['versions']['jax']}, {result['seconds'] / 60:.0f} min."
    )
    return f"### {result['cell']}\n\n{about}\n\n{_table(head, rows)}\n{_table(versus, against)}"


def _finals(seeds):
    cells = [_percent([100 * run[metric][-1] for run in seeds]) for metric in FINAL.values()]
    mean, half = mean_interval([run["load_cv_total"][-1] for run in seeds])
    return [*cells, f"{mean:.3f}" + (f" ± {half:.3f}" if half is not None else "")]


def _to_target(seeds, goal, rounds):
    reached = [place for run in seeds if (place := _first(run, goal)) is not None]
    if not reached:
        return [f"not in {rounds}", "–"]
    some = "" if len(reached) == len(seeds) else f" ({len(reached)} of {len(seeds)} seeds)"
    found = [(run["round"][place], run["bytes"][place] / 1e6) for run in seeds if (place := _first(run, goal)) is not None]
    return [f"{np.mean(column):.0f}{some}" for column in zip(*found, strict=True)]


def _gains(ours, others, goal):
    points = [
        _percent([100 * (a[metric][-1] - b[metric][-1]) for a, b in zip(ours, others, strict=True)], sign="+") for metric in FINAL.values()
    ]
    pairs = [(a, b, _first(a, goal), _first(b, goal)) for a, b in zip(ours, others, strict=True)]
    if any(place is None for *_, mine, theirs in pairs for place in (mine, theirs)):
        return [*points, "–", "–"]
    shares = [
        _percent([100 * (a[name][mine] / b[name][theirs] - 1) for a, b, mine, theirs in pairs], sign="+", unit="%")
        for name in ("round", "bytes")
    ]
    return [*points, *shares]


def _first(run, goal):
    """The place of the first evaluation at or above the target."""
    return next((place for place, value in enumerate(run["client_accuracy_mean"]) if value >= goal), None)


def _percent(values, sign="", unit=""):
    mean, half = mean_interval(values)
    return f"{mean:{sign}.1f}{unit}" + (f" ± {half:.1f}" if half is not None else "")


def _table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def results(folder=HERE / "results" / "alignment"):
    """What has been run."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def main():
    path = HERE / "README.md"
    before, _, rest = path.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}{render(results())}{END}{after}")


if __name__ == "__main__":
    main()
