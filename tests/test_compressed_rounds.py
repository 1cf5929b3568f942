"""Rounds with compressed updates and a quantised broadcast: what they reduce to, what travels, who keeps what, and resume."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from small_groups import Net
from small_round import BATCH, CLIENTS, EXPERTS, KEY, algorithm, aligner, population, run, weights
from test_round import close, same

from fedmoe_jax import ClientProfile, aggregation, partition, sampling
from fedmoe_jax.aggregation.compression import received
from fedmoe_jax.alignment import capacity
from fedmoe_jax.experts import RouterParam, groups, num_experts
from fedmoe_jax.local.cohort import batch_shape
from fedmoe_jax.local.cost import expert_bytes, round_cost
from fedmoe_jax.models.losses import cross_entropy
from fedmoe_jax.training import named, setup
from fedmoe_jax.training.checkpoint import Checkpoints
from fedmoe_jax.training.config import TrainConfig

BROKEN, COHORT, ROUNDS = 2, 5, 4
UP = aggregation.sparsify(share=0.3), aggregation.quantize(bits=4, rotate=True)
DOWN = aggregation.quantize(bits=8)
FITTING = dict(aligner=aligner("greedy"), solo_examples=BATCH, cohort_size=COHORT)
EVERYTHING = dict(router="personal", broadcast=DOWN, cohort_size=COHORT)


@functools.cache
def compressed(chunk_size=2):
    return algorithm(aggregator=aggregation.chain(*UP, aggregation.mean()), chunk_size=chunk_size, **EVERYTHING)


@functools.cache
def played():
    """States and Infos of a few rounds in which one client is always rejected."""
    data, made = population(broken=[BROKEN]), compressed()
    states, infos = [made.init(KEY, data)], []
    for _ in range(ROUNDS):
        state, info = made.step(states[-1], data)
        states.append(state)
        infos.append(info)
    return states, infos


def _anywhere(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_anywhere(jax.random.key_data(leaf)))
    return jnp.asarray(np.asarray(leaf))


def rows(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def test_only_who_was_there_and_accepted_keeps_something_new():
    states, infos = played()
    router, others = nnx.split_state(states[0].experts, RouterParam, ...)
    assert len(rows(states[0].residuals[0])) == len(rows(others)) and rows(router)  # personal rows do not travel
    assert all(np.isfinite(leaf).all() for leaf in rows((weights(states[-1]), states[-1].residuals)))
    rejected = 0
    for round, (before, after, info) in enumerate(zip(states, states[1:], infos, strict=False)):
        cohort = np.asarray(sampling.of_round(KEY, jnp.int32(round), CLIENTS, COHORT))
        rejected += int(info.rejected_updates)
        for old, new in zip(rows(before.residuals[0]), rows(after.residuals[0]), strict=True):
            changed = (old != new).reshape(CLIENTS, EXPERTS, -1).any(2)
            assert set(np.flatnonzero(changed.any(1))) <= set(cohort.tolist()) - {BROKEN} and changed.sum(1).max() <= 2
        for old, new in zip(rows(before.residuals[1]), rows(after.residuals[1]), strict=True):
            changed = np.flatnonzero((old != new).reshape(CLIENTS, -1).any(1))
            assert set(changed) <= set(cohort.tolist()) - {BROKEN}
        if round == 0:
            moved = np.any([(leaf != 0).reshape(CLIENTS, -1).any(1) for leaf in rows(after.residuals[1])], axis=0)
            assert set(np.flatnonzero(moved)) == set(cohort.tolist()) - {BROKEN}
    assert rejected > 0


def test_bytes_are_those_of_each_tensor():
    states, infos = played()
    others = [leaf[0] for leaf in rows(nnx.split_state(states[0].experts, RouterParam, ...)[1])]
    shared = rows(states[0].shared)
    up = lambda tree: sum(-(-_bits(leaf.size) // 8) for leaf in tree)  # noqa: E731

    def _bits(size):
        number = int(np.ceil(0.3 * size))
        padded = 2 ** int(np.ceil(np.log2(number)))
        return 4 * padded + 32 + min(size, number * int(np.ceil(np.log2(size))))

    down = lambda tree: sum(leaf.size + 4 for leaf in tree)  # noqa: E731
    assert infos[0].bytes_up == COHORT * up(shared) + int(infos[0].load.sum()) * up(others)
    assert infos[0].bytes_down == COHORT * down(shared) + int(infos[0].load.sum()) * down(others)  # nobody has a copy yet
    assert all(info.bytes_down <= infos[0].bytes_down for info in infos)


@pytest.mark.slow
def test_chunks_change_rounding_only():
    states, _ = played()
    state, _ = run(compressed(chunk_size=COHORT), population(broken=[BROKEN]), 2)
    close((weights(state), state.residuals), (weights(states[2]), states[2].residuals), atol=1e-5)


def test_a_restored_run_goes_on_bit_for_bit(tmp_path):
    states, infos = played()
    data = population(broken=[BROKEN])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, states[2])
        done, state, _ = checkpoints.restore(states[0])
    state = jax.tree.map(_anywhere, state)  # so that the step is not compiled again
    assert done == 2 and any(leaf.any() for leaf in rows(state.residuals))
    for _ in range(2):
        state, info = compressed().step(state, data)
    same(state, states[4])
    same(info, infos[3])


def test_all_values_as_they_are_is_no_compression_bit_for_bit():
    data, (_, _, uncompressed) = population(broken=[BROKEN]), broadcasting("shared")
    whole = aggregation.chain(aggregation.sparsify(share=1.0), aggregation.mean())
    plain, info = run(uncompressed, data, 2)
    state, other = run(algorithm(aggregator=whole, **FITTING), data, 2)
    assert not any(leaf.any() for leaf in rows(state.residuals))
    same((info, dataclasses.replace(state, residuals=None)), (other, plain))


@functools.cache
def broadcasting(router):
    """A state after two rounds with a broadcast, its algorithm, and the same one without broadcast."""
    made, plain = algorithm(broadcast=DOWN, router=router, **FITTING), algorithm(router=router, **FITTING)
    return run(made, population(), 2)[0], made, plain


@pytest.mark.parametrize("router", ["shared", pytest.param("statistics", marks=pytest.mark.slow)])
def test_clients_start_from_what_they_receive_and_the_server_from_what_it_has(router):
    state, made, plain = broadcasting(router)
    arrived = received(DOWN, state.key, state.round, *weights(state), state.last_trained)
    for exact, got in zip(rows(weights(state)), rows(arrived), strict=True):
        assert np.abs(exact - got).max() <= np.abs(exact).max() / 127 * 1.001
    after, info = made.step(state, population())
    other, plain_info = plain.step(dataclasses.replace(state, experts=arrived[0], shared=arrived[1]), population())
    moved = jax.tree.map(jnp.subtract, weights(after), weights(state))
    close(moved, jax.tree.map(jnp.subtract, weights(other), arrived), atol=1e-5)
    assert any(np.abs(leaf).max() > 1e-2 for leaf in rows(moved))
    close((after.aligner, after.statistics), (other.aligner, other.statistics))  # solo evaluation, probes and statistics
    np.testing.assert_allclose(info.train_loss, plain_info.train_loss, rtol=1e-5)
    assert info.bytes_up == plain_info.bytes_up and info.bytes_down < 0.4 * plain_info.bytes_down
    assert info.simulated_seconds < plain_info.simulated_seconds


def test_an_expert_that_nobody_trained_arrives_as_the_same_bits():
    parts, receive = partition(Net()), jax.jit(functools.partial(received, DOWN))
    trained = jnp.array([3, -1, 4, 2, 0, 0, 5, 1])  # of two groups
    first = receive(KEY, jnp.int32(5), parts.experts, parts.shared, trained)
    second = receive(KEY, jnp.int32(7), parts.experts, parts.shared, trained.at[2].set(6))
    drawn_anew = []
    for (path, old), new in zip(jax.tree_util.tree_flatten_with_path(first[0])[0], rows(second[0]), strict=True):
        changed = np.flatnonzero((np.asarray(old) != new).reshape(EXPERTS, -1).any(1)).tolist()
        drawn_anew += [(".0." in jax.tree_util.keystr(path, simple=True, separator="."), expert) for expert in changed]
    assert set(drawn_anew) == {(True, 2)}
    assert any((old != new).any() for old, new in zip(rows(first[1]), rows(second[1]), strict=True))  # as the shared part of each round
    scaled = jax.tree.map(lambda leaf: leaf.at[0].multiply(100.0), parts.experts)
    third = receive(KEY, jnp.int32(5), scaled, parts.shared, trained)
    for old, new in zip(rows(first[0]), rows(third[0]), strict=True):  # each expert has a scale of its own
        np.testing.assert_array_equal(old[1:], new[1:])


@pytest.mark.slow
def test_the_dual_engine_serves_a_broadcast():
    options = dict(broadcast=DOWN, client_optimizer=optax.sgd(0.1))
    primal, dual = (run(algorithm(engine=engine, **options), population(), 2)[0] for engine in ("primal", "dual"))
    close(weights(dual), weights(primal), atol=1e-5)


@pytest.mark.slow
def test_compressed_training_learns_about_as_well():
    few = aggregation.chain(aggregation.sparsify(share=0.2), aggregation.quantize(), aggregation.mean())
    ends = [run(algorithm(cohort_size=CLIENTS, **options), population(), 60)[1] for options in ({}, dict(aggregator=few))]
    assert ends[1].train_loss < 1.2 * ends[0].train_loss + 0.05


def test_two_groups_have_bytes_of_their_own_and_seconds_follow_each_direction():
    parts, batch = partition(Net()), batch_shape(population(), BATCH)
    by_hand = [0, 0]
    for variable in jax.tree.leaves(parts.experts, is_leaf=lambda node: isinstance(node, nnx.Variable)):
        by_hand[groups(parts.experts).index(variable.group)] += variable[...].size // num_experts(parts.experts) + 4
    assert expert_bytes(parts.experts, num_bytes=DOWN.num_bytes) == tuple(by_hand)
    cost = round_cost(parts, cross_entropy, optax.sgd(0.1), batch, down=DOWN.num_bytes)
    other = round_cost(parts, cross_entropy, optax.sgd(0.1), batch, up=DOWN.num_bytes)
    plain = round_cost(parts, cross_entropy, optax.sgd(0.1), batch)
    assert cost.expert_bytes == other.expert_bytes_up == sum(by_hand) and cost.up == (plain.shared_bytes, plain.expert_bytes)
    assert other.shared_bytes == plain.shared_bytes and cost.shared_bytes == other.shared_bytes_up < plain.shared_bytes
    fast = jnp.full(1, 1e30)
    links = ClientProfile(fast, fast, jnp.ones(1), fast), ClientProfile(fast, fast, fast, jnp.ones(1))
    for profile, quick, slow in zip(links, (cost, other), (other, cost), strict=True):
        slots = jnp.array([2])
        np.testing.assert_allclose(capacity.seconds(profile, slow, slots), plain.shared_bytes + 2 * plain.expert_bytes)
        np.testing.assert_allclose(capacity.seconds(profile, quick, slots), cost.shared_bytes + 2 * cost.expert_bytes)


def test_what_does_not_go_together_is_refused():
    chained = aggregation.chain(aggregation.quantize(), aggregation.mean())
    for options in (dict(aggregator=chained), dict(broadcast=DOWN)):
        with pytest.raises(ValueError, match="control_variates travel as they are: they go neither with a broadcast nor with"):
            algorithm(control_variates=True, **options)
    with pytest.raises(ValueError, match=r"broadcast must be aggregation.quantize\(...\): a client needs every weight"):
        algorithm(broadcast=aggregation.sparsify())
    with pytest.raises(ValueError, match="engine: 'dual' cannot serve, since the aggregator needs deltas of each client"):
        algorithm(aggregator=chained, engine="dual")
    (choice, *_) = algorithm(aggregator=chained, engine="auto").plan(population())
    assert choice.use is None and choice.reason == "the aggregator needs deltas of each client"
    with pytest.raises(
        ValueError,
        match=r"sparsify with error_feedback \(compress_share\) keeps a residual of the whole model",
    ):
        algorithm(aggregator=aggregation.chain(*UP, aggregation.mean()), personal_budget_bytes=1e3).init(KEY, population())


def test_a_configuration_says_what_travels():
    config = TrainConfig(population=20, cohort=5, experts=4, model_options={"hidden": 16})
    assert named.aggregator(config).encoder is None and named.broadcast(config) is None
    asked = dataclasses.replace(config, compress_bits=8, compress_share=0.1, broadcast_bits=4, rotate=True)
    assert named.aggregator(asked).encoder.num_bytes(1000, 32) == 128 + 4 + 1000 // 8
    assert named.broadcast(asked).num_bytes(1000, 32) == 512 + 4
    only = dataclasses.replace(config, compress_bits=8)
    assert named.aggregator(only).encoder.num_bytes(1000, 32) == 1004
    made = setup.build(only)
    plain, cost = round_cost(made.parts, made.loss_fn, optax.sgd(0.3), batch_shape(made.population, 16)), made.cost()
    assert cost.expert_bytes == plain.expert_bytes and cost.up[1] < 0.3 * plain.expert_bytes
    state = jax.eval_shape(made.algorithm(1).init, KEY, made.population)
    assert state.residuals is None
