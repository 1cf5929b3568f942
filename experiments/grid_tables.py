"""Tables of aligners compared: all cells in short, what factors change, and what each aligner reached and took on each cell."""

from experiments import outcome
from experiments.outcome import BASE, FITTEST, FREE, GLOBAL, OURS, PAPER, PLAIN, PRIOR
from fedmoe_jax.training.comparison import TARGET_SHARE, mean_interval

SERVED = (BASE, FITTEST, "load_only", PAPER, FREE, OURS)
FINAL = {
    "global": GLOBAL,
    "clients": PLAIN,
    "worst decile": "client_accuracy_p10",
    "clients, prior": PRIOR,
    "worst decile, prior": "client_accuracy_prior_p10",
}
LOADS = {"CV of tokens": "load_cv_total", "least trained": "load_least_total"}
NONE = "No cell has been run yet.\n"


def summary(cells):
    """A row for each cell without a factor."""
    base = [result for result in _checked(cells) if not outcome.factors(result)]
    if not base:
        return NONE
    head = ["cell", *SERVED, f"{OURS} less {BASE}", "the same, global", f"rounds, {OURS} / {BASE}", f"CV, {OURS} / {FREE}"]
    return (
        f"Accuracy of clients in percent, with label prior, as are the rounds to {100 * TARGET_SHARE:.0f}% of what `{BASE}` ends "
        f"with; `{OURS}` less `{BASE}` in points on the same seeds; CV of tokens per expert. The processes of these cells took "
        f"{outcome.minutes(base)} in all.\n\n{outcome.table(head, map(_summary_row, base))}"
    )


def factors(cells):
    """A row for each cell with and without each of its factors, plain serving first."""
    results = _checked(cells)
    changed = [result for result in results if outcome.factors(result)]
    if not changed:
        return NONE
    bases = {result["cell"].split("+")[0] for result in changed}
    rows = [_factors_row(result) for result in results if result["cell"].split("+")[0] in bases]
    less = [f"{OURS} less {BASE}", "the same, prior", "the same, global", f"{OURS} less {PAPER}, prior"]
    head = ["cell and factor", *SERVED, *less]
    return (
        f"Accuracy of clients in percent, plain / with label prior; differences in points on the same seeds. The processes of the cells "
        f"with a factor took {outcome.minutes(changed)} in all.\n\n{outcome.table(head, rows)}"
    )


def against_greedy(cells):
    """A row for each cell: what weighing the load costs clients beside greedy assignment on the same fitness, and what it evens out."""
    head = ["cell", "clients", "clients, prior", "worst decile", "worst decile, prior", f"CV, {FREE} / {OURS}"]
    head += [f"least trained, {name}" for name in (OURS, FREE)]
    rows = []
    for result in _checked(cells):
        runs = result["runs"]
        if {OURS, FREE} <= set(runs):
            less = [_less(runs, FREE, FINAL[metric]) for metric in head[1:5]]
            mine, theirs = (mean_interval([run["load_cv_total"][-1] for run in runs[name]])[0] for name in (OURS, FREE))
            least = [outcome.number(runs[name], "load_least_total") for name in (OURS, FREE)]
            rows.append([_named(result), *less, f"{theirs / mine:.1f}", *least])
    return f"`{OURS}` less `{FREE}`, in points on the same seeds.\n\n{outcome.table(head, rows)}" if rows else NONE


def repeats(cells, again):
    """A row for each aligner and cell that was run a second time."""
    head = ["cell", "aligner", "clients", "again", "clients, prior", "again", "global", "again"]
    rows = [
        [_named(result), name, *(outcome.accuracy(each, metric) for metric in (PLAIN, PRIOR, GLOBAL) for each in (first, seeds))]
        for cell, result in again.items()
        for name, seeds in result["runs"].items()
        for first in [cells[cell]["runs"][name]]
    ]
    return outcome.table(head, rows) if rows else NONE


def details(cells):
    """Heading and tables of each cell; one with a factor goes without that of what the targets took."""
    return "\n".join(map(_cell, _checked(cells))) or NONE


