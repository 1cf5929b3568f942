"""The scripts of benchmarks/ run, in small."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

COMMANDS = {
    "rounds": ["--clients", "300", "--cohort", "12", "--rounds", "2", "--repeats", "1"],
    "engines": ["--cases", "small", "--rounds", "2"],
    "products": ["--small"],
    "streaming": ["--clients", "30", "--cohort", "6", "--rounds", "4", "--block", "2", "--repeats", "1"],
    "roofline": ["--small"],
    "convolutions": ["--small", "--repeats", "1"],
    "attention": ["--small"],
    "peers/compare": ["--workloads", "tiny", "tiny-cnn", "--repeats", "1"],
}
PACKAGES = {"fedjax": "fedjax", "pfl": "pfl", "flower": "flwr"}


def figures_of(name, *arguments, **variables):
    script, environment = Path(__file__).parents[1] / "benchmarks" / f"{name}.py", os.environ | variables
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, check=True, env=environment)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_benchmark_prints_figures(name):
    figures = figures_of(name, *COMMANDS[name])
    assert len(figures) >= 4 and all(figure["value"] > 0 and figure["device"] and figure["versions"]["jax"] for figure in figures)


@pytest.mark.slow
def test_scaling_is_measured_on_several_devices_and_sends_what_the_formula_says():
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    figures = figures_of("scaling", "--small", "--cases", "wide", "--repeats", "1", XLA_FLAGS=flags, JAX_PLATFORMS="cpu")
    several = [figure for figure in figures if "1 x 1 devices" not in figure["metric"]]
    assert len({figure["metric"] for figure in several}) == 2 * 6 and all(figure["value"] > 0 for figure in figures)
    ratios = [figure["ratio"] for figure in several if figure["metric"].startswith("sent by a device")]
    assert len(ratios) == 3 and all(1 <= ratio < 1.02 for ratio in ratios)  # beside the formula, counts and scores of the cohort
    assert all(figure["value"] < 1 for figure in several if figure["metric"].startswith("share"))


@pytest.mark.slow
@pytest.mark.parametrize("peer", PACKAGES)
def test_a_peer_learns_as_we_do(peer):
    """Peers are in no extra: each needs an environment that has it, see `benchmarks/peers/compare.py`."""
    if importlib.util.find_spec(PACKAGES[peer]) is None:
        pytest.skip(f"{PACKAGES[peer]} is not installed")
    assert len(figures_of("peers/compare", "--workloads", "tiny", "--repeats", "1", f"--{peer}", sys.executable)) >= 6


def test_kernels_are_told_apart_and_counted_once():
    """Two kernels at the same time, one after them; names as the profiler gives them."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    try:
        import kernel_times
    finally:
        sys.path.pop(0)
    found = [(0.0, 4.0, "nvjet_sm90_tst_128x160_64x5_2x1_v_bz_NNT"), (2.0, 4.0, "loop_gather_fusion_3"), (10.0, 1.0, "loop_add_fusion")]
    milliseconds, started = kernel_times.times(found, 2)
    assert milliseconds == pytest.approx(dict(busy=3.5e-3, products=2e-3, moves=1e-3, others=5e-4)) and started == 1.5
    names = "gemm_fusion_dot_13", "expert_gemm", "outer_gemm__1", "MemcpyD2D", "input_reduce_fusion"
    assert list(map(kernel_times.kind, names)) == ["products"] * 3 + ["moves", "others"]


def test_pooling_is_the_same_in_the_order_that_suits_a_gpu(monkeypatch):
    """Values and gradients; where several positions are the largest they may share theirs otherwise."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "peers"))
    try:
        import networks
    finally:
        sys.path.pop(0)
    draw = np.random.default_rng(0)
    bias, gradient = np.float32([0.1, -0.2, 0.3]), draw.normal(size=(2, 2, 3, 3)).astype(np.float32)
    for x in (draw.normal(size=(2, 4, 6, 3)), draw.integers(1, 3, (2, 4, 6, 3))):
        found = {}
        for backend in ("cpu", "gpu"):
            monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
            y, back = jax.vjp(networks.activated, x.astype(np.float32), bias)
            of_x, of_bias = back(gradient)
            found[backend] = y, of_bias, of_x.reshape(2, 2, 2, 3, 2, 3).sum((2, 4)), np.unique(x).size < x.size or of_x
        for one, other in zip(*found.values(), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.slow
def test_kernel_times_of_a_cpu_are_the_rounds_alone():
    (figure,) = figures_of("kernel_times", "--small")
    assert figure["metric"] == "round" and figure["value"] > 0
