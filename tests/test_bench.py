"""`fedmoe bench assign`: its families are solved to the optimum, in small; larger sizes are marked slow."""

import json
import sys

import pytest

from fedmoe_jax import cli
from fedmoe_jax.bench import assign

NEARLY_EQUAL = ("near ties", "all equal")


def check(clients, experts):
    """Every case is as good as the optimum of OR-tools; `run` itself compares the violations."""
    pytest.importorskip("ortools")
    figures = list(assign.run(clients=clients, experts=experts, repeats=1))
    gaps = {figure["case"]: figure["value"] for figure in figures if figure["metric"] == "gap"}
    assert len(gaps) == 29
    for case, gap in gaps.items():
        assert -1e-6 <= gap <= (1e-3 if any(name in case for name in NEARLY_EQUAL) else 1e-4), (case, gap)
    speed = {figure["case"]: figure["ratio"] for figure in figures if figure["metric"] == "seconds" and figure["ratio"]}
    assert len(speed) == 29 and figures[-1]["value"] == pytest.approx(min(speed.values()))


@pytest.mark.parametrize(
    ("clients", "experts"), [(10, 4), *(pytest.param(*size, marks=pytest.mark.slow) for size in [(1, 6), (9, 1)]), (200, 8)]
)
def test_every_family_is_solved_to_the_optimum(clients, experts):
    check(clients, experts)


@pytest.mark.slow
@pytest.mark.parametrize(("clients", "experts"), [(1000, 64), (10_000, 64)])
def test_every_family_is_solved_to_the_optimum_in_large(clients, experts):
    check(clients, experts)


def test_a_missing_reference_is_told_before_anything_is_measured(monkeypatch):
    monkeypatch.setitem(sys.modules, "ortools.graph.python.min_cost_flow", None)
    with pytest.raises(ValueError, match=r"OR-tools, which is not installed: .* or leave it out by --no-reference"):
        next(assign.run(clients=10, experts=4))
    assert next(assign.run(clients=10, experts=4, reference=False))["metric"] == "seconds"


def test_command_prints_one_object_a_line(capsys):
    assert cli.main(["bench", "assign", "--clients", "10", "--experts", "4", "--repeats", "1", "--no_reference"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {"bench", "case", "metric", "value", "unit", "against", "ratio", "device", "versions", "date"} == set(lines[0])
    warm = {"seconds from the last prices", "seconds of half the clients from the others' prices"}
    assert {line["metric"] for line in lines} == {"seconds", "proven gap", "violation"} | warm
    assert all(line["value"] <= 1e-2 for line in lines if line["metric"] == "proven gap")


def test_a_terminal_gets_a_table(monkeypatch, capsys):
    def figures(case, ratio, **values):
        return [assign._figure(case, 10, 4, name.replace("_", " "), value, "s", ratio=ratio) for name, value in values.items()]

    def run(reference, **sizes):
        yield from figures("compilation", None, seconds=1.5)
        yield from figures("uniform", None, proven_gap=2e-6, violation=0, seconds=0.25)
        yield from figures("popular", 40.0, proven_gap=2e-6, violation=3, gap=1e-6, seconds=0.25)
        yield from figures("geometric mean", 3.0, speedup=3)

    monkeypatch.setattr(assign, "run", run)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert cli.main(["bench", "assign"]) == 0
    head, compilation, alone, beside, mean = capsys.readouterr().out.splitlines()
    assert head.split() == ["time", "OR-tools", "times", "faster", "loss", "proven", "loss", "violation"]
    assert compilation.split() == ["10x4", "compilation", "1.5", "s"] and mean.split() == ["10x4", "geometric", "mean", "3", "s"]
    assert alone.split() == ["10x4", "uniform", "250", "ms", "0.00020%", "0"]
    assert beside.split() == ["10x4", "popular", "250", "ms", "10", "s", "40", "0.00010%", "0.00020%", "3"]
    assert len(head) == len(alone) == len(beside), "columns stand below each other"
