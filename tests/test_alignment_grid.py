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


def test_a_small_cell_gives_a_table(monkeypatch, tmp_path):
    monkeypatch.chdir(REPOSITORY)
    draw = np.random.default_rng(0)
    np.savez(tmp_path / "some.npz", x=draw.normal(size=(400, 6, 6, 1)), y=np.arange(400) % 10)
    small = dict(
        data=str(tmp_path / "some.npz"), population=16, cohort=8, rounds=4, eval_every=2, local_steps=1, model_options={"hidden": 16}
    )
    aligners = ("random", "paper-style greedy")
    found = grid.run("fashion_both", aligners=aligners, seeds=2, **small)
    assert list(found["runs"]) == list(aligners) and {len(seeds) for seeds in found["runs"].values()} == {2}
    for run in (run for seeds in found["runs"].values() for run in seeds):
        assert run["round"] == [2, 4] and run["bytes"][1] > run["bytes"][0] and len(run["client_accuracy_prior_mean"]) == 2
    assert found["config"]["data"] == "some.npz"
    text = tables.render([found | {"runs": found["runs"] | {tables.OURS: found["runs"]["random"]}}])
    assert text.count("paper-style greedy") == 2 and "± " in text and "fashion_both" in text


def run_of(accuracy):
    """A run that is evaluated every other round, each of a megabyte; metrics differ by a factor."""
    factors = dict(zip((*tables.FINAL.values(), "load_cv_total"), (0.5, 1.0, 0.25, 0.75, 0.1), strict=True))
    rounds = [2 * place + 2 for place in range(len(accuracy))]
    columns = {name: [factor * value for value in accuracy] for name, factor in factors.items()}
    return columns | {"round": rounds, "bytes": [1e6 * round for round in rounds]}


def test_differences_are_paired_and_targets_are_of_random():
    config = dict(rounds=8, population=10, cohort=5, experts=4, slots=2, eval_every=2)
    about = dict(cell="some", config=config, device="1 x cpu", versions={"jax": "1"}, seconds=60)
    runs = {
        "random": [run_of([0.1, 0.2, 0.3, 0.5]), run_of([0.2, 0.3, 0.4, 0.5])],
        "balanced": [run_of([0.3, 0.5, 0.5, 0.5]), run_of([0.5, 0.6, 0.6, 0.7])],
        "greedy": [run_of([0.1] * 4), run_of([0.3, 0.5, 0.6, 0.9])],
    }
    lines = tables.render([about | {"runs": runs}]).splitlines()
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines if line.startswith("| ") and "---" not in line]
    (_, random, ours, greedy), (head, over_random, over_greedy) = rows[:4], rows[4:]
    half = 12.706 * np.std([50, 70], ddof=1) / np.sqrt(2)
    assert "49.5%" in lines[2] and random == ["random", "25.0 ± 0.0", "50.0 ± 0.0", "12.5 ± 0.0", "37.5 ± 0.0", "0.050 ± 0.000", "8", "8"]
    assert ours[2] == f"60.0 ± {half:.1f}" and ours[-2:] == ["3", "3"] and greedy[-2:] == ["4 (1 of 2 seeds)"] * 2
    assert head[0] == "balanced less" and over_random[:3] == ["random", f"+5.0 ± {half / 2:.1f}", f"+10.0 ± {half:.1f}"]
    assert over_random[-2].startswith("-62.5% ±") and over_random[-1].startswith("-62.5% ±") and over_greedy[-2:] == ["–", "–"]


def test_the_tables_are_those_of_the_results():
    text = (REPOSITORY / "experiments" / "README.md").read_text()
    assert text.partition(tables.BEGIN)[2].partition(tables.END)[0] == tables.render(tables.results())
