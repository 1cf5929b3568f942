"""Tables of ablations: what makes the global model good, one thing changed at a time, and the fallback where experts hardly differ."""

import numpy as np

from experiments import outcome
from experiments.ablations import __main__ as plan
from experiments.outcome import BASE, GLOBAL, OURS, PAPER, PLAIN, PRIOR

UNCHANGED = "unchanged"
PROBES = "+three_probes"
FULL = "full"
RIVALS = (BASE, "load_only", PAPER)
MODELS = {
    f"{BASE}, global": (BASE, GLOBAL),
    f"{OURS}, global": (OURS, GLOBAL),
    f"{OURS}, clients": (OURS, PLAIN),
    f"{BASE}, clients, prior": (BASE, PRIOR),
    f"{OURS}, clients, prior": (OURS, PRIOR),
}
NONE = "Nothing has been run yet.\n"


def costs(changed):
    """What the runs took."""
    return f"The processes of these {len(changed)} files took {outcome.minutes(changed.values())} in all.\n" if changed else NONE


def best_models(cells, changed):
    """A row for each cell: global accuracy like for like, and that of the best variants."""
    head = ["cell", BASE, OURS, "difference", f"{BASE}, `statistics`", f"{OURS}, `statistics`", "difference"]
    head += [f"best of {BASE}", f"best of {OURS}", "difference"]
    rows = []
    for cell, variants in _variants(cells, changed).items():
        ours, others = (_best(variants, name, GLOBAL) for name in (OURS, BASE))
        best = [f"{outcome.accuracy(variants[name][who], GLOBAL)} ({_code(name)})" for name, who in ((others, BASE), (ours, OURS))]
        like = [text for name in (UNCHANGED, "statistics") for text in _like(variants.get(name))]
        rows.append([_kind(cells[cell]), *like, *best, outcome.gain(variants[ours][OURS], variants[others][BASE], GLOBAL)])
    return outcome.table(head, rows) if rows else NONE


def global_models(cells, changed):
    """A table for each cell with a row for each variant, the best of each column in bold, and how far the best of `balanced` is ahead."""
    parts = []
    for cell, variants in _variants(cells, changed).items():
        less = {f"{OURS} less {BASE}, global": GLOBAL, "the same, clients, prior": PRIOR}
        more = [f"{name} less unchanged, global" for name in (BASE, OURS)]
        head = [outcome.title(cells[cell]["config"]), *MODELS, *less, *more, f"MB a round, {OURS}"]
        best = {column: _best(variants, *which) for column, which in MODELS.items()}
        rows = [
            [
                _code(name),
                *(_bold(outcome.accuracy(runs[who], metric), best[column] == name) for column, (who, metric) in MODELS.items()),
                *(outcome.gain(runs[OURS], runs[BASE], metric) for metric in less.values()),
                *("" if name == UNCHANGED else outcome.gain(runs[who], variants[UNCHANGED][who], GLOBAL) for who in (BASE, OURS)),
                f"{np.mean([run['bytes'][-1] / run['round'][-1] for run in runs[OURS]]) / 1e6:.1f}",
            ]
            for name, runs in variants.items()
        ]
        ahead = [outcome.gain(*(variants[_best(variants, who, metric)][who] for who in (OURS, BASE)), metric) for metric in less.values()]
        rows.append([f"best of {OURS} less best of {BASE}", *[""] * len(MODELS), *ahead, "", "", ""])
        parts.append(outcome.table(head, rows))
    return "\n".join(parts) or NONE


def one_thing(cells, changed):
    """Two tables for each cell: what changes the alignment alone, and what changes `random` as well."""
    parts = []
    for cell in plan.CHOSEN:
        if cell not in cells:
            continue
        base = cells[cell]["runs"]
        found = {name: result["runs"] for name in (*plan.ALONE, *plan.BOTH) if (result := changed.get(f"{cell}+{name}"))}
        others = {name: {OURS: seeds} for name, seeds in changed.get(cell, {"runs": {}})["runs"].items()}
        alone = {name: runs for name, runs in found.items() if name in plan.ALONE} | others
        both = {name: runs for name, runs in found.items() if name in plan.BOTH}
        title = outcome.title(cells[cell]["config"])
        for what, rows in ((f"{title}: alignment", alone), (f"{title}: all", both)):
            if rows:
                parts.append(_one_thing(what, base, {UNCHANGED: base} | rows, compared=rows is both))
    return "\n".join(parts) or NONE


