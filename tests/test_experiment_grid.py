"""The grid of experiments, in small: its configurations, merged results, and processes side by side."""

import collections
import dataclasses
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))
from experiments import grid, grid_tables, outcome  # noqa: E402
from experiments.ablations.__main__ import PLAN as ABLATIONS  # noqa: E402
from experiments.alignment.__main__ import PLAN  # noqa: E402
from experiments.communication.__main__ import PLAN as COMMUNICATION  # noqa: E402
from fedmoe_jax.training.config import validate  # noqa: E402

ABOUT = dict(device="1 x cpu", versions={"jax": "1"}, seconds=60)


@pytest.mark.parametrize("name", dict.fromkeys([*PLAN, *ABLATIONS, *COMMUNICATION, *(f"fashion_iid+{factor}" for factor in grid.FACTORS)]))
def test_every_cell_and_factor_is_a_valid_configuration(name):
    validate(grid.configuration(name))


def test_factors_change_a_cell_one_after_the_other_and_changes_come_last(monkeypatch, tmp_path):
    (tmp_path / "narrow.toml").write_text("experts = 4\nslots = 1\n[model_options]\nhidden = 3\n")
    monkeypatch.setitem(grid.FACTORS, "narrow", tmp_path / "narrow.toml")
    cell, changed = grid.configuration("fashion_both"), grid.configuration("fashion_both+32_experts+narrow", slots=3)
    assert grid.configuration("fashion_both+32_experts").experts == 32
    assert (changed.experts, changed.slots, changed.shift, changed.rounds) == (4, 3, cell.shift, cell.rounds)
    assert changed.model_options == cell.model_options | {"hidden": 3} and cell.model_options["hidden"] != 3


def test_a_small_cell_gives_a_table(monkeypatch, tmp_path):
    monkeypatch.chdir(REPOSITORY)
    draw = np.random.default_rng(0)
    np.savez(tmp_path / "some.npz", x=draw.normal(size=(400, 6, 6, 1)), y=np.arange(400) % 10)
    small = dict(
        data=str(tmp_path / "some.npz"), population=16, cohort=8, rounds=4, eval_every=2, local_steps=1, model_options={"hidden": 16}
    )
    found = grid.run("fashion_both", aligners=("paper-style greedy",), seeds=2, **small)
    ((name, seeds),) = found["runs"].items()
    assert name == "paper-style greedy" and len(seeds) == 2 and found["cell"] == "fashion_both"
    assert grid.run("fashion_both", aligners=("paper-style greedy",), seeds=1, first=1, **small)["runs"] == {name: seeds[1:]}
    for run in seeds:
        assert run["round"] == [2, 4] and run["bytes"][1] > run["bytes"][0] and len(run["client_accuracy_fittest_prior_mean"]) == 2
    assert found["config"]["data"] == "some.npz"
    cells = {"fashion_both": found | {"runs": {outcome.BASE: seeds, name: seeds, outcome.OURS: seeds}}}
    text = grid_tables.summary(cells) + "\n" + grid_tables.details(cells)
    assert text.count("| paper-style greedy |") == 4 and "± " in text and "fashion_both" in text
    assert text.count(outcome.FITTEST) == 1  # at the head of the summary: an aligner of one's own is not served with them


def result_of(*aligners, seeds=1, **config):
    """What `grid.run` gives, of runs that are their aligner's name."""
    return ABOUT | {"cell": "fashion_iid", "config": {"rounds": 3} | config, "runs": {name: [name] * seeds for name in aligners}}


def test_merged_results_keep_those_of_other_aligners(tmp_path):
    path = tmp_path / "fashion_iid.json"
    for new in (result_of("balanced"), result_of("random"), result_of("random") | {"runs": {"random": ["again"]}}):
        grid.merge(path, [new])
    merged = json.loads(path.read_text())
    assert list(merged["runs"].items()) == [("random", ["again"]), ("balanced", ["balanced"])] and merged["seconds"] == 180
    for other, name in (
        (result_of("greedy", rounds=4), "rounds"),
        (result_of("greedy", slots=1), "slots"),
        (result_of("greedy", seeds=2), "seeds"),
    ):
        with pytest.raises(ValueError, match=f"another {name};"):
            grid.merge(path, [other])
    assert json.loads(path.read_text()) == merged


