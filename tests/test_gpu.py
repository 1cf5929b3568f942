"""Tests of where kernels of our own run: only in what is compiled for a GPU that takes them."""

import re
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmoe_jax import gpu, grouped, sampling
from fedmoe_jax.alignment import flow, newton
from fedmoe_jax.nn import implicit


@pytest.mark.parametrize(
    ("capability", "has", "hopper"),
    [("9.0", True, True), ("10.0", True, False), ("8.9", True, False), ("7.5", False, False), ("gfx90a", False, False), ("", False, False)],
)
def test_kernels_are_for_gpus_that_have_them(capability, has, hopper, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability=capability)])
    assert gpu.has_kernels() is has and gpu.is_hopper() is hopper


def convolved(x):
    """Images times kernels of which nothing is known while this is compiled."""
    return implicit.convolve(jnp.ones((2, 3, 3, 1)) * x[1], jnp.ones((3, 3, 1, 4)) * x[2])


def priced(x, experts=5):
    """A problem of so many experts and nine clients."""
    value = x + jnp.arange(9 * experts).reshape(experts, 9)
    return flow.Problem(value, jnp.ones(value.shape, bool), x % 3, jnp.full(experts, 1), jnp.full(experts, 3))


def wide(*shape):
    return jnp.ones(shape, jnp.bfloat16)


FUNCTIONS = {
    "positions": lambda x: sampling.permutation(jax.random.key(0), x, 9),
    "one position": lambda x: sampling.permutation(jax.random.key(0), x[:1], 9),
    "positions of clients": lambda x: jax.vmap(jax.vmap(lambda key: sampling.permutation(key, x, 9)))(
        jax.random.split(jax.random.key(0), (2, 3))
    ),
    "a convolution": lambda x: convolved(1.0 * x).sum(),
    "gradients of a convolution": lambda x: jax.grad(lambda x: convolved(x).sum())(1.0 * x),
    "products with experts": lambda x: grouped.matmul(
        wide(3, 16, 64) * x[1], wide(2, 64, 128), x[:3] % 2, 1.0, [grouped.Part(wide(3, 16, 32), wide(3, 32, 128))]
    ),
    "sums for experts": lambda x: grouped.outer([grouped.Rows(wide(9, 4, 512), wide(9, 4, 1024), x[:, None] * jnp.ones((9, 4)))], x % 4, 4),
    "prices": lambda x: newton.prices(priced(x))[1],
    "prices of 64 experts": lambda x: newton.prices(priced(x, 64))[1],
    "prices of groups": lambda x: jax.vmap(lambda add: newton.prices(priced(x + add))[1])(jnp.arange(2)),
}


def are_verified(monkeypatch):
    """From here on what a kernel is lowered to must be a valid program of Triton, which is else found out by a GPU: these programs."""
    from jax._src.pallas.triton import lowering

    def verified(*args, lower=lowering.lower_jaxpr_to_triton_module, **options):
        result = lower(*args, **options)
        assert result.module.operation.verify()
        programs.append(str(result.module))
        return result

    programs = []
    monkeypatch.setattr(lowering, "lower_jaxpr_to_triton_module", verified)
    return programs


@pytest.mark.parametrize("name", FUNCTIONS)
def test_kernels_are_only_in_what_is_compiled_for_a_gpu(name, monkeypatch):
    def traced(has):
        monkeypatch.setattr(gpu, "has_kernels", lambda: has)
        monkeypatch.setattr(gpu, "is_hopper", lambda: has)
        jax.clear_caches()  # of what was traced otherwise
        return jax.jit(lambda x: FUNCTIONS[name](x)).trace(jnp.arange(9))

    assert "pallas_call" not in str(traced(False).jaxpr)
    with gpu.portable():
        assert "pallas_call" not in str(traced(True).jaxpr)
    with_kernel = traced(True)
    assert "pallas_call" in str(with_kernel.jaxpr)
    assert "triton" not in with_kernel.lower(lowering_platforms=("cpu",)).as_text()
    if jax.__version_info__ < (0, 11):  # later versions lower kernels only where there is a GPU
        are_verified(monkeypatch)
        assert "xla.gpu.triton" in with_kernel.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="later versions lower kernels only where there is a GPU")
@pytest.mark.parametrize(("name", "kernel"), [("products with experts", "expert_gemm"), ("sums for experts", "outer_gemm")])
def test_kernels_are_as_well_lowered_where_numbers_have_64_bits_and_precision_is_high(name, kernel, monkeypatch):
    """Factors stay in bfloat16, and their names tell a profile what they are."""
    monkeypatch.setattr(gpu, "has_kernels", lambda: True)
    monkeypatch.setattr(gpu, "is_hopper", lambda: True)
    programs = are_verified(monkeypatch)
    jax.clear_caches()
    with jax.enable_x64(True), jax.default_matmul_precision("F32_F32_F32"):
        traced = jax.jit(lambda x: FUNCTIONS[name](x)).trace(jnp.arange(9))
        assert kernel in traced.lower(lowering_platforms=("cuda",)).as_text()
    products = re.findall(r"tt\.dot.* : tensor<[^>]*x(\w+)> \* tensor<[^>]*x(\w+)>", programs[0])
    assert products and set(products) == {("bf16", "bf16")}


def test_a_convolution_and_its_gradients_are_three_kernels(monkeypatch):
    monkeypatch.setattr(gpu, "has_kernels", lambda: True)
    program = str(jax.make_jaxpr(jax.grad(lambda x: convolved(x).sum()))(jnp.arange(9.0)))
    assert program.count("pallas_call[") == 3


def test_without_kernels_or_with_a_device_that_is_set_all_is_done_as_elsewhere(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability="9.0")])
    with jax.default_device(jax.local_devices()[0]):
        assert not gpu.has_kernels()
    assert gpu.has_kernels()
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    assert not gpu.has_kernels()


def test_a_kernel_is_left_alone_where_arguments_are_on_another_device(monkeypatch):
    want = sampling.permutation(jax.random.key(0), jnp.arange(9), 9)
    monkeypatch.setattr(gpu, "has_kernels", lambda: True)
    np.testing.assert_array_equal(sampling.permutation(jax.random.key(0), jnp.arange(9), 9), want)
