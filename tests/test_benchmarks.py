"""The scripts of benchmarks/ run, in small."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = {
    "rounds": ["--clients", "300", "--cohort", "12", "--rounds", "2", "--repeats", "1"],
    "engines": ["--cases", "small", "--rounds", "2"],
    "streaming": ["--clients", "30", "--cohort", "6", "--rounds", "4", "--block", "2", "--repeats", "1"],
    "roofline": ["--small"],
    "convolutions": ["--small", "--repeats", "1"],
    "peers/compare": ["--workloads", "tiny", "tiny-cnn", "--repeats", "1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_benchmark_prints_figures(name):
    script = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    done = subprocess.run([sys.executable, str(script), *COMMANDS[name]], capture_output=True, text=True, check=True)
    figures = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(figures) >= 4 and all(figure["value"] > 0 and figure["device"] and figure["versions"]["jax"] for figure in figures)
