"""Tests of where kernels of our own run: only in what is compiled for a GPU that takes them."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from fedmoe_jax import gpu, sampling
from fedmoe_jax.alignment import elimination


@pytest.mark.parametrize(("capability", "has"), [("9.0", True), ("10.0", True), ("7.5", False), ("gfx90a", False), ("", False)])
def test_kernels_are_for_gpus_that_have_them(capability, has, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability=capability)])
    assert gpu.has_kernels() is has


@pytest.mark.parametrize(
    "function", [lambda x: sampling.permutation(jax.random.key(0), x, 9), lambda x: elimination.solve(jnp.eye(9), 1.0 * x)]
)
def test_what_is_compiled_for_another_machine_has_no_kernel(function, monkeypatch):
    def lowered(platform):
        return jax.jit(lambda x: function(x)).trace(jnp.arange(9)).lower(lowering_platforms=(platform,)).as_text()

    assert "xla.gpu.triton" not in lowered("cuda")
    monkeypatch.setattr(gpu, "has_kernels", lambda: True)
    assert "xla.gpu.triton" not in lowered("cpu")
    assert "xla.gpu.triton" in lowered("cuda")
