"""Tests of convolutions whose patches are not written down: the kernels against XLA's convolution and its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmoe_jax.nn import convolution, implicit

INTERPRET = jax.default_backend() != "gpu"

# examples, height, width, channels in and out: one of each, several tiles of rows, of columns and of features, none of them whole
CASES = [(1, 1, 1, 1, 1), (2, 6, 5, 1, 16), (3, 7, 8, 16, 20), (2, 5, 6, 40, 70)]


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
    x, kernel, gradient = arrays(*case, dtype)
    want, pulled = jax.vjp(lambda x, kernel: convolution.convolved(x, kernel, 1), x, kernel)
    of_x, of_kernel = pulled(gradient)
    found = implicit.multiplied(x, kernel, interpret=INTERPRET)
    found_of_x = implicit.of_images(gradient, kernel, interpret=INTERPRET)
    assert found.dtype == found_of_x.dtype == dtype
    found_of_kernel = implicit.correlated(x, gradient, interpret=INTERPRET)
    assert found_of_kernel.dtype == jnp.float32
    for a, b in ((found, want), (found_of_x, of_x), (found_of_kernel, of_kernel)):
        assert a.shape == b.shape
        a, b = (np.asarray(array, np.float32) for array in (a, b))
        np.testing.assert_allclose(a, b, atol=(1e-5 if dtype == jnp.float32 else 0.02) * np.abs(b).max())


def test_each_client_has_its_kernel():
    clients = [arrays(2, 4, 5, 3, 6, jnp.float32)[:2] for _ in range(2)]
    x, kernels = (jnp.stack([client[place] * (number + 1) for number, client in enumerate(clients)]) for place in (0, 1))
    found = jax.vmap(lambda x, kernel: implicit.multiplied(x, kernel, interpret=INTERPRET))(x, kernels)
    want = np.stack([convolution.convolved(*client) for client in clients]) * np.array([1, 4]).reshape(2, 1, 1, 1, 1)
    np.testing.assert_allclose(found, want, atol=1e-4)


def test_long_sums_are_made_in_pieces(monkeypatch):
    x, _, gradient = arrays(3, 9, 8, 2, 4, jnp.float32)
    want = implicit.correlated(x, gradient, interpret=INTERPRET)
    monkeypatch.setattr(implicit, "_PIECE", 32)
    monkeypatch.setattr(implicit, "_SUMS", 1)
    np.testing.assert_allclose(implicit.correlated(x, gradient, interpret=INTERPRET), want, atol=1e-4)


def test_as_a_layer_uses_it_it_is_the_convolution():
    """In kernels where a GPU has them, without anywhere else."""
    x, kernel, gradient = arrays(2, 4, 5, 3, 6, jnp.float32)

    def results(function):
        y, pulled = jax.vjp(function, x, kernel)
        return y, *pulled(gradient)

    found, want = (jax.jit(lambda function=function: results(function))() for function in (implicit.convolve, convolution.convolve))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, want)
