"""Rounds with clients that send what they should not: absurd values, the wrong sign, more than they may."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_round import BATCH, CLASSES, EXPERTS, FEATURES, KEY, algorithm, aligner, distance, model, population, run, weights
from test_round import close, same

from fedmoe_jax import Population, aggregation, federated_moe
from fedmoe_jax.base import NO_EXPERT, ClientUpdate, client_keys
from fedmoe_jax.local.cohort import Trainer
from fedmoe_jax.models.losses import cross_entropy
from fedmoe_jax.training import named
from fedmoe_jax.training.config import TrainConfig

CLIENTS, BAD, EACH = 100, 41, 4
MARKS = {"nan": (0.5, jnp.nan), "1e30": (0.25, 1e30), "sign": (0.125, -1.0), "honest": (0.0625, 1.0)}


def clients(what):
    """A hundred clients, of which the examples of one carry a mark."""
    draw = np.random.default_rng(0)
    x = draw.normal(size=(CLIENTS * EACH, FEATURES)).astype(np.float32)
    y = (x[:, 1:4].argmax(1) % CLASSES).astype(np.int32)
    x[BAD * EACH : (BAD + 1) * EACH, 0] = MARKS[what][0]
    return Population.from_arrays(x, y, np.split(np.arange(len(x)), CLIENTS))


def spoilt(model, batch, key):
    """Cross-entropy, multiplied in examples that carry a mark, so that a client sends the same multiple in a single step."""
    loss, aux = cross_entropy(model, batch, key)
    factor = jnp.ones(loss.shape)
    for mark, number in MARKS.values():
        factor = jnp.where(batch.x[:, 0] == mark, number, factor)
    return factor * loss, aux


@functools.cache
def made(**options):
    defaults = dict(client_optimizer=optax.sgd(0.3), server_optimizer=optax.sgd(1.0), cohort_size=CLIENTS, batch_size=BATCH)
    return federated_moe(model(), spoilt, **(defaults | dict(local_steps=1, engine="primal") | options))


@jax.custom_vjp
def steep(loss, marked):
    """The loss, whose gradient is not a number where it is marked."""
    return loss


steep.defvjp(lambda loss, marked: (loss, marked), lambda marked, g: (jnp.where(marked, jnp.nan, g), None))


def finite(model, batch, key):
    """Cross-entropy with such a gradient in the examples of the bad client."""
    loss, aux = cross_entropy(model, batch, key)
    return steep(loss, batch.x[:, 0] == MARKS["nan"][0]), aux


def together(step, runs):
    """A round of several runs in one program, of which the first is returned."""
    lead = functools.partial(jax.tree.map, lambda leaf: jnp.stack([leaf] * runs))
    return lambda state, data: jax.tree.map(lambda rows: rows[0], jax.jit(jax.vmap(step, (0, None)))(lead(state), data))


@pytest.mark.parametrize(
    ("engine", "runs", "options"),
    [
        ("primal", 1, dict(chunk_size=50)),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("dual", 2, dict(router="personal")), ("primal", 2, dict(router="statistics")), ("dual", 1, dict(chunk_size=50)))
        ),
    ],
)
def test_an_update_that_is_not_finite_though_its_loss_is(engine, runs, options, monkeypatch):
    """It is left out where the sum of updates tells, as it is where each is looked at, in several runs of one program as well."""
    data, states = clients("nan"), []
    for sum_tells in (False, True):
        monkeypatch.setattr(Trainer, "_sum_tells", lambda *_, tells=sum_tells: tells)
        sizes = dict(cohort_size=CLIENTS, batch_size=BATCH, local_steps=1, solo_examples=0)
        optimizers = dict(client_optimizer=optax.sgd(0.3), server_optimizer=optax.sgd(1.0))
        alg = federated_moe(model(), finite, aligner=aligner("random"), engine=engine, **sizes, **optimizers, **options)
        state, info = (alg.step if runs == 1 else together(alg.step, runs))(alg.init(KEY, data), data)
        assert info.rejected_updates == 1 and np.isfinite(info.train_loss)
        states.append(state)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(weights(states[1])))
    close(*states)


def test_only_updates_much_larger_than_their_sum_are_told_by_it():
    rows, trainer = jnp.zeros((30, 4)), made(aligner=aligner()).parts.trainer
    assert trainer._sum_tells(rows, jnp.zeros(11)) and not trainer._sum_tells(rows, jnp.zeros(12))
    assert not made(aligner=aligner(), reject_above=2.0).parts.trainer._sum_tells(rows, jnp.zeros(1))
    assert not made(aligner=aligner(), control_variates=True).parts.trainer._sum_tells(rows, jnp.zeros(1))
    assert not made(aligner=aligner(), aggregator=aggregation.median()).parts.trainer._sum_tells(rows, jnp.zeros(1))


def test_what_is_absurd_is_rejected_like_what_is_not_finite_bit_for_bit():
    alg = made(aligner=aligner("greedy"), reject_above=100.0, router="statistics", solo_examples=BATCH)
    results = {}
    for what in ("nan", "1e30", "honest"):
        state, info = run(alg, clients(what), 2)
        results[what] = (state, info)
        assert info.rejected_updates == (what != "honest")
    same(results["nan"], results["1e30"])
    floats = [leaf for leaf in jax.tree.leaves(results["1e30"]) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert all((np.abs(leaf) < 1e6).all() for leaf in floats)
    assert distance(weights(results["nan"][0]), weights(results["honest"][0])) > 0


RANDOM = aligner("random")
RULES = dict(median=aggregation.median(), multi_krum=aggregation.krum(byzantine=0.1, keep=None))


@pytest.mark.parametrize("name", ["median", pytest.param("multi_krum", marks=pytest.mark.slow)])
def test_a_rule_keeps_the_model_where_honest_clients_take_it(name):
    alg = made(aligner=RANDOM, aggregator=RULES[name], solo_examples=0)
    start = alg.init(KEY, clients("honest"))
    honest = run(alg, clients("honest"), 3)[0]
    moved = distance(weights(honest), weights(start))
    for what in ("sign", "1e30"):
        state, info = run(alg, clients(what), 3)
        assert info.rejected_updates == 0 and distance(weights(state), weights(honest)) < 0.3 * moved
    assert moved > 0.01


@pytest.mark.slow
def test_one_wrong_sign_in_a_hundred_hardly_moves_the_mean_and_one_absurd_value_destroys_it():
    alg = made(aligner=RANDOM, solo_examples=0)
    start, honest = alg.init(KEY, clients("honest")), run(alg, clients("honest"), 3)[0]
    moved = distance(weights(honest), weights(start))
    assert distance(weights(run(alg, clients("sign"), 3)[0]), weights(honest)) < 0.15 * moved
    assert distance(weights(run(alg, clients("1e30"))[0]), weights(start)) > 1e20


def test_chunks_change_rounding_only():
    options = dict(aligner=RANDOM, aggregator=RULES["median"], solo_examples=0)
    whole, chunked = (run(made(**options, **chunk), clients("sign"), 2)[0] for chunk in ({}, dict(chunk_size=33)))
    close(weights(chunked), weights(whole), atol=1e-5)


@pytest.mark.slow
def test_personal_routers_go_with_a_rule():
    options = dict(aggregator=aggregation.trimmed_mean(share=0.2), cohort_size=5, router="personal")
    whole, chunked = (run(algorithm(chunk_size=size, **options), population(), 2)[0] for size in (5, 2))
    close((weights(chunked), chunked.personal), (weights(whole), whole.personal), atol=1e-5)


@pytest.mark.parametrize(("value", "engine"), [(0.0, "auto"), (float("nan"), "auto"), (-1.0, "primal"), (10.0, "dual")])
def test_a_wrong_threshold_is_named(value, engine):
    message = "engine: 'dual' cannot serve, since reject_above looks at" if engine == "dual" else f"reject_above is {value}, it must be"
    with pytest.raises(ValueError, match=message):
        algorithm(reject_above=value, engine=engine)
    with pytest.raises(ValueError, match="the aggregator needs deltas"):
        algorithm(aggregator=aggregation.median(), engine="dual")


def test_a_clipped_update_has_at_most_its_norm_in_all_that_is_sent():
    draw, number, slots = np.random.default_rng(0), 5, 2
    zeros = {"w": jnp.zeros((EXPERTS, 3))}, {"v": jnp.zeros(4)}
    encoder = aggregation.chain(aggregation.clip(norm=2.0), aggregation.mean()).encoder
    size = jnp.array([0.01, 1.0, 10.0, 1e30, 1.0])
    experts = jnp.array(draw.normal(size=(number, slots, 3)), jnp.float32) * size[:, None, None]
    shared = jnp.array(draw.normal(size=(number, 4)), jnp.float32) * size[:, None]
    held = jnp.array([[0, 1]] * 4 + [[2, NO_EXPERT]])
    tokens = jnp.ones((number, slots), jnp.int32).at[2, 1].set(0).at[4, 1].set(0)
    update = ClientUpdate({"v": shared}, {"w": experts}, held, jnp.ones(number, jnp.int32), tokens)
    assert encoder.init(*zeros, 9, 0.0) is None and encoder.num_bytes(10, 32) == 40
    good, names = jnp.ones(number, bool), (None,)
    sent, _ = jax.jit(lambda *args: encoder.apply(None, *args, names))(
        client_keys(KEY, jnp.arange(number)), jnp.arange(number), good, update
    )
    for row in range(number):
        parts = np.where(np.asarray(tokens[row])[:, None] > 0, experts[row], 0).astype(float), np.asarray(shared[row], float)
        norm = np.sqrt(sum((part**2).sum() for part in parts))
        np.testing.assert_allclose(sent.experts["w"][row], parts[0] * min(1, 2 / norm), rtol=1e-5)
        np.testing.assert_allclose(sent.shared["v"][row], parts[1] * min(1, 2 / norm), rtol=1e-5)


def test_a_clip_comes_first_and_goes_with_any_rule():
    clip, quantize = aggregation.clip(norm=1.0), aggregation.quantize()
    made = aggregation.chain(clip, aggregation.sparsify(share=0.5), quantize, aggregation.median())
    assert made.collects and made.needs == "deltas" and made.encoder.num_bytes(100, 32) == 50 + 4 + 100 // 8 + 1
    with pytest.raises(ValueError, match="chain has quantize before clip, it must come after it"):
        aggregation.chain(quantize, clip, aggregation.mean())


def test_a_configuration_names_a_rule():
    base = TrainConfig(clip_norm=3.0)
    for name in ("mean", "median", "trimmed_mean", "krum", "multi_krum", "geometric_median"):
        rule = named.aggregator(dataclasses.replace(base, aggregator=name))
        assert rule.encoder is not None and rule.collects == (name != "mean")
    assert named.aggregator(TrainConfig()).needs == "sum"
