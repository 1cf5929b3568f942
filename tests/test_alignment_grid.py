"""The grid of experiments/alignment, in small, and the tables that are made of it."""

import sys
from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))
from experiments import tables  # noqa: E402
from experiments.alignment import __main__ as grid  # noqa: E402
from fedmoe_jax.training.config import TrainConfig, from_toml, validate  # noqa: E402


@pytest.mark.parametrize("name", grid.CELLS)
def test_every_cell_is_a_valid_configuration(name):
    validate(TrainConfig(**from_toml(grid.CELLS[name])))


def test_a_small_cell_gives_a_table(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    small = dict(data="digits", population=16, cohort=8, rounds=4, eval_every=2, local_steps=2, model_options={"hidden": 16})
    aligners = ("random", "paper-style greedy", "balanced")
    found = grid.run("fashion_both", aligners=aligners, seeds=2, **small)
    assert list(found["runs"]) == list(aligners) and {len(seeds) for seeds in found["runs"].values()} == {2}
    for run in (run for seeds in found["runs"].values() for run in seeds):
        assert run["round"] == [2, 4] and run["bytes"][1] > run["bytes"][0] and len(run["client_accuracy_prior_mean"]) == 2
    text = tables.render([found])
    assert text.count("paper-style greedy") == 2 and "± " in text and "fashion_both" in text


def run_of(accuracy, start=1):
    """A run that is evaluated every round, each of a megabyte."""
    columns = dict.fromkeys((*tables.FINAL.values(), "load_cv_total"), accuracy)
    rounds = list(range(start, start + len(accuracy)))
    return columns | {"round": rounds, "bytes": [1e6 * round for round in rounds]}


def test_differences_are_paired_and_targets_are_of_random():
    config = dict(rounds=4, population=10, cohort=5, experts=4, slots=2)
    about = dict(cell="some", config=config, device="1 x cpu", versions={"jax": "1"}, seconds=60)
    runs = {
        "random": [run_of([0.1, 0.2, 0.3, 0.4]), run_of([0.2, 0.3, 0.5, 0.6])],
        "balanced": [run_of([0.3, 0.5, 0.5, 0.5]), run_of([0.3, 0.5, 0.6, 0.7])],
        "greedy": [run_of([0.1] * 4), run_of([0.3, 0.5, 0.6, 0.9])],
    }
    lines = tables.render([about | {"runs": runs}]).splitlines()
    row = {line.split(" | ")[0]: line.split(" | ")[1:] for line in lines if line.startswith("| ")}
    last = {line.split(" | ")[0]: line.split(" | ")[1:] for line in reversed(lines) if line.startswith("| ")}
    half = 12.706 * np.std([40, 60], ddof=1) / np.sqrt(2)
    assert "49.5%" in lines[2] and last["| random"][0] == f"50.0 ± {half:.1f}"
    assert row["| random"][0] == "+10.0 ± 0.0" and last["| balanced"][-2:] == ["2", "2 |"]
    assert last["| random"][-2] == "3 (1 of 2 seeds)" and row["| random"][-2] == "–" and row["| greedy"][-2] == "–"


def test_the_tables_are_those_of_the_results():
    text = (REPOSITORY / "experiments" / "README.md").read_text()
    assert text.partition(tables.BEGIN)[2].partition(tables.END)[0] == tables.render(tables.results())
