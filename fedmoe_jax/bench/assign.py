"""How good and how fast is `assign.balanced`? Against OR-tools' exact min-cost flow, over families of problems."""

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedmoe_jax.alignment import assign

SLOTS = 4
"""Experts that a client holds, at most, in every family."""


class Case(NamedTuple):
    """One assignment problem."""

    name: str
    fitness: np.ndarray
    slots: np.ndarray
    lower: np.ndarray
    upper: np.ndarray


def fitness(family: str, clients: int, experts: int, generator: np.random.Generator) -> np.ndarray:
    """Fitness float32 [client, expert] of a family, that is, of one of `FAMILIES`."""
    uniform = generator.random((clients, experts))
    groups = generator.random((8, experts))[generator.integers(0, 8, clients)]
    values: dict[str, Callable[[], np.ndarray]] = {
        "uniform": lambda: uniform,
        "popular": lambda: uniform + 0.5 * generator.random(experts),
        "very popular": lambda: uniform + 2.0 * generator.random(experts),
        "groups": lambda: groups + 0.1 * uniform,
        "near ties": lambda: np.round(4 * uniform) / 4 + 1e-6 * generator.random((clients, experts)),
        "rank one": lambda: generator.random((clients, 1)) * generator.random(experts),
        "all equal": lambda: np.ones((clients, experts)),
        "forbidden": lambda: np.where(generator.random((clients, experts)) < 0.2, -np.inf, uniform),
        "mostly unknown": lambda: np.where(generator.random((clients, experts)) < 0.1, 0.6 * uniform, 1.0),
    }
    return values[family]().astype(np.float32)


FAMILIES = ("uniform", "popular", "very popular", "groups", "near ties", "rank one", "all equal", "forbidden", "mostly unknown")
BOUNDS = {"mean +-10%": (0.9, 1.1), "lower = upper": (1.0, 1.0), "no lower": (0.0, 1.1)}


