"""Tests of a whole round by what it must reduce to: FedAvg, one centralised step, nothing at all, itself in another order."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.extend import core

from fedmoe_jax import ClientProfile, Population, alignment, federated_moe, partition, rounds, sampling
from fedmoe_jax.base import client_keys, stage_key
from fedmoe_jax.local.cost import count_flops, round_cost
from fedmoe_jax.local.primal import local_batch, num_processed, num_steps
from fedmoe_jax.models import create
from fedmoe_jax.models.losses import cross_entropy

FEATURES, CLASSES, EXPERTS, CLIENTS, BATCH = 6, 3, 4, 8, 4
SIZES = (3, 9, 4, 1, 7, 5, 8, 2)
KEY = jax.random.key(0)


def model(num_experts=EXPERTS, top_k=1, **options):
    small = dict(hidden=8, expert_hidden=6, balance_weight=0.0, z_weight=0.0)
    shape = dict(input_shape=(FEATURES,), num_classes=CLASSES, num_experts=num_experts, top_k=top_k, seed=0)
    return create("mlp", **shape, **(small | options))


def population(memory_bytes=1e9, sizes=SIZES, broken=()):
    """Clients of unequal sizes; those in `broken` have NaN features."""
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(sum(sizes), FEATURES)).astype(np.float32), draw.integers(0, CLASSES, sum(sizes))
    owned = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    for client in broken:
        x[owned[client]] = np.nan
    fast = jnp.full(len(sizes), 1e9)
    return Population.from_arrays(x, y, owned, ClientProfile(fast, jnp.full(len(sizes), float(memory_bytes)), fast, fast))


def aligner(name="random", num_experts=EXPERTS, max_slots=2):
    return getattr(alignment, name)(num_experts=num_experts, max_slots=max_slots)


def algorithm(of=None, **options):
    defaults = dict(client_optimizer=optax.sgd(0.3), server_optimizer=optax.sgd(1.0), cohort_size=5, batch_size=BATCH)
    options = defaults | {"aligner": options.get("aligner") or aligner(), "solo_examples": 0} | options
    if "local_steps" not in options:
        options.setdefault("local_epochs", 1)
    return federated_moe(model() if of is None else of, cross_entropy, **options)


def run(alg, data, count=1, key=KEY):
    """The state and the last Info after `count` rounds, step by step."""
    state = alg.init(key, data)
    for _ in range(count):
        state, info = alg.step(state, data)
    return state, info


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, _bits(a), _bits(b))


def close(a, b, atol=2e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=atol), _bits(a), _bits(b))


def _bits(tree):
    keys = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if keys(leaf) else leaf, tree)


def weights(state):
    return state.experts, state.shared


def distance(a, b):
    return sum(float(((x - y) ** 2).sum()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)) ** 0.5


def fedavg(start, data, key, client_lr, cohort_size):
    """One round of FedAvg of the whole model (McMahan et al., 2017), client by client; returns (experts, shared)."""
    parts = partition(start)

    @jax.jit
    def gradient(now, batch):
        def loss(now):
            values, _ = cross_entropy(nnx.merge(parts.graphdef, *now, parts.rest, copy=True), batch, KEY)
            return jnp.where(batch.mask, values, 0).sum() / batch.mask.sum()

        return jax.grad(loss)(now)

    cohort = sampling.cohort(stage_key(key, "cohort"), data.num_clients, cohort_size)
    keys = client_keys(stage_key(key, "local"), cohort)
    received = (parts.experts, parts.shared)
    total, count = jax.tree.map(jnp.zeros_like, received), 0
    for client, client_key in zip(cohort, keys, strict=True):
        now, size = received, int(data.num_examples(client))
        for step in range(-(-size // BATCH)):
            grads = gradient(now, local_batch(jax.random.fold_in(client_key, 0), data, client, step, BATCH))
            now = jax.tree.map(lambda w, g: w - client_lr * g, now, grads)
        total = jax.tree.map(lambda t, w, size=size: t + size * w, total, now)
        count += size
    return jax.tree.map(lambda t: t / count, total)


def test_every_client_with_every_expert_is_fedavg():
    start, data = model(top_k=EXPERTS), population()
    state, info = run(algorithm(start, aligner=alignment.full(num_experts=EXPERTS)), data)
    expected = fedavg(start, data, jax.random.fold_in(KEY, 0), 0.3, 5)
    close(weights(state), expected)
    assert distance(weights(state), tuple(partition(start)[1:3])) > 0.1
    assert info.coverage == 1 and info.load_cv == 0 and info.clients == 5


def test_one_full_batch_step_of_everyone_is_one_centralised_step():
    start, data = model(top_k=EXPERTS), population()
    options = dict(aligner=alignment.full(num_experts=EXPERTS), cohort_size=CLIENTS, batch_size=max(SIZES), local_steps=1)
    state, info = run(algorithm(start, **options), data)
    parts = partition(start)

    def pooled(now):
        logits = nnx.merge(parts.graphdef, *now, parts.rest, copy=True)(data.x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, data.y).mean()

    now = (parts.experts, parts.shared)
    loss, grads = jax.value_and_grad(pooled)(now)
    close(weights(state), jax.tree.map(lambda w, g: w - 0.3 * g, now, grads))
    np.testing.assert_allclose(info.train_loss, loss, rtol=1e-5)


def test_nobody_present_changes_nothing():
    data = population(memory_bytes=1)
    alg = algorithm(server_optimizer=optax.adam(0.1))
    state, info = run(alg, data, 2)
    same(weights(state), weights(alg.init(KEY, data)))
    assert info.clients == 0 and info.dropped_clients == 5 and info.bytes_up == 0 and info.load.sum() == 0
    assert np.isfinite([info.train_loss, info.load_cv, info.load_cv_total, info.simulated_seconds]).all()


def test_clients_without_slots_train_the_shared_part_only():
    batch = jax.eval_shape(lambda: population().batch(jnp.int32(0), jnp.arange(BATCH)))
    cost = round_cost(partition(model()), cross_entropy, optax.sgd(0.3), batch)
    data = population(memory_bytes=float(cost.shared_memory + 0.5 * cost.expert_memory))
    alg = algorithm()
    state, info = run(alg, data, 2)
    start = alg.init(KEY, data)
    same(state.experts, start.experts)
    assert info.clients == 5 and info.coverage == 0 and distance(state.shared, start.shared) > 0


@pytest.mark.parametrize("router", ["shared", "personal"])
def test_chunks_change_nothing_but_rounding(router):
    data = population()
    options = dict(aligner=aligner("balanced"), router=router, router_prior=0.5, solo_examples=BATCH)
    whole, chunked = (run(algorithm(chunk_size=size, **options), data, 2) for size in (None, 3))
    close(whole, chunked, atol=1e-5)


@pytest.mark.parametrize("name", ["random", "greedy", "balanced"])
def test_the_order_of_the_cohort_changes_nothing_but_rounding(name, monkeypatch):
    data, plain = population(), sampling.cohort
    options = dict(aligner=aligner(name), solo_examples=BATCH, router_prior=0.5)
    expected = run(algorithm(**options), data, 2)
    monkeypatch.setattr(sampling, "cohort", lambda *args: plain(*args)[jnp.array([3, 0, 4, 2, 1])])
    close(run(algorithm(**options), data, 2), expected, atol=1e-5)


def test_a_run_is_traced_once_also_with_a_shorter_last_block():
    calls = []
    counted = aligner()

    def align(*args):
        calls.append(1)
        return counted.align(*args)

    data = population()
    alg = algorithm(aligner=counted._replace(align=align))
    state, block = alg.init(KEY, data), rounds(alg.step, 3)
    for count in (3, 3, 2):
        state, _ = block(state, data, count)
    assert len(calls) == 1 and state.round == 8


def test_blocks_equal_single_steps_and_a_seed_gives_the_same_bits():
    data, alg = population(), algorithm(aligner=aligner("balanced"))
    block = rounds(alg.step, 4)
    state, infos = block(alg.init(KEY, data), data, 3)
    again, _ = block(alg.init(KEY, data), data, 3)
    same(state, again)
    steps, last = run(alg, data, 3)
    close(state, steps)
    close(jax.tree.map(lambda rows: rows[2], infos), last)
    assert all((np.asarray(rows[3]) == 0).all() for rows in jax.tree.leaves(infos))
    other, _ = block(alg.init(jax.random.key(1), data), data, 3)
    assert distance(weights(other), weights(state)) > 1e-3


def _shapes(jaxpr):
    """Shapes of every intermediate of a program, loops and calls included."""
    for equation in jaxpr.eqns:
        yield from (tuple(v.aval.shape) for v in equation.outvars if hasattr(v.aval, "shape"))
        inner = jax.tree.leaves(equation.params, is_leaf=lambda p: isinstance(p, core.Jaxpr | core.ClosedJaxpr))
        for value in inner:
            if isinstance(value, core.Jaxpr | core.ClosedJaxpr):
                yield from _shapes(getattr(value, "jaxpr", value))


def test_a_client_costs_its_slots_not_the_experts():
    data, flops, slots = population(), {}, 4
    for experts in (4, 64):
        options = dict(aligner=aligner(num_experts=experts, max_slots=slots), cohort_size=CLIENTS, local_steps=2)
        alg = algorithm(model(experts), **options)
        state = alg.init(KEY, data)
        flops[experts] = count_flops(alg.step, state, data)
    assert flops[64] <= 1.1 * flops[4]
    shapes = set(_shapes(jax.make_jaxpr(alg.step)(state, data).jaxpr))
    assert (CLIENTS, slots, 8, 6) in shapes  # the weights of the slots of each client: the walk sees them
    assert not [shape for shape in shapes if 64 in shape and np.prod(shape) >= CLIENTS * 64 * 8 * 6]


def test_a_client_with_broken_data_is_rejected():
    data = population(broken=[2])
    alg = algorithm(aligner=aligner("balanced"), cohort_size=CLIENTS, solo_examples=BATCH)
    state, info = run(alg, data)
    assert info.rejected_updates == 1
    floats = [leaf for leaf in jax.tree.leaves((state, info)) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert all(np.isfinite(leaf).all() for leaf in floats)
    assert distance(weights(state), weights(alg.init(KEY, data))) > 1e-3


def test_personal_router_rows_change_for_present_clients_and_held_experts_only():
    data = population()
    alg = algorithm(router="personal", cohort_size=3)
    start = alg.init(KEY, data)
    state, _ = alg.step(start, data)
    cohort = sampling.cohort(stage_key(jax.random.fold_in(KEY, 0), "cohort"), CLIENTS, 3)
    (before,), (after,) = jax.tree.leaves(start.personal), jax.tree.leaves(state.personal)
    assert before.shape == (CLIENTS, EXPERTS, 8)
    changed = np.asarray((before != after).any(-1))
    assert set(np.flatnonzero(changed.any(1))) <= set(np.asarray(cohort).tolist())
    assert 0 < changed.sum() <= 3 * 2 and changed.sum(1).max() <= 2


def test_the_router_of_the_global_model_is_the_mean_of_the_personal_ones_and_does_not_travel():
    data = population()
    options = dict(cohort_size=5, server_optimizer=optax.adam(0.1))
    state, info = run(algorithm(router="personal", **options), data, 3)
    (rows,) = jax.tree.leaves(state.personal)
    np.testing.assert_allclose(state.experts["moe"]["router"].get_value(), rows.mean(0), atol=1e-6)
    assert float(jnp.abs(rows - rows.mean(0)).max()) > 1e-5
    _, shared = run(algorithm(router="shared", **options), data, 3)
    assert shared.bytes_up - info.bytes_up == info.load.sum() * 8 * 4


def test_a_personal_router_must_fit_its_budget():
    needed = CLIENTS * EXPERTS * 8 * 4
    with pytest.raises(ValueError, match=f"router is 'personal', which takes {needed} bytes"):
        algorithm(router="personal", personal_budget_bytes=float(needed - 1)).init(KEY, population())
    algorithm(router="personal", personal_budget_bytes=float(needed)).init(KEY, population())


@pytest.mark.parametrize("local", [dict(local_epochs=3, local_steps=None), *(dict(local_epochs=None, local_steps=n) for n in (1, 2, 7))])
def test_examples_processed_are_those_in_the_batches(local):
    data = population()
    for client, size in enumerate(SIZES):
        steps = num_steps(jnp.int32(size), batch_size=BATCH, **local)
        masks = [local_batch(KEY, data, jnp.int32(client), step, BATCH).mask.sum() for step in range(int(steps))]
        assert num_processed(jnp.int32(size), batch_size=BATCH, **local) == sum(masks)


def test_prox_keeps_clients_near_what_they_received():
    data, moved = population(), {}
    for prox in (0.0, 10.0):
        alg = algorithm(prox=prox, client_optimizer=optax.sgd(0.1), local_steps=20)
        moved[prox] = distance(weights(run(alg, data)[0]), weights(alg.init(KEY, data)))
    assert 0 < moved[10.0] < 0.3 * moved[0.0]


def test_an_expert_that_nobody_trains_keeps_its_value_under_momentum():
    data = population()
    alg = algorithm(aligner=aligner(max_slots=1), cohort_size=2, server_optimizer=optax.sgd(1.0, momentum=0.9))
    state, waited = alg.init(KEY, data), 0
    for _ in range(6):
        new, info = alg.step(state, data)
        idle = np.asarray(info.tokens == 0)
        assert idle.any() and not idle.all()
        jax.tree.map(lambda a, b, idle=idle: np.testing.assert_array_equal(a[idle], b[idle]), new.experts, state.experts)
        waited += int((idle & np.asarray(state.last_trained >= 0)).sum())
        state = new
    assert waited > 0
    np.testing.assert_array_equal(info.staleness_max, (5 - state.last_trained).max())


def test_a_client_optimizer_may_depend_on_the_round():
    data = population()
    alg = algorithm(client_optimizer=lambda round: optax.sgd(jnp.where(round == 0, 0.0, 0.3)))
    start = alg.init(KEY, data)
    state, _ = alg.step(start, data)
    assert distance(weights(state), weights(start)) == 0
    assert distance(weights(alg.step(state, data)[0]), weights(start)) > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(local_steps=2, local_epochs=1), "local_epochs and local_steps: give exactly one"),
        (dict(local_epochs=None), "local_epochs and local_steps: give exactly one"),
        (dict(local_epochs=0), "local_epochs is 0"),
        (dict(local_steps=0), "local_steps is 0"),
        (dict(cohort_size=0), "cohort_size is 0"),
        (dict(batch_size=0), "batch_size is 0"),
        (dict(chunk_size=0), "chunk_size is 0"),
        (dict(prox=-1.0), "prox is -1.0"),
        (dict(prox=float("nan")), "prox is nan"),
        (dict(deadline=0.0), "deadline is 0.0"),
        (dict(router="other"), "router is 'other', it must be 'shared' or 'personal'"),
        (dict(router_prior=float("nan")), "router_prior is nan"),
        (dict(solo_examples=-1), "solo_examples is -1"),
        (dict(aligner=alignment.full(num_experts=EXPERTS + 1)), "aligner is for 5 experts, the model has 4"),
        (dict(aligner=aligner(num_experts=EXPERTS - 1)), "aligner is for 3 experts, the model has 4"),
        (dict(aligner=aligner()._replace(max_slots=5, num_experts=None)), "aligner gives up to 5 experts, the model has 4"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        algorithm(**options)


def test_a_cohort_larger_than_the_population_is_refused():
    with pytest.raises(ValueError, match=f"cohort_size is 9, it must be at most the population, {CLIENTS}"):
        algorithm(cohort_size=CLIENTS + 1).init(KEY, population())


def test_a_model_without_experts_is_refused():
    with pytest.raises(ValueError, match="no ExpertParam"):
        algorithm(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))


def test_the_deadline_has_room_for_probes():
    data = population()
    batch = jax.eval_shape(lambda: data.batch(jnp.int32(0), jnp.arange(BATCH)))
    cost = round_cost(partition(model()), cross_entropy, optax.sgd(0.3), batch)
    slow = dataclasses.replace(data.profile, downlink_bytes_per_second=jnp.full(CLIENTS, float(cost.expert_bytes)))  # one expert a second
    shared = float(cost.shared_bytes / cost.expert_bytes)
    for name, probes, most in (("random", 0, 2), ("balanced", 1, 1)):
        options = dict(aligner=aligner(name), cohort_size=CLIENTS, deadline=shared + 2.5, solo_examples=BATCH)
        _, info = run(algorithm(**options), dataclasses.replace(data, profile=slow))
        assert info.load.sum() == most * CLIENTS and info.simulated_seconds <= shared + 2.5
        assert info.bytes_down - info.bytes_up == probes * CLIENTS * cost.expert_bytes


def test_clients_too_slow_for_the_deadline_are_dropped():
    data = population()
    slow = dataclasses.replace(data.profile, uplink_bytes_per_second=data.profile.uplink_bytes_per_second.at[:4].set(1e-3))
    _, info = run(algorithm(cohort_size=CLIENTS, deadline=1.0), dataclasses.replace(data, profile=slow))
    assert info.dropped_clients == 4 and info.clients == 4 and info.simulated_seconds <= 1