def _checked(cells):
    for name, result in cells.items():
        if BASE not in result["runs"] or len({len(seeds) for seeds in result["runs"].values()}) > 1:
            raise ValueError(f"{name}: {BASE} is needed, and as many seeds of each aligner")
    return outcome.ordered(cells.values())


def _less(runs, others, metric):
    """Points by which ours is above others, – where either was not run."""
    return outcome.gain(runs[OURS], runs[others], metric) if {OURS, others} <= set(runs) else "–"


def _named(result):
    return ", ".join([outcome.title(result["config"]), *(f"`{name}`" for name in outcome.factors(result))])


def _summary_row(result):
    runs = outcome.served_fittest(result["runs"])
    goal = outcome.goals(runs)[PRIOR]
    reached = [outcome.accuracy(runs[name], PRIOR) if name in runs else "–" for name in SERVED]
    less = [_less(runs, BASE, metric) for metric in (PRIOR, GLOBAL)]
    rounds = [outcome.costs(runs[name], PRIOR, goal)[0] if name in runs else "–" for name in (OURS, BASE)]
    spread = [outcome.number(runs[name], "load_cv_total", interval=False) if name in runs else "–" for name in (OURS, FREE)]
    return [outcome.title(result["config"]), *reached, *less, " / ".join(rounds), " / ".join(spread)]


def _factors_row(result):
    runs, names = outcome.served_fittest(result["runs"]), outcome.factors(result)
    both = [
        " / ".join(outcome.accuracy(runs[name], metric, interval=False) for metric in (PLAIN, PRIOR)) if name in runs else "–"
        for name in SERVED
    ]
    pairs = ((BASE, PLAIN), (BASE, PRIOR), (BASE, GLOBAL), (PAPER, PRIOR))
    less = [_less(runs, name, metric) for name, metric in pairs]
    first = ", ".join(f"`{name}`" for name in names) if names else f"**{outcome.title(result['config'])}**"
    return [first, *both, *less]


def _cell(result):
    rows, names = outcome.served_fittest(result["runs"]), outcome.factors(result)
    heading = f"### With {', '.join(f'`{name}`' for name in names)} (`{result['cell']}`)"
    if not names:
        heading = f"## {outcome.title(result['config'])} (`{result['cell']}`)"
    parts = [heading, _about(result), _reached(rows), *([] if names else [_taken(rows)]), *([_against(rows)] if OURS in rows else [])]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _about(result):
    config, runs = result["config"], result["runs"]
    plain, prior = (100 * goal for goal in outcome.goals(runs).values())
    return (
        f"{len(runs[BASE])} seeds of weights and cohorts on one split, {config['rounds']} rounds, evaluated every {config['eval_every']}; "
        f"{config['population'] or 'all'} clients, cohort {config['cohort']}, {config['experts']} experts of which a client holds "
        f"{config['slots']} (`full`: all {config['experts']}). Targets {plain:.1f}%, and {prior:.1f}% with label prior. "
        f"{outcome.minutes([result])} of processes on {result['device']} each, JAX {result['versions']['jax']}."
    )


def _reached(rows):
    head = ["reached in the last round", *FINAL, *LOADS]
    body = [
        [
            name,
            *(outcome.accuracy(seeds, metric) for metric in FINAL.values()),
            *(outcome.number(seeds, metric) for metric in LOADS.values()),
        ]
        for name, seeds in rows.items()
    ]
    return outcome.table(head, body)


def _taken(rows):
    head, goals = ["taken to the target", *outcome.COSTS, *(f"{name}, prior" for name in outcome.COSTS)], outcome.goals(rows)
    return outcome.table(
        head, [[name, *(text for each in goals.items() for text in outcome.costs(seeds, *each))] for name, seeds in rows.items()]
    )


def _against(rows):
    head, goals = [f"{OURS} less", *FINAL, "rounds", "MB", "rounds, prior"], outcome.goals(rows)
    shares = (("round", PLAIN), ("bytes", PLAIN), ("round", PRIOR))
    body = [
        [
            name,
            *(_less(rows, name, metric) for metric in FINAL.values()),
            *(outcome.share(rows[OURS], seeds, cost, metric, goals[metric]) for cost, metric in shares),
        ]
        for name, seeds in rows.items()
        if name != OURS
    ]
    return outcome.table(head, body)
