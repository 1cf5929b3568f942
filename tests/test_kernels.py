"""What clients added to kernels, as the dual engine keeps it: formed, summed and measured; tables that are looked up."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fedmoe_jax import kernels, norms
from fedmoe_jax.kernels import DualDelta, DualKernel, History
from fedmoe_jax.probe import Probe


def delta_of(table=False, clients=3, features=5, hidden=4, seed=0):
    draw = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(draw.normal(size=shape), jnp.float32)

    def inputs():
        if table:
            return jnp.asarray(draw.integers(0, features, (clients, 1, 6)), jnp.int32)
        return normal(clients, 1, 6, features)

    rows = tuple(History(inputs(), (normal(clients, 1, 4, hidden), normal(clients, 1, 2, hidden)), normal(clients, 6)) for _ in range(2))
    return DualDelta(rows, normal(clients), normal(features, hidden))


def formed(delta):
    total = np.asarray(delta.shrink)[:, None, None] * np.asarray(delta.base)
    for rows in delta.history:
        inputs = rows.inputs if rows.inputs.ndim == 4 else np.eye(total.shape[1])[rows.inputs]
        total = total + np.einsum("crd,cr,crh->cdh", inputs[:, 0], rows.weight, rows.gradients[:, 0])
    return total


@pytest.mark.parametrize("table", [False, True])
def test_deltas_on_request_and_norms_without_them(table):
    delta = delta_of(table)
    np.testing.assert_allclose(kernels.form(delta), formed(delta), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(norms.frobenius(delta), (formed(delta) ** 2).sum((1, 2)) ** 0.5, rtol=1e-4)
    np.testing.assert_allclose(
        kernels.shared_sum(delta, jnp.array([1.0, 0.0, 2.0])), formed(delta)[0] + 2 * formed(delta)[2], rtol=1e-4, atol=1e-5
    )


def test_a_long_sum_is_cut_on_a_gpu(monkeypatch):
    delta, weight = delta_of(table=False, clients=500), jnp.linspace(-1, 1, 500)
    whole = kernels.shared_sum(delta, weight)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    np.testing.assert_allclose(kernels.shared_sum(delta, weight), whole, rtol=1e-4, atol=1e-3)
    shapes = [equation.outvars[0].aval.shape for equation in jax.make_jaxpr(kernels.shared_sum)(delta, weight).eqns]
    assert (3, *whole.shape) in shapes, "3,000 rows make three pieces"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_table_with_a_history_is_the_table_that_it_stands_for(dtype):
    """Also for places that count from the end."""
    delta, index = delta_of(table=True, clients=1), jnp.array([[0, 3, -1], [-2, 4, 0]])
    rows = tuple(jax.tree.map(lambda a: a[0], rows) for rows in delta.history)
    rows = tuple(dataclasses.replace(one, parts=tuple(part.astype(dtype) for part in one.parts)) for one in rows)
    tap = jnp.zeros((1, 6)), jnp.zeros((1, 6, 4), dtype)
    kernel = DualKernel(delta.base, scale=1 + delta.shrink[0], history=rows, tap=tap)
    rounded = dataclasses.replace(delta, history=tuple(jax.tree.map(lambda a: a[None], one) for one in rows))
    table, near = np.float32(delta.base + formed(rounded)[0]), 1e-5 if dtype == jnp.float32 else 0.03
    np.testing.assert_allclose(kernels.lookup(kernel, index).astype(jnp.float32), table[np.asarray(index)], rtol=near, atol=near)
    np.testing.assert_array_equal(kernels.lookup(jnp.asarray(table), index), table[np.asarray(index)])


def test_a_loop_over_a_weight_ends_and_keeps_it_with_the_client():
    """Python asks for entries until there is none, and JAX gives one for any index."""
    probe = Probe(jnp.ones((3, 4)))
    assert len(list(nnx.Param(probe).get_value())) == 3 and probe.other
