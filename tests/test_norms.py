"""Norms and multiples of what clients added to kernels, and rounds in which updates are clipped without being formed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_round
from small_round import algorithm, distance, run, weights

from fedmoe_jax import aggregation, kernels, norms
from fedmoe_jax.kernels import DualDelta, History

CLIENTS, SLOTS, EXPERTS, FEATURES, HIDDEN = 3, 2, 4, 5, 7
NORM = 0.02
HELD = jnp.array([[2, 0], [1, 3], [3, EXPERTS]])


def delta_of_experts(tiled, shrink=0.3):
    """Two steps: a lane of four rows for each slot, or one of three tiles of two rows."""
    draw = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(draw.standard_normal(shape), jnp.float32)

    lanes, rows = (1, 6) if tiled else (SLOTS, 4)
    slots = [jnp.asarray(draw.integers(0, SLOTS, (CLIENTS, 3)), jnp.int32) if tiled else None for _ in range(2)]
    history = tuple(
        History(normal(CLIENTS, lanes, rows, FEATURES), (normal(CLIENTS, lanes, rows, HIDDEN),), normal(CLIENTS, rows), slot)
        for slot in slots
    )
    return DualDelta(history, shrink * normal(CLIENTS), normal(EXPERTS, FEATURES, HIDDEN))


def formed(delta):
    """What each slot added, by NumPy; zero where it has no expert."""
    base = np.concatenate([delta.base, np.zeros_like(delta.base[:1])])
    total = np.asarray(delta.shrink)[:, None, None, None] * base[HELD]
    for rows in delta.history:
        for client, slot in np.ndindex(CLIENTS, SLOTS):
            own = slice(None) if rows.slot is None else np.repeat(np.asarray(rows.slot[client]) == slot, 2)
            lane = slot if rows.slot is None else 0
            x, g, weight = rows.inputs[client, lane][own], rows.gradients[client, lane][own], rows.weight[client][own]
            total[client, slot] += np.asarray(x).T @ (np.asarray(weight)[:, None] * np.asarray(g))
    return total


@pytest.mark.parametrize("shrink", [0.0, 0.3])
@pytest.mark.parametrize("tiled", [False, True])
def test_norms_of_slots_are_those_of_what_was_added(tiled, shrink):
    delta = delta_of_experts(tiled, shrink)
    np.testing.assert_allclose(jax.jit(norms.squared_norm)(delta, HELD), np.square(formed(delta)).sum((2, 3)), rtol=1e-5)


@pytest.mark.parametrize("tiled", [False, True])
def test_multiples_are_those_of_what_was_added(tiled):
    delta, by = delta_of_experts(tiled), jnp.array([0.5, -2.0, 0.0])
    np.testing.assert_allclose(formed(norms.scaled(delta, by)), formed(delta) * by[:, None, None, None], rtol=1e-5, atol=1e-5)
    whole = jnp.asarray(formed(delta), jnp.bfloat16)
    assert norms.scaled(whole, by).dtype == jnp.bfloat16
    np.testing.assert_allclose(norms.scaled(whole, by)[1], -2 * whole[1])


def test_rows_that_add_up_to_nothing_have_no_norm():
    """Rounding must not make a square that is less than none."""
    delta = delta_of_experts(tiled=False, shrink=0.0)
    (first, _) = delta.history
    nothing = dataclasses.replace(delta, history=(first, dataclasses.replace(first, weight=-first.weight)))
    found = norms.squared_norm(nothing, HELD)
    assert (found >= 0).all() and (found <= 1e-4).all()


def test_what_a_client_added_is_formed_for_some_clients_at_a_time():
    draw = np.random.default_rng(1)
    history = tuple(
        History(jnp.asarray(draw.normal(size=(5, 1, 4, 3)), jnp.float32), (jnp.ones((5, 1, 4, 2)),), jnp.ones((5, 4))) for _ in range(2)
    )
    delta = DualDelta(history, jnp.arange(5.0), jnp.ones((3, 2)))
    whole = kernels.form(delta)
    np.testing.assert_allclose(kernels.form(delta, chunk_size=2), whole, rtol=1e-6)
    text = jax.jit(lambda delta: kernels.form(delta, chunk_size=2)).lower(delta).as_text()
    assert "tensor<2x3x2xf32>" in text


@pytest.mark.parametrize("layer", [{}, pytest.param(dict(token_capacity=1.0), marks=pytest.mark.slow)], ids=str)
def test_clipped_rounds_of_both_engines_agree(layer):
    """With weight decay, so that clients also change what no row tells of, and clients of unequal size, one of them with broken data."""
    clipped = aggregation.chain(aggregation.clip(norm=NORM), aggregation.mean())
    assert clipped.needs == "norms"
    options = dict(
        of=small_round.model(top_k=2, **layer), local_steps=2, client_optimizer=optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.3))
    )
    data = small_round.population(broken=(5,), sizes=(1, 2, 3, 4, 5, 6, 7, 8))
    (primal, told), (dual, told_dual) = (
        run(algorithm(engine=engine, aggregator=clipped, **options), data) for engine in ("primal", "dual")
    )
    assert told.rejected_updates == told_dual.rejected_updates == 1
    start = algorithm(**options).init(small_round.KEY, data)
    moved = distance(weights(primal), weights(start))
    assert 0.005 < moved <= NORM * (1 + EXPERTS) ** 0.5, "no part can have moved by more than the norm"
    assert distance(weights(primal), weights(dual)) <= 1e-5 * moved