@pytest.mark.parametrize("devices", [0, 2])
def test_tasks_that_fail_are_named_and_the_others_kept(monkeypatch, tmp_path, devices, capsys):
    running, most, lock = collections.Counter(), collections.Counter(), threading.Lock()

    def train(words, *, env, check):
        cell, aligner = words[3], words[5]
        with lock:
            running[env.get("CUDA_VISIBLE_DEVICES")] += 1
            most.update({device: running[device] - most[device] for device in running if running[device] > most[device]})
        time.sleep(0.03 if aligner == "random" else 0.01)
        with lock:
            running[env.get("CUDA_VISIBLE_DEVICES")] -= 1
        if aligner == "greedy":
            raise subprocess.CalledProcessError(1, words)
        out = Path(words[-1])
        out.mkdir()
        (out / f"{cell}.json").write_text(json.dumps(result_of(aligner, cell=cell)))

    monkeypatch.setattr(grid.subprocess, "run", train)
    (tmp_path / "fashion_both.json").write_text(json.dumps(result_of("full", rounds=7)))
    words = ["fashion_iid", "fashion_both", "fashion_iid+phones", "--aligners", "random", "greedy", "balanced", "--jobs", "3"]
    monkeypatch.setattr(sys, "argv", ["grid", *words, *(["--devices", str(devices)] if devices else []), "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="5 failed") as stop:
        grid.main("what it is", "experiments.alignment", PLAN)
    others = {f"fashion_both with {aligner}" for aligner in ("random", "balanced")}
    named = {f"{cell} with greedy" for cell in ("fashion_iid", "fashion_both", "fashion_iid+phones")} | others
    assert set(str(stop.value).partition(": ")[2].split(", ")) == named and "another rounds" in capsys.readouterr().err
    kept = {path.stem: list(json.loads(path.read_text())["runs"]) for path in tmp_path.glob("*.json")}
    assert kept == {"fashion_iid": ["random", "balanced"], "fashion_both": ["full"], "fashion_iid+phones": ["random", "balanced"]}
    assert all(number <= (2 if devices else 3) for number in most.values()) and (not devices or set(most) == {"0", "1"})


def test_seeds_apart_wait_for_each_other_and_are_not_run_again(monkeypatch, tmp_path):
    ran, fails = [], {"1"}

    def train(words, *, env, check):
        cell, aligner, seed = words[3], words[5], words[words.index("--only") + 1]
        ran.append((aligner, seed))
        if seed in fails:
            raise subprocess.CalledProcessError(1, words)
        Path(words[-1]).mkdir()
        result = result_of(aligner, cell=cell) | {"runs": {aligner: [f"{aligner} {seed}"]}}
        (Path(words[-1]) / f"{cell}.json").write_text(json.dumps(result))

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["grid", "fashion_iid", "--apart", "--seeds", "3", "--out", str(tmp_path), *words])
        grid.main("what it is", "experiments.alignment", PLAN)

    monkeypatch.setattr(grid.subprocess, "run", train)
    with pytest.raises(SystemExit, match="2 failed: fashion_iid with random, seed 1, fashion_iid with balanced, seed 1"):
        command("--aligners", "random", "balanced")
    assert ran == [(aligner, seed) for seed in "012" for aligner in ("random", "balanced")] and not (tmp_path / "fashion_iid.json").exists()
    fails.clear()
    command("--aligners", "balanced")
    assert ran[6:] == [("balanced", "1")] and len(list((tmp_path / "parts").iterdir())) == 2
    merged = json.loads((tmp_path / "fashion_iid.json").read_text())
    assert merged["runs"] == {"balanced": ["balanced 0", "balanced 1", "balanced 2"]} and merged["seconds"] == 180


def test_one_seed_is_what_all_seeds_have_of_it(monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(grid, "run", lambda *args, **options: made.append((args, options)) or result_of("balanced"))
    monkeypatch.setattr(sys, "argv", ["grid", "fashion_iid", "--aligners", "balanced", "--only", "2", "--out", str(tmp_path)])
    grid.main("what it is", "experiments.alignment", PLAN)
    assert made == [(("fashion_iid",), dict(aligners=["balanced"], seeds=1, first=2))]


def test_results_are_of_what_the_configurations_say():
    for folder in ("alignment", "ablations"):
        for name, result in outcome.read(folder).items():
            config = dataclasses.asdict(grid.configuration(name))
            config["data"] = Path(config["data"]).name
            assert {key: config[key] for key in result["config"]} == result["config"], f"{folder}: {name}"
            assert (outcome.RESULTS / folder / f"{name}.json").is_file()


def test_results_of_before_a_field_was_there_take_more_aligners_and_say_how_each_was_made(tmp_path):
    path, now = tmp_path / "some.json", dataclasses.asdict(grid.configuration("fashion_iid"))
    before = {name: value for name, value in now.items() if name != "least_spread"}
    old = result_of("random", **before) | {"made": {"random": {"source": "a"}}}
    path.write_text(json.dumps(old))
    grid.merge(path, [result_of("greedy", **now) | {"made": {"greedy": {"source": "b"}}}])
    found = json.loads(path.read_text())
    assert list(found["runs"]) == ["random", "greedy"] and found["made"] == {"random": {"source": "a"}, "greedy": {"source": "b"}}
    with pytest.raises(ValueError, match="results with another least_spread"):
        grid.merge(path, [result_of("full", **now | {"least_spread": 0.1})])


@pytest.mark.parametrize("words", [["--jobs", "0"], ["--seeds", "0"], ["--devices", "-1"], ["--jobs", "few"]])
def test_numbers_that_cannot_be_are_refused(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["grid", "fashion_iid", *words])
    with pytest.raises(SystemExit):
        grid.main("what it is", "experiments.alignment", PLAN)
    assert f"{words[1]} is not a whole number above 0" in capsys.readouterr().err
