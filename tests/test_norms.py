"""Norms and multiples of what clients added to kernels, and rounds in which updates are clipped without being formed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_round
from small_round import algorithm, distance, run, weights

from fedmoe_jax import ExpertParam, Population, aggregation, alignment, kernels, models, norms
from fedmoe_jax.base import NO_EXPERT, ClientUpdate
from fedmoe_jax.kernels import DualDelta, History
from fedmoe_jax.local.cohort import Trainer

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
    np.testing.assert_allclose(jax.jit(norms.frobenius)(delta, HELD), np.square(formed(delta)).sum((2, 3)) ** 0.5, rtol=1e-5)


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
    found = norms.frobenius(nothing, HELD)
    assert (found >= 0).all() and (found <= 1e-2).all()


@pytest.mark.parametrize("size", [(1e12, 1e10, 0.0), (1e-25, 1e24, 0.0), (1e-12, 1e25, 1e22), (1.0, 0.0, 1e30)])
@pytest.mark.parametrize("tiled", [False, True])
def test_squares_may_be_no_numbers_of_float32(tiled, size):
    of_inputs, of_gradients, of_base = size
    delta = delta_of_experts(tiled, shrink=of_base)
    history = tuple(
        dataclasses.replace(rows, inputs=of_inputs * rows.inputs, parts=tuple(of_gradients * part for part in rows.parts))
        for rows in delta.history
    )
    delta = dataclasses.replace(delta, history=history)
    want = np.square(formed(delta).astype(np.float64)).sum((2, 3)) ** 0.5
    np.testing.assert_allclose(norms.frobenius(delta, HELD), want, rtol=1e-5)


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


def test_clipped_updates_are_what_the_formed_ones_are():
    """Arrays and kernels that are not formed, of which one is much too long, one short enough, and one empty slot has no part."""
    delta, draw = delta_of_experts(tiled=False), np.random.default_rng(2)
    delta = norms.scaled(delta, jnp.array([5.0, 0.01, 0.1]))
    shared, tokens = jnp.asarray(0.1 * draw.normal(size=(CLIENTS, 3)), jnp.float32), jnp.array([[3, 2], [1, 0], [4, 0]])
    held = jnp.where(HELD == EXPERTS, NO_EXPERT, HELD)
    update = ClientUpdate({"b": shared}, {"w": ExpertParam(delta)}, held, jnp.array([5, 1, 4]), tokens)
    encoder = aggregation.chain(aggregation.clip(norm=2.0), aggregation.mean()).encoder
    sent, kept = encoder.apply(None, None, None, jnp.ones(CLIENTS, bool), update, (None,))
    whole = np.where(np.asarray(tokens)[..., None, None] > 0, formed(delta), 0)
    factor = np.minimum(1, 2 / np.sqrt(np.square(whole).sum((1, 2, 3)) + np.square(shared).sum(1)))
    assert kept is None and factor[0] < 0.1 and factor[1] == 1
    np.testing.assert_allclose(sent.shared["b"], shared * factor[:, None], rtol=1e-5)
    np.testing.assert_allclose(formed(sent.experts["w"].get_value()), formed(delta) * factor[:, None, None, None], rtol=1e-4, atol=1e-5)


CASES = [({}, True), *(pytest.param(*case, marks=pytest.mark.slow) for case in [({}, False), (dict(token_capacity=1.0), True)])]


@pytest.mark.parametrize(("layer", "sum_tells"), CASES)
def test_clipped_rounds_of_both_engines_agree(layer, sum_tells, monkeypatch):
    """With weight decay, so that clients also change what no row tells of, and clients of unequal size, one of them with broken data."""
    monkeypatch.setattr(Trainer, "_sum_tells", lambda *_: sum_tells)
    clipped = aggregation.chain(aggregation.clip(norm=NORM), aggregation.mean())
    decayed = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.3))
    options = dict(of=small_round.model(top_k=2, **layer), local_steps=2, client_optimizer=decayed, aggregator=clipped)
    assert_agree(small_round.population(broken=(5,), sizes=(1, 2, 3, 4, 5, 6, 7, 8)), rejected=1, **options)


@pytest.mark.slow
def test_clipped_rounds_agree_with_groups_tables_routers_and_looks():
    text = np.random.default_rng(0).integers(0, 11, (24, 9)).astype(np.int32)
    data = Population.from_arrays(text[:, :-1], text[:, 1:], list(np.arange(24).reshape(4, 6)))
    small = dict(layers=2, features=8, heads=2, kv_heads=1, expert_hidden=6, tie_embeddings=False)
    net = models.create("transformer", input_shape=(8,), num_classes=11, num_experts=4, top_k=1, seed=0, per_layer=True, **small)
    clipped = aggregation.chain(aggregation.clip(norm=NORM), aggregation.mean())
    aligner = alignment.random(num_experts=4, max_slots=2, groups=2)
    options = dict(of=net, cohort_size=4, batch_size=3, aligner=aligner, aggregator=clipped, router="personal", check=True)
    info = assert_agree(data, rejected=0, experts=8, **options)
    assert info.invariants.all()


def assert_agree(data, rejected, experts=EXPERTS, **options):
    """Rounds by the primal and by the dual engine are the same, and no part has moved by more than the norm; what the latter tells."""
    (primal, told), (dual, told_dual) = (run(algorithm(engine=engine, **options), data) for engine in ("primal", "dual"))
    assert told.rejected_updates == told_dual.rejected_updates == rejected
    moved = distance(weights(primal), weights(algorithm(**options).init(small_round.KEY, data)))
    assert 0.1 * NORM < moved <= NORM * (1 + experts) ** 0.5 * (1 + 1e-5)
    assert distance(weights(primal), weights(dual)) <= 1e-5 * moved
    return told_dual