def faster(cells, changed):
    """A row for each cell and each way to learn fitness sooner: what the target of plain serving took, and how much less that is."""
    head = ["cell and change", "rounds", "MB", *(f"{cost} less {name}" for cost in ("rounds", "MB") for name in RIVALS)]
    head += ["clients", "clients, prior", "CV of tokens", "least trained"]
    rows = []
    for cell, result in cells.items():
        found = {name: changed[f"{cell}+{name}"]["runs"] for name in plan.FASTER if f"{cell}+{name}" in changed}
        if not found:
            continue
        base = result["runs"]
        goal = outcome.goals(base)[PLAIN]
        rows.append(
            [f"**{outcome.title(result['config'])}**, {BASE}", *outcome.costs(base[BASE], PLAIN, goal)[:2], *[""] * 6, *_ends(base[BASE])]
        )
        for name, runs in ({UNCHANGED: base} | found).items():
            ours = _paired(f"{cell}+{name}", runs, base[OURS])[OURS]
            shares = [outcome.share(ours, base[rival], cost, PLAIN, goal) for cost in ("round", "bytes") for rival in RIVALS]
            rows.append([_code(name), *outcome.costs(ours, PLAIN, goal)[:2], *shares, *_ends(ours)])
    return outcome.table(head, rows) if rows else NONE


def longer(cells, changed):
    """The global model after twice the rounds, and the clients' accuracy with label prior."""
    rows = []
    for cell in plan.SHIFTED:
        names = [f"{cell}+{plan.TOGETHER}{probes}+{plan.LONGER}" for probes in ("", "+three_probes")]
        if not {names[0]} <= set(changed):
            continue
        base = changed[names[0]]["runs"][BASE]
        for name in filter(changed.get, names):
            ours = _paired(name, changed[name]["runs"], base)[OURS]
            each = [
                [*(outcome.accuracy(seeds, metric) for seeds in (base, ours)), outcome.gain(ours, base, metric)]
                for metric in (GLOBAL, PRIOR)
            ]
            rows.append([f"{_kind(cells[cell])}, {_code(name.partition('+')[2])}", *each[0], *each[1]])
    head = ["cell", BASE, OURS, "difference", f"{BASE}, clients, prior", f"{OURS}, clients, prior", "difference"]
    return outcome.table(head, rows) if rows else NONE


def wide(changed):
    """A row for each long run of a wide network: `balanced`, `full` and what FLEX-MoE reports."""
    head = ["cell", "rounds", "FLEX-MoE", OURS, FULL, "difference", *(f"{name}, clients, prior" for name in (OURS, FULL)), "difference"]
    head += [f"MB, {OURS}", f"MB, {FULL}"]
    rows = []
    for name, reported in plan.WIDE.items():
        if name not in changed:
            continue
        runs = _paired(name, changed[name]["runs"], changed[name]["runs"][OURS], FULL)
        both = [runs[OURS], runs[FULL]]
        reached = [
            text
            for metric in (GLOBAL, PRIOR)
            for text in (*(outcome.accuracy(seeds, metric) for seeds in both), outcome.gain(*both, metric))
        ]
        sent = [f"{np.mean([run['bytes'][-1] for run in seeds]) / 1e6:.0f}" for seeds in both]
        rows.append([_kind(changed[name]), str(changed[name]["config"]["rounds"]), f"{reported:.1f}", *reached, *sent])
    return outcome.table(head, rows) if rows else NONE


