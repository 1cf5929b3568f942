"""Several processes of one run: how they start, and with real ones how they end (slow; results in tests/results/processes.json)."""

import json
from pathlib import Path

import processes as campaigns
import pytest

from fedmoe_jax import cli
from fedmoe_jax.distributed import processes


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--coordinator", "here", "--processes", "2", "--process", "0"], "coordinator is 'here', it must be auto or HOST:PORT"),
        (["--coordinator", "here:0", "--processes", "2", "--process", "0"], "it must be auto or HOST:PORT"),
        (["--coordinator", "here:99999", "--processes", "2", "--process", "0"], "it must be auto or HOST:PORT"),
        (["--coordinator", "here:80", "--processes", "2"], "processes is 2 and process is None: give both"),
        (["--coordinator", "here:80", "--processes", "2", "--process", "2"], "the second from 0 to the first less 1"),
        (["--coordinator", "auto", "--processes", "2"], "coordinator is auto: leave processes and process out"),
        (["--process", "1"], "--coordinator is missing"),
    ],
)
def test_processes_that_cannot_be_are_refused(flags, what, capsys, tmp_path):
    assert cli.main(["train", *flags, "--out", str(tmp_path / "run")]) == 2
    assert what in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_one_process_is_the_first_and_waits_for_nobody():
    assert processes.is_first() and not processes.several()
    assert processes.by_first(lambda: 3) == 3 and processes.least(2.0) == 2.0
    assert processes.anyone(True) and not processes.anyone(False)


def test_the_others_are_told_where_the_first_one_stops(monkeypatch):
    monkeypatch.setattr(processes, "several", lambda: True)
    monkeypatch.setattr(processes, "anyone", lambda flag: True)
    monkeypatch.setattr(processes, "is_first", lambda: False)
    with pytest.raises(processes.LostError, match="the first process has stopped"):
        processes.by_first(lambda: 3)
    monkeypatch.setattr(processes, "is_first", lambda: True)
    with pytest.raises(OSError, match="full"):
        processes.by_first(lambda: (_ for _ in ()).throw(OSError("full")))


def looks_right(results):
    for line in results:
        assert set(line["statuses"]) == {0} and line["apart"] < 1e-3, line
        if line["check"] == "together":
            assert line["lines"][0] > 3 and not any(line["lines"][1:]), line
        elif line["check"] == "moved":
            assert line["rounds"][0] < line["rounds"][1] < line["rounds"][2] == 12, line
            assert {status for each in line["stopped"] for status in each} == {143}, line
        else:
            assert line["status"] != 0 and line["seconds"] < 60 and line["said"] and line["rounds"] < 12, line


@pytest.mark.slow
def test_real_processes(tmp_path):
    results = list(campaigns.campaign(tmp_path))
    assert len(results) == 6
    looks_right(results)


def test_committed_results_look_right():
    looks_right(json.loads((Path(__file__).parent / "results" / "processes.json").read_text()))
