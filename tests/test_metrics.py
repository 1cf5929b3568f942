"""Metrics: what is written is what is read, also after a crash."""

import io
import itertools
import json
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest

from fedmoe_jax.training import metrics
from fedmoe_jax.training.metrics import METRIC_FIELDS, MetricsLog, record, summarise
from fedmoe_jax.training.progress import Progress


def rounds(accuracies, **values):
    return [record(place, eval_accuracy=value, bytes_down=10, bytes_up=1, **values) for place, value in enumerate(accuracies)]


def test_record_keeps_the_fields_in_order_and_makes_values_plain():
    line = record(
        3, load=jnp.arange(2), train_loss=np.float32(0.5), eval_loss=jnp.float32(jnp.nan), load_cv=float("inf"), dropped_clients=np.int64(2)
    )
    assert tuple(line) == METRIC_FIELDS
    assert (line["load"], line["train_loss"], line["eval_loss"], line["load_cv"], line["dropped_clients"]) == ([0, 1], 0.5, None, None, 2)
    assert type(line["dropped_clients"]) is int and line["coverage"] is None
    assert json.loads(json.dumps(line, allow_nan=False)) == line


def test_record_and_append_refuse_other_fields(tmp_path):
    with pytest.raises(ValueError, match="unknown metrics: acuracy"):
        record(0, acuracy=1.0)
    log = MetricsLog(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="unknown metrics: extra"):
        log.append({**record(0), "extra": 1})
    with pytest.raises(ValueError, match="lacks metrics: coverage"):
        log.append({name: value for name, value in record(0).items() if name != "coverage"})
    with pytest.raises(ValueError, match="no number"):
        record(0, coverage=object())
    assert not log.path.exists()


def test_log_reads_back_what_it_wrote(tmp_path):
    log = MetricsLog(tmp_path / "new" / "metrics.jsonl")
    lines = rounds([None, 0.5, 0.25], load=[1, 2])
    for line in lines:
        log.append(line)
        assert metrics.read(log.path)[-1] == line
    assert metrics.read(log.path) == lines


def test_truncate_drops_later_rounds_and_a_torn_line(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.truncate(0)
    assert not log.path.exists()
    lines = rounds([0.1] * 5)
    for line in lines:
        log.append(line)
    with log.path.open("a") as file:
        file.write('{"round": 5, "train_lo')
    assert metrics.read(log.path) == lines
    log.truncate(3)
    log.append(lines[3])
    assert metrics.read(log.path) == lines[:4]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("text", ["nonsense\n", '{"round": 0}\n{"roun\n{"round": 2}\n', "3\n", '{"train_loss": 1}\n'])
def test_read_refuses_damage_elsewhere(tmp_path, text):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"metrics.jsonl: line \d is not a round"):
        metrics.read(path)
    with pytest.raises(ValueError, match="cannot be read"):
        metrics.read(tmp_path / "absent.jsonl")


def test_summary_has_last_best_totals_and_target():
    lines = rounds([None, 0.5, None, 0.9, 0.8, None], train_loss=1.0, load_cv=0.2, simulated_seconds=2.0)
    lines[2]["train_loss"], lines[4]["load_cv"], lines[5]["train_loss"] = 0.5, 0.1, None
    summary = summarise(lines, 0.75, seed=4)
    assert summary["rounds"] == 6
    assert (summary["last"]["eval_accuracy"], summary["best"]["eval_accuracy"]) == (0.8, 0.9)
    assert (summary["last"]["train_loss"], summary["best"]["train_loss"], summary["best"]["load_cv"]) == (1.0, 0.5, 0.1)
    assert summary["last"]["eval_loss"] is summary["best"]["eval_loss"] is None
    assert (summary["rounds_to_target"], summary["bytes_to_target"], summary["seed"]) == (4, 44, 4)
    assert summary["total"]["bytes_down"] == 60 and summary["total"]["simulated_seconds"] == 12.0
    assert set(summary["versions"]) == {"jax", "flax", "optax", "numpy", "python", "fedmoe_jax"} and all(summary["versions"].values())
    assert summary["device"].endswith("x cpu")


@pytest.mark.parametrize(("target", "expected"), [(0.9, (2, 22)), (0.91, (None, None)), (None, (None, None)), (0.1, (1, 11))])
def test_to_target_takes_the_first_evaluation_at_or_above(target, expected):
    assert metrics.to_target(rounds([0.2, 0.9, 0.9]), target) == expected


def test_summary_of_nothing_is_nulls():
    summary = summarise([])
    assert summary["rounds"] == 0 and summary["rounds_to_target"] is None and not any(summary["best"].values())


def test_git_revision_is_that_of_the_package_or_none(monkeypatch):
    def fail(*arguments, **options):
        raise FileNotFoundError("git")

    revision = metrics.git_revision()
    assert revision is None or len(revision) == 40
    monkeypatch.setattr(subprocess, "run", fail)
    assert metrics.git_revision() is None


def test_json_is_written_at_once(tmp_path):
    path = tmp_path / "deep" / "summary.json"
    metrics.write_json(path, {"a": np.float32(1), "b": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1.0, "b": None}
    with pytest.raises(ValueError, match="no number"):
        metrics.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1.0, "b": None}
    assert [child.name for child in path.parent.iterdir()] == ["summary.json"]


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self):
        return True


def test_progress_prints_plain_lines_at_evaluations():
    stream = io.StringIO()
    with Progress(5, stream) as progress:
        for line in rounds([None, 0.5, None, None, None], train_loss=1.25, load_cv=0.1, clients_per_second=1234.0):
            progress.update(line)
        progress.note("out of memory [chunk]:\nhalved to 10")
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("round 2/5  loss 1.250  accuracy 0.500  load CV 0.10  clients/s 1,234")
    assert lines[1].startswith("round 5/5") and lines[2:] == ["out of memory [chunk]: halved to 10"]


def test_progress_of_several_runs_names_each_and_keeps_their_values_apart():
    stream = io.StringIO()
    with Progress(4, stream) as progress:
        for done, (run, line) in enumerate(itertools.product(("full, seed 0", "full, seed 1"), rounds([None, 0.5], train_loss=1.25)), 1):
            progress.update(line | {"eval_loss": 2.0 if done == 3 else None}, done, run)
    first, second, third = stream.getvalue().splitlines()
    assert first.startswith("round 2/4  full, seed 0, round 2  loss 1.250  accuracy 0.500")
    assert second.startswith("round 3/4  full, seed 1, round 1  loss 1.250  test loss 2.000") and "accuracy" not in second
    assert third.startswith("round 4/4  full, seed 1, round 2  loss 1.250  test loss 2.000  accuracy 0.500")


@pytest.mark.parametrize("width", ["20", "120"])
def test_progress_restores_the_terminal_after_an_interrupt(monkeypatch, width):
    monkeypatch.setenv("COLUMNS", width)
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with pytest.raises(KeyboardInterrupt), Progress(3, stream) as progress:
        progress.update(rounds([0.5], train_loss=1.0)[0])
        raise KeyboardInterrupt
    text = stream.getvalue()
    assert "round 1/3" in text and "accuracy" in text
    assert text.rstrip().endswith("\x1b[?25h")


def test_progress_without_rounds_shows_nothing_wrong():
    with Progress(1, Terminal()), Progress(1, io.StringIO()):
        pass