def cases(clients: int, experts: int, seed: int = 0) -> Iterator[Case]:
    """Every family under every kind of bounds, mixed slots, and more experts than slots."""
    generator = np.random.default_rng(seed)
    most = min(SLOTS, experts)
    for family in FAMILIES:
        values = fitness(family, clients, experts, generator)
        for name, factors in BOUNDS.items():
            yield _case(f"{family}, {name}", values, np.full(clients, most), factors)
    values = fitness("popular", clients, experts, generator)
    yield _case("mixed slots, mean +-10%", values, generator.integers(0, most + 1, clients), BOUNDS["mean +-10%"])
    few = np.arange(clients) < max(experts // (2 * most), 1)
    yield _case("fewer slots than experts, mean +-10%", values, np.where(few, most, 0), BOUNDS["mean +-10%"])


def _case(name, values, slots, factors):
    mean = slots.sum() / values.shape[1]
    lower, upper = np.floor(factors[0] * mean + 1e-9), np.ceil(factors[1] * mean - 1e-9)
    columns = np.ones(values.shape[1], np.int32)
    return Case(name, values, slots.astype(np.int32), int(lower) * columns, int(upper) * columns)


def exact(case: Case) -> np.ndarray:
    """The best mask [client, expert] by OR-tools; a client outside the bounds costs more than all fitness can gain.

    Raises:
      ValueError: if OR-tools is not installed.
    """
    min_cost_flow = _reference()
    clients, experts = case.fitness.shape
    client, expert = np.nonzero(np.isfinite(case.fitness))
    values = case.fitness[client, expert].astype(np.float64)
    rows = np.minimum(case.slots, np.bincount(client, minlength=clients))
    scale = 1e8 / max(np.ptp(values), 1e-9) if len(values) else 1.0
    fine = int(2e8 * (experts + 2))
    columns, source, sink = clients + np.arange(experts), clients + experts, clients + experts + 1
    flow = min_cost_flow()
    costs = np.round(scale * (values.max(initial=0.0) - values)).astype(np.int64)
    pairs = flow.add_arcs_with_capacity_and_unit_cost(client, clients + expert, np.ones_like(client), costs)
    flow.add_arcs_with_capacity_and_unit_cost(np.full(clients, source), np.arange(clients), rows, np.zeros(clients, int))
    for room, cost in [(case.lower, -fine), (case.upper - case.lower, 0), (np.full(experts, clients), fine)]:
        flow.add_arcs_with_capacity_and_unit_cost(columns, np.full(experts, sink), room, np.full(experts, cost))
    flow.set_node_supply(source, int(rows.sum()))
    flow.set_node_supply(sink, -int(rows.sum()))
    if flow.solve() != flow.OPTIMAL:
        raise RuntimeError(f"OR-tools found no optimum for {case.name}")
    mask = np.zeros(case.fitness.shape, bool)
    mask[client, expert] = flow.flows(pairs) > 0
    return mask


def _reference() -> Callable[[], Any]:
    try:
        from ortools.graph.python.min_cost_flow import SimpleMinCostFlow
    except ImportError:
        what = "bench assign compares with OR-tools, which is not installed"
        raise ValueError(f"{what}: pip install '.[bench]' in a checkout, or leave it out by --no-reference") from None
    return SimpleMinCostFlow


def violation(mask: np.ndarray, case: Case) -> int:
    """Clients above upper plus clients below lower, over all experts."""
    load = mask.sum(axis=0)
    return int(np.abs(load - np.clip(load, case.lower, case.upper)).sum())


def value(mask: np.ndarray, case: Case) -> float:
    """Total fitness of the pairs of a mask."""
    return float(case.fitness.astype(np.float64)[mask].sum())


def run(*, clients: int, experts: int, repeats: int = 5, seed: int = 0, reference: bool = True) -> Iterator[dict[str, Any]]:
    """Measures every case, ours warm (median of `repeats`), OR-tools once, building included.

    Args:
      clients, experts, repeats: at least 1 each.
      seed: of the problems.
      reference: solve with OR-tools, too.

    Yields:
      For each case its `seconds` (ratio: OR-tools' over ours), the `gap` to the optimum that OR-tools found and the
      `proven gap` by the dual bound, both relative to the total fitness, the `violation`, and the seconds from the last
      prices, of the same problem and, as in rounds with other cohorts, of half of its clients from the prices of the other half;
      first the seconds of tracing and of compilation, last the geometric mean and the least of the ratios.

    Raises:
      ValueError: naming the argument that cannot be, or if OR-tools is missing.
    """
    for name, number in (("clients", clients), ("experts", experts), ("repeats", repeats)):
        if number < 1:
            raise ValueError(f"{name} is {number}, it must be at least 1")
    if reference:
        _reference()  # so that it is missed before anything is measured
    solve = jax.jit(functools.partial(assign.balanced, return_info=True))
    ratios = []
    for number, case in enumerate(cases(clients, experts, seed)):
        arrays = tuple(map(jnp.asarray, case[1:]))
        key = jax.random.key(seed)
        if number == 0:
            tracing, lowered = _timed(functools.partial(solve.lower, *arrays, key=key))
            compilation, compiled = _timed(lowered.compile)
            yield _figure("tracing and lowering", clients, experts, "seconds", tracing, "s")
            yield _figure("compilation", clients, experts, "seconds", compilation, "s")
        mask, info = compiled(*arrays, key=key)
        ours = _median(functools.partial(compiled, *arrays, key=key), repeats)
        again = _median(functools.partial(solve, *arrays, key=key, prices=info.prices), repeats)
        figure = functools.partial(_figure, case.name, clients, experts)
        yield figure("proven gap", float(info.gap), "share of total fitness", "dual bound")
        yield figure("violation", int(info.violation), "clients")
        yield figure("seconds from the last prices", again, "s", f"a cold start, {ours:.4f} s", ours / again)
        if clients > 1:
            cold, warm = _other_cohort(solve, case, key, repeats)
            yield figure("seconds of half the clients from the others' prices", warm, "s", f"a cold start, {cold:.4f} s", cold / warm)
        if not reference:
            yield figure("seconds", ours, "s")
            continue
        start = time.perf_counter()
        best = exact(case)
        theirs = time.perf_counter() - start
        mask = np.asarray(mask)
        if violation(mask, case) != violation(best, case):
            raise RuntimeError(f"{case.name}: violation {violation(mask, case)}, OR-tools {violation(best, case)}")
        loss = (value(best, case) - value(mask, case)) / max(float(np.abs(case.fitness[mask]).sum()), 1e-9)
        ratios.append(theirs / ours)
        yield figure("gap", loss, "share of total fitness", "OR-tools min-cost flow")
        yield figure("seconds", ours, "s", f"OR-tools min-cost flow, {theirs:.4f} s", theirs / ours)
    if not reference:
        return
    mean = math.exp(statistics.fmean(map(math.log, ratios)))
    yield _figure("geometric mean", clients, experts, "speedup", mean, "times", "OR-tools min-cost flow", mean)
    yield _figure("least", clients, experts, "speedup", min(ratios), "times", "OR-tools min-cost flow", min(ratios))


def table(figures: Iterable[dict[str, Any]]) -> Iterator[str]:
    """The figures of `run` as lines of text, but for those from prices: one for each case, times and quality side by side."""
    columns = "{:<50}{:>11}{:>11}{:>14}{:>11}{:>13}{:>11}".format
    yield columns("", "time", "OR-tools", "times faster", "loss", "proven loss", "violation")
    for case, several in itertools.groupby(figures, lambda figure: figure["case"]):
        found = {figure["metric"]: figure for figure in several}
        if "violation" not in found:
            (figure,) = found.values()
            yield columns(case, f"{figure['value']:.3g} {figure['unit']}", "", "", "", "", "").rstrip()
            continue
        ours, ratio = found["seconds"]["value"], found["seconds"]["ratio"]
        theirs = (_readable(ours * ratio), f"{ratio:.3g}") if ratio else ("", "")
        losses = (f"{100 * found[name]['value']:.5f}%" if name in found else "" for name in ("gap", "proven gap"))
        yield columns(case, _readable(ours), *theirs, *losses, found["violation"]["value"])


def _readable(seconds) -> str:
    return f"{1e3 * seconds:.4g} ms" if seconds < 1 else f"{seconds:.4g} s"


def halves(case: Case) -> tuple[Case, Case]:
    """Two cohorts of the clients of a problem, each with half of the bounds."""
    middle = len(case.slots) // 2
    bounds = case.lower // 2, -(-case.upper // 2)
    first, second = (Case(case.name, case.fitness[half], case.slots[half], *bounds) for half in np.arange(2 * middle).reshape(2, -1))
    return first, second


def _other_cohort(solve, case, key, repeats) -> tuple[float, float]:
    """Seconds for half of the clients, from nothing and from the prices of the others."""
    first, second = (tuple(map(jnp.asarray, half[1:])) for half in halves(case))
    _, info = solve(*first, key=key)
    return (
        _median(functools.partial(solve, *second, key=key), repeats),
        _median(functools.partial(solve, *second, key=key, prices=info.prices), repeats),
    )


def _median(function, repeats) -> float:
    """Seconds of a call; a first one, which may compile, is not counted."""
    _timed(function)
    return statistics.median(_timed(function)[0] for _ in range(repeats))


def _timed(function):
    start = time.perf_counter()
    result = jax.block_until_ready(function())
    return time.perf_counter() - start, result


def _figure(case, clients, experts, metric, value, unit, against=None, ratio=None):
    name = f"{clients}x{experts} {case}"
    return dict(bench="assign", case=name, metric=metric, value=value, unit=unit, against=against, ratio=ratio)
