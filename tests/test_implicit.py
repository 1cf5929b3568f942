"""Tests of convolutions whose patches are not written down: the kernels against XLA's convolution and its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmoe_jax import gpu
from fedmoe_jax.nn import convolution, implicit

INTERPRET = not gpu.has_kernels()

# examples, height, width, channels in and out: one of each, several tiles of rows, of columns and of features, none of them whole; in the
# last one programs with two blocks of columns and with one
CASES = [(1, 1, 1, 1, 1), (2, 6, 5, 1, 16), (3, 7, 8, 16, 20), (2, 5, 6, 40, 70), (2, 4, 5, 32, 40)]


def multiplied(x, kernel):
    return implicit.multiplied(x, kernel, interpret=INTERPRET)


def correlated(x, gradient):
    return implicit.correlated(x, gradient, interpret=INTERPRET)


@pytest.fixture(autouse=True)
def float32():
    """Else a GPU multiplies in TF32."""
    with jax.default_matmul_precision("float32"):
        yield


def arrays(examples, height, width, before, after, dtype):
    """Images, a kernel, and a gradient of what comes out."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (examples, height, width, before), dtype)
    return x, jax.random.normal(keys[1], (3, 3, before, after)), jax.random.normal(keys[2], (examples, height, width, after), dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_kernels_are_the_convolution_and_its_gradients(case, dtype):
    if not INTERPRET and dtype == jnp.float32 and max(case[3:]) > implicit._EXACT:
        pytest.skip("products in full float32 are slow to compile")
    x, kernel, gradient = arrays(*case, dtype)
    want, pulled = jax.vjp(lambda x, kernel: convolution.convolved(x, kernel, 1), x, kernel)
    of_x, of_kernel = pulled(gradient)
    found, found_of_x = multiplied(x, kernel), multiplied(gradient, implicit._turned(kernel))
    assert found.dtype == found_of_x.dtype == dtype
    found_of_kernel = correlated(x, gradient)
    assert found_of_kernel.dtype == jnp.float32
    for a, b in ((found, want), (found_of_x, of_x), (found_of_kernel, of_kernel)):
        assert a.shape == b.shape
        a, b = (np.asarray(array, np.float32) for array in (a, b))
        np.testing.assert_allclose(a, b, atol=(1e-5 if dtype == jnp.float32 else 0.02) * np.abs(b).max())


def test_each_client_has_its_kernel():
    clients = [arrays(2, 4, 5, 3, 6, jnp.float32) for _ in range(2)]
    x, kernels, gradients = (jnp.stack([a * (number + 1) for number, a in enumerate(column)]) for column in zip(*clients, strict=True))
    np.testing.assert_allclose(jax.vmap(multiplied)(x, kernels), jax.vmap(convolution.convolved)(x, kernels), atol=1e-4)
    shared = jax.vmap(multiplied, (0, None))(x, kernels[0])
    np.testing.assert_allclose(shared, jax.vmap(convolution.convolved, (0, None))(x, kernels[0]), atol=1e-4)
    np.testing.assert_allclose(jax.vmap(correlated)(x, gradients), jax.vmap(convolution.of_kernel)(x, gradients), atol=1e-3)


def test_long_sums_are_made_in_pieces(monkeypatch):
    x, _, gradient = arrays(3, 9, 8, 20, 4, jnp.float32)
    want = convolution.of_kernel(x, gradient)
    monkeypatch.setattr(implicit, "_PIECE", 32)
    for numbers in (1, 1 << 20):  # a block of columns a program, and all
        monkeypatch.setattr(implicit, "_SUMS", numbers)
        np.testing.assert_allclose(correlated(x, gradient), want, atol=1e-3)


def test_where_no_kernel_fits_it_is_the_convolution(monkeypatch):
    def is_kernel(dtype, *shape, after=4):
        x, gradient = (jax.ShapeDtypeStruct((*shape[:3], channels), dtype) for channels in (shape[3], after))
        kernel = jax.ShapeDtypeStruct((3, 3, shape[3], after), jnp.float32)
        traced = jax.make_jaxpr(implicit.convolve)(x, kernel), jax.make_jaxpr(implicit._correlate)(x, gradient)
        (found,) = {"pallas_call" in str(each) for each in traced}
        return found

    monkeypatch.setattr(gpu, "has_kernels", lambda: True)
    assert is_kernel(jnp.float32, 2, 4, 4, 3) and is_kernel(jnp.float16, 2, 4, 4, 3)
    assert not is_kernel(jnp.float32, 0, 4, 4, 3)
    assert not is_kernel(jnp.float32, 400_000, 28, 28, 1, after=16)  # results that 32 bits do not count
    assert not is_kernel(jnp.float32, 1, 1, 1, 4096, after=4096)
    assert is_kernel(jnp.float32, 2, 4, 4, 32) and not is_kernel(jnp.float32, 2, 4, 4, 33) and is_kernel(jnp.bfloat16, 2, 4, 4, 33)
    with jax.default_matmul_precision("high"):
        assert is_kernel(jnp.float32, 2, 4, 4, 33)
    with jax.enable_x64(True):
        assert is_kernel(jnp.float32, 2, 4, 4, 3) and not is_kernel(jnp.float64, 2, 4, 4, 3)


def test_it_can_be_differentiated_twice():
    x, kernel, _ = arrays(2, 4, 5, 3, 6, jnp.float32)

    def twice(function):
        def norm(x, kernel):
            gradients = jax.grad(lambda x, kernel: jnp.sin(function(x, kernel)).sum(), (0, 1))(x, kernel)
            return sum(jnp.square(gradient).sum() for gradient in gradients)

        return jax.grad(norm, (0, 1))(x, kernel)

    for found, want in zip(twice(implicit.convolve), twice(convolution.convolved), strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-3, atol=1e-3 * np.abs(want).max())


def test_as_a_layer_uses_it_it_is_the_convolution():
    """In kernels where a GPU has them, without anywhere else."""
    x, kernel, gradient = arrays(2, 4, 5, 3, 6, jnp.float32)

    def results(function):
        y, pulled = jax.vjp(function, x, kernel)
        return y, *pulled(gradient)

    found, want = (jax.jit(lambda function=function: results(function))() for function in (implicit.convolve, convolution.convolve))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, want)
