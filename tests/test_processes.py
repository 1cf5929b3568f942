"""Several processes of one run: how they start, and with real ones how they end (slow; results in tests/results/processes.json)."""

import json
import os
import subprocess
import sys
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


TINY = ["train", "--population", "12", "--cohort", "4", "--experts", "4", "--rounds", "1", "--model_options", "hidden=16"]


def on_this_cpu(folder, devices, **environment):
    """A tiny run with so many devices in a process of its own, for which JAX has not been told of any but by the environment."""
    code = "import sys; from fedmoe_jax import cli; sys.exit(cli.main(sys.argv[1:]))"
    words = [sys.executable, "-c", code, *TINY, "--devices", str(devices), "--out", str(folder)]
    cleared = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    environment = cleared | dict(JAX_PLATFORMS="cpu") | environment
    return subprocess.run(words, capture_output=True, text=True, timeout=300, env=environment, check=False)


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="this machine has one core")
def test_cores_of_a_cpu_become_devices(tmp_path):
    done = on_this_cpu(tmp_path / "run", 2)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["device"] == "2 x cpu"


def test_there_are_no_more_devices_than_cores(tmp_path):
    done = on_this_cpu(tmp_path / "run", 9999)
    assert done.returncode == 2 and f"devices: must be at most the number there is ({os.cpu_count()}), got 9999" in done.stderr
    assert not (tmp_path / "run").exists()


def test_devices_that_xla_is_told_of_stay(tmp_path):
    done = on_this_cpu(tmp_path / "run", 9999, XLA_FLAGS="--xla_force_host_platform_device_count=3")
    assert done.returncode == 2 and "at most the number there is (3), got 9999" in done.stderr


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
