"""Assignment problems for tests, and `balanced` checked against the best assignment that OR-tools finds."""

import jax.numpy as jnp
import numpy as np
import pytest

from fedmoe_jax.alignment import assign
from fedmoe_jax.bench.assign import Case, exact, value, violation

CLIENTS, EXPERTS = 20, 8


def best(fitness, slots, lower, upper):
    """The mask of the best assignment."""
    pytest.importorskip("ortools")
    return exact(Case("", fitness, slots, lower, upper))


def family(name, clients, experts, rng):
    """Kinds of fitness that differ in what makes them hard."""
    uniform = rng.random((clients, experts))
    forbidden = np.where(rng.random((clients, experts)) < 0.4, -np.inf, uniform)
    return {
        "uniform": uniform,
        "popular": uniform + 0.5 * rng.random(experts),
        "very popular": uniform + 2.0 * rng.random(experts),
        "groups": rng.random((4, experts))[rng.integers(0, 4, clients)] + 0.1 * uniform,
        "near ties": np.round(2 * uniform) / 2 + 1e-6 * rng.random((clients, experts)),
        "rank one": rng.standard_normal((clients, 1)) * rng.standard_normal(experts),
        "all equal": np.ones((clients, experts)),
        "forbidden": forbidden,
        "nothing allowed": np.full((clients, experts), np.nan),
        "negative": -1e3 * uniform,
        "mostly unknown": np.where(rng.random((clients, experts)) < 0.1, 0.6 * uniform, 1.0),
        "outlier": np.where(np.arange(clients * experts).reshape(clients, experts) == 3, 50.0, uniform),
    }[name].astype(np.float32)


FAMILIES = [
    "uniform", "popular", "very popular", "groups", "near ties", "rank one",
    "all equal", "forbidden", "nothing allowed", "negative", "outlier", "mostly unknown",
]  # fmt: skip


def bounds(kind, total, experts, rng):
    mean = total / experts
    if kind == "around the mean":
        return np.full(experts, int(0.9 * mean)), np.full(experts, int(np.ceil(1.1 * mean)))
    if kind == "equal":
        lower = np.full(experts, total // experts)
        lower[: total % experts] += 1
        return lower, lower
    if kind == "no lower":
        return np.zeros(experts, int), np.full(experts, int(np.ceil(1.1 * mean)))
    lower = rng.integers(0, 9, experts)  # often not feasible
    return lower, lower + rng.integers(0, 9, experts)


def problem(seed, name="popular"):
    rng = np.random.default_rng(seed)
    slots = rng.integers(0, 4, CLIENTS)
    lower, upper = bounds("around the mean", int(slots.sum()), EXPERTS, rng)
    return [jnp.array(a) for a in (family(name, CLIENTS, EXPERTS, rng), slots, lower, upper)]


def check(fitness, slots, lower, upper, key=None, tolerance=1e-4):
    found, info = assign.balanced(*map(jnp.array, (fitness, slots, lower, upper)), key=key, return_info=True)
    case = Case("", fitness, slots, lower, upper)
    found, wanted = np.asarray(found), best(*case[1:])
    allowed = np.isfinite(fitness)
    assert not (found & ~allowed).any()
    np.testing.assert_array_equal(found.sum(1), np.minimum(slots, allowed.sum(1)))
    assert violation(found, case) == violation(wanted, case) == int(info.violation)
    assert not allowed.all() or int(info.violation) == int(assign.least_violation(*map(jnp.array, (slots, lower, upper))))
    loss = (value(wanted, case) - value(found, case)) / max(np.abs(np.where(found, fitness, 0)).sum(), 1e-9)
    assert loss <= tolerance
    assert -1e-6 <= float(info.gap) <= tolerance and loss <= float(info.gap) + 1e-6
    return found, info
