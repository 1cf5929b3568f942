"""Tests of steps that are taken only where they are needed: what they give, and that nothing is copied for them."""

import os
import re

import jax
import jax.numpy as jnp
import numpy as np

from fedmoe_jax.conditional import apply_if, replaced_if

CLIENTS, ROWS, FEATURES, HIDDEN = 28, 20, 784, 128
INDEX = jnp.arange(CLIENTS * ROWS).reshape(CLIENTS, ROWS)


def sound_sum(x, index, w):
    """The sum of rows^T outputs over clients' rows [client, lane, row, feature], without clients who have one that is not finite."""
    rows = jax.vmap(lambda place: x[place].reshape(1, ROWS, FEATURES))(index)
    outputs = jax.vmap(lambda own: jax.nn.relu(own[0] @ w).reshape(1, ROWS, HIDDEN))(rows)

    def total(rows, outputs):
        return jnp.einsum("crd,crh->dh", rows[:, 0], outputs[:, 0])

    def without(wrong, given):
        keep = jnp.isfinite(jnp.where(wrong, given[0], 0)).all((1, 2, 3))
        return total(*(jnp.where(keep[:, None, None, None], leaf, 0) for leaf in given))

    found = total(rows, outputs)
    return replaced_if(~jnp.isfinite(found).all(), without, found, (rows, outputs))


def test_what_is_wrong_is_replaced():
    draw = np.random.default_rng(0)
    x, w = (draw.standard_normal(shape).astype(np.float32) for shape in ((CLIENTS * ROWS, FEATURES), (FEATURES, HIDDEN)))
    broken, others = x.copy(), np.delete(x, np.s_[ROWS : 2 * ROWS], 0)
    broken[ROWS + 5, 0] = np.inf  # of the second client
    want = [rows.T @ np.maximum(rows @ w, 0) for rows in (x, others)]
    found = jax.jit(jax.vmap(sound_sum, (0, None, None)))(jnp.stack([x, broken]), INDEX, jnp.asarray(w))
    np.testing.assert_allclose(found, want, atol=0.1)  # of some thousands


def test_nothing_is_copied_for_it():
    lowered = jax.jit(sound_sum).lower(jnp.ones((1000, FEATURES)), INDEX, jnp.ones((FEATURES, HIDDEN)))
    as_elsewhere = {"xla_backend_optimization_level": 3}  # the suite sets other options
    as_elsewhere |= dict(xla_cpu_use_fusion_emitters=True) if "fusion_emitters" in os.environ.get("XLA_FLAGS", "") else {}
    text = lowered.compile(as_elsewhere).as_text()
    of_rows = rf"f32\[{CLIENTS},(1,)?{ROWS},({FEATURES}|{HIDDEN})\]\S* "
    assert re.search(of_rows, text)
    assert not re.search(of_rows + r"copy\(", text)


def test_a_function_is_applied_if_need_be():
    found = jax.vmap(lambda condition, x: apply_if(condition, lambda x: 2 * x, x))(jnp.array([True, False]), jnp.ones(2))
    np.testing.assert_array_equal(found, [2.0, 1.0])
