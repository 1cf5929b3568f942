"""Dispatch: layouts keep the pairs that they may, tiles where they pay, and the capacity drops the overflow."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_oracle import EXAMPLES, FEATURES, SLOTS, TOKENS, layer, limit_of, scenario, split

from fedmoe_jax.nn import dispatch

TILED, LIMITED = jax.jit(dispatch.tiled, static_argnums=2), jax.jit(dispatch.limited, static_argnums=(2, 3))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), skew=st.floats(0, 20), top_k=st.sampled_from([1, 2]))
def test_layouts_keep_every_pair_they_may(seed, skew, top_k):
    random = np.random.default_rng(seed)
    logits = random.normal(size=(90, SLOTS)) + skew * random.normal(size=SLOTS)
    slot = jnp.asarray(np.argsort(-logits, 1)[:, :top_k].T.astype(np.int32))
    active = jnp.asarray(random.random(slot.shape) < 0.8)
    x = jnp.asarray(random.normal(size=(90, 3)).astype(np.float32))
    limit = 11
    for layout in (TILED(slot, active, SLOTS), LIMITED(slot, active, SLOTS, limit)):
        kept = np.asarray(layout.kept)
        if layout.expert.shape[0] == SLOTS:
            counts = np.bincount(np.asarray(slot)[np.asarray(active)], minlength=SLOTS)
            np.testing.assert_array_equal(np.bincount(np.asarray(slot)[kept], minlength=SLOTS), np.minimum(counts, limit))
        else:
            np.testing.assert_array_equal(kept, active)
        rows = dispatch.dispatch(x, layout)
        assert int(layout.filled.sum()) == kept.sum()
        np.testing.assert_allclose(dispatch.combine(rows, jnp.ones(slot.shape), layout), x * kept.sum(0)[:, None], rtol=1e-6)
        expert_of_row = np.asarray(layout.expert)[np.asarray(layout.row) // layout.pair.shape[1]]
        np.testing.assert_array_equal(expert_of_row[kept], np.asarray(slot)[kept])


def test_gradients_of_dispatch_and_combine_are_those_of_products_with_their_masks():
    random = np.random.default_rng(0)
    slot = jnp.asarray(np.argsort(random.normal(size=(30, SLOTS)), 1)[:, :2].T.astype(np.int32))
    layout = dispatch.limited(slot, jnp.asarray(random.random(slot.shape) < 0.8), SLOTS, 4)
    x, gates, weight = (jnp.asarray(random.normal(size=size), jnp.float32) for size in ((30, 3), slot.shape, (SLOTS, 4, 3)))
    sent = np.zeros((SLOTS * 4, *slot.shape), np.float32)  # [row, choice, token]
    for choice, token in np.argwhere(layout.kept):
        sent[layout.row[choice, token], choice, token] = 1

    def ours(x, gates):
        return (dispatch.combine(jnp.tanh(dispatch.dispatch(x, layout)) * weight, gates, layout) ** 2).sum()

    def plain(x, gates):
        rows = jnp.tanh(jnp.einsum("rct,td->rd", sent, x)) * weight.reshape(-1, 3)
        return (jnp.einsum("rct,rd,ct->td", sent, rows, gates) ** 2).sum()

    for got, wanted in zip(jax.grad(ours, (0, 1))(x, gates), jax.grad(plain, (0, 1))(x, gates), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_tiles_are_chosen_where_they_halve_the_rows(monkeypatch):
    seen = []
    monkeypatch.setattr(dispatch, "tiled", lambda *args, real=dispatch.tiled: seen.append(args) or real(*args))
    weights, call = split(layer(top_k=1))
    for tokens, calls in ((4, 0), (400, 1)):
        jax.eval_shape(call, weights, jnp.ones((2, tokens, FEATURES)), jnp.ones(SLOTS, bool))
        assert len(seen) == calls


def test_overflow_is_dropped_first_choices_first():
    weights, call = split(layer("limited", use_bias=False))
    prior = jnp.zeros(SLOTS).at[3].set(1000.0).at[5].set(500.0)
    weights["router"] = weights["router"].at[:4].set(0.0)
    x, *_ = scenario(0)
    y, tokens, _ = call(weights, jnp.asarray(x[0]), jnp.ones(SLOTS, bool), prior)
    limit = limit_of("limited", 2)
    assert 0 < limit < EXAMPLES * TOKENS
    served = np.zeros(EXAMPLES * TOKENS)
    served[:limit] = 1
    np.testing.assert_array_equal(tokens[:, 3], served.reshape(EXAMPLES, TOKENS).sum(1))
    np.testing.assert_array_equal(np.abs(y).reshape(-1, FEATURES).max(1) > 0, served)

    slot, active = jnp.array([[0, 1, 1], [1, 0, 0]]), jnp.ones((2, 3), bool)  # three first choices, three second ones
    np.testing.assert_array_equal(dispatch.limited(slot, active, 2, 2).kept, [[True, True, True], [False, True, False]])


def test_capacity_above_all_pairs_drops_nothing():
    inputs = [jnp.asarray(value[1]) for value in scenario(2, clients=2)]
    results = []
    for capacity in (None, 1e9):
        weights, call = split(layer(token_capacity=capacity))
        results.append(call(weights, *inputs))
    np.testing.assert_allclose(results[0][0], results[1][0], atol=1e-5)
    np.testing.assert_array_equal(results[0][1], results[1][1])