def fallback(cells, changed):
    """A row for each cell: `balanced`, the same with the fallback, and `random`."""
    words = [OURS, "with fallback", BASE, f"fallback less {OURS}", f"fallback less {BASE}"]
    head = ["cell", *words, *(f"{name}, prior" for name in words)]
    rows = []
    for cell, result in cells.items():
        if f"{cell}+fallback" not in changed:
            continue
        ours, other = (result["runs"][name] for name in (OURS, BASE))
        fallen = _paired(f"{cell}+fallback", changed[f"{cell}+fallback"]["runs"], ours)[OURS]
        each = [
            [
                *(outcome.accuracy(seeds, metric) for seeds in (ours, fallen, other)),
                *(outcome.gain(fallen, seeds, metric) for seeds in (ours, other)),
            ]
            for metric in (PLAIN, PRIOR)
        ]
        rows.append([_kind(result), *each[0], *each[1]])
    return outcome.table(head, rows) if rows else NONE


def _one_thing(what, base, rows, *, compared):
    """Against the unchanged `balanced`, costs being those to the targets of the unchanged `random`."""
    head = [what, "global", "clients", "less unchanged", "clients, prior", "less unchanged, prior", "CV of tokens", "least trained"]
    head += ["rounds", "MB", "rounds, prior", *([f"{BASE}, clients, prior", f"{OURS} less {BASE}, prior"] if compared else [])]
    goals, body = outcome.goals(base), []
    for name, runs in rows.items():
        ours = _paired(name, runs, base[OURS])[OURS]
        (rounds, megabytes, _), (prior, *_) = (outcome.costs(ours, *each) for each in goals.items())
        body.append(
            [
                _code(name),
                outcome.accuracy(ours, GLOBAL),
                *(
                    text
                    for metric in (PLAIN, PRIOR)
                    for text in (outcome.accuracy(ours, metric), "" if runs is base else outcome.gain(ours, base[OURS], metric))
                ),
                *(outcome.number(ours, metric) for metric in ("load_cv_total", "load_least_total")),
                *(rounds, megabytes, prior),
                *([outcome.accuracy(runs[BASE], PRIOR), outcome.gain(ours, runs[BASE], PRIOR)] if compared else []),
            ]
        )
    return outcome.table(head, body)


def _variants(cells, changed):
    """The runs of each variant of each cell that has some, unchanged first."""
    found = {}
    for cell in (*plan.DIFFERENT, "shakespeare"):
        planned = (*plan.GLOBAL, plan.ON_SKEW, *plan.PROBED, f"{plan.ON_SKEW}{PROBES}")
        names = [name for name in planned if f"{cell}+{name}" in changed]
        if cell in cells and names:
            rows = found[cell] = {UNCHANGED: cells[cell]["runs"]}
            for name in names:
                runs = changed[f"{cell}+{name}"]["runs"]
                if name.endswith(PROBES):
                    runs = {BASE: rows[name.removesuffix(PROBES)][BASE]} | runs
                rows[name] = _paired(f"{cell}+{name}", runs, rows[UNCHANGED][OURS], BASE)
    return found


def _ends(seeds):
    loads = [outcome.number(seeds, metric) for metric in ("load_cv_total", "load_least_total")]
    return [*(outcome.accuracy(seeds, metric) for metric in (PLAIN, PRIOR)), *loads]


def _paired(name, runs, base, *needed):
    if not {OURS, *needed} <= set(runs) or {len(seeds) for seeds in runs.values()} != {len(base)}:
        raise ValueError(f"{name}: {' and '.join((OURS, *needed))} needed, and as many seeds as without the change")
    return runs


def _best(variants, aligner, metric):
    return max(variants, key=lambda name: np.mean(outcome.last(variants[name][aligner], metric)))


def _like(runs):
    if runs is None:
        return ["–"] * 3
    return [*(outcome.accuracy(runs[name], GLOBAL) for name in (BASE, OURS)), outcome.gain(runs[OURS], runs[BASE], GLOBAL)]


def _kind(result):
    return outcome.title(result["config"]).partition(", ")[2]


def _code(name):
    return name if " " in name or name == UNCHANGED else " + ".join(f"`{part}`" for part in name.split("+"))


def _bold(text, marked):
    return f"**{text}**" if marked else text
