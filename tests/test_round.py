"""Tests of a whole round by what it must reduce to: FedAvg, one centralised step, nothing at all, itself in another order."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.extend import core
from small_round import BATCH, CLIENTS, EXPERTS, KEY, SIZES, algorithm, aligner, distance, model, population, run, weights

from fedmoe_jax import alignment, partition, rounds, sampling
from fedmoe_jax.base import client_keys, stage_key
from fedmoe_jax.local import plan
from fedmoe_jax.local.cost import count_flops, round_cost
from fedmoe_jax.local.primal import local_batch
from fedmoe_jax.models.losses import cross_entropy


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, _bits(a), _bits(b))


def close(a, b, atol=2e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=atol), _bits(a), _bits(b))


def _bits(tree):
    keys = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if keys(leaf) else leaf, tree)


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

    @jax.jit
    @jax.value_and_grad
    def pooled(now):
        logits = nnx.merge(parts.graphdef, *now, parts.rest, copy=True)(data.x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, data.y).mean()

    now = (parts.experts, parts.shared)
    loss, grads = pooled(now)
    close(weights(state), jax.tree.map(lambda w, g: w - 0.3 * g, now, grads))
    np.testing.assert_allclose(info.train_loss, loss, rtol=1e-5)


def test_nobody_present_changes_nothing():
    data = population(memory_bytes=1)
    alg = algorithm(server_optimizer=optax.adam(0.1))
    state, info = run(alg, data, 2)
    same(weights(state), weights(alg.init(KEY, data)))
    assert info.clients == 0 and info.dropped_clients == 5 and info.bytes_up == 0 and info.load.sum() == 0
    assert np.isnan(info.train_loss) and np.isfinite([info.load_cv, info.load_cv_total, info.simulated_seconds]).all()


def test_clients_without_slots_train_the_shared_part_only():
    batch = jax.eval_shape(lambda: population().batch(jnp.int32(0), jnp.arange(BATCH)))
    cost = round_cost(partition(model()), cross_entropy, optax.sgd(0.3), batch)
    data = population(memory_bytes=float(cost.shared_memory + 0.5 * cost.expert_memory))
    alg = algorithm()
    state, info = run(alg, data, 2)
    start = alg.init(KEY, data)
    same(state.experts, start.experts)
    assert info.clients == 5 and info.coverage == 0 and distance(state.shared, start.shared) > 0


@pytest.mark.parametrize(
    ("name", "router"), [("greedy", "personal"), *(pytest.param("balanced", r, marks=pytest.mark.slow) for r in ("shared", "personal"))]
)
def test_chunks_change_nothing_but_rounding(name, router):
    data = population()
    options = dict(aligner=aligner(name), router=router, router_prior=0.5, solo_examples=BATCH)
    whole, chunked = (run(algorithm(chunk_size=size, **options), data, 2) for size in (None, 3))
    close(whole, chunked, atol=1e-5)


def test_on_a_cpu_clients_train_in_chunks_that_its_cache_holds(monkeypatch):
    found, plain = [], plan.side_by_side
    monkeypatch.setattr(plan, "side_by_side", lambda *args, **sizes: found.append(plain(*args, **sizes)) or found[-1])
    data = population()
    whole = run(algorithm(), data, 2)
    monkeypatch.setattr(plan, "CACHE_BYTES", 0.0)
    close(run(algorithm(), data, 2), whole, atol=1e-5)
    assert set(found[:1] + found[-1:]) == {5, 1}


@pytest.mark.parametrize(
    "name", [pytest.param("random", marks=pytest.mark.slow), "greedy", pytest.param("balanced", marks=pytest.mark.slow)]
)
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
    assert len(calls) == 1 and state.round == 8 and block._cache_size() == 1


@pytest.mark.parametrize("name", ["greedy", pytest.param("balanced", marks=pytest.mark.slow)])
def test_blocks_equal_single_steps_and_a_seed_gives_the_same_bits(name):
    data, alg = population(), algorithm(aligner=aligner(name))
    block = rounds(alg.step, 4)
    state, infos = block(alg.init(KEY, data), data, 3)
    again, _ = block(alg.init(KEY, data), data, 3)
    same(state, again)
    whole, _ = rounds(alg.step, 3)(alg.init(KEY, data), data)
    close(whole, state)
    steps, last = run(alg, data, 3)
    assert alg.step._cache_size() == 1, "a round must not be compiled again"
    close(state, steps)
    close(jax.tree.map(lambda rows: rows[2], infos), last)
    assert all((np.asarray(rows[3]) == 0).all() for rows in jax.tree.leaves(infos))
    other, _ = block(alg.init(jax.random.key(1), data), data, 3)
    assert distance(weights(other), weights(state)) > 1e-3
    assert last.load_violation == 0
    total = np.asarray(steps.tokens)
    share, apart = total / total.sum(), np.abs(total[:, None] - total)
    evenness = dict(load_cv_total=total.std() / total.mean(), load_gini_total=apart.mean() / (2 * total.mean()))
    evenness |= dict(load_entropy_total=-(share * np.log(share)).sum() / np.log(EXPERTS), load_least_total=total.min() / total.mean())
    for field, value in (evenness | dict(assignment_value=last.fitness_mean * last.load.sum())).items():
        np.testing.assert_allclose(getattr(last, field), value, rtol=1e-4, err_msg=field)


def _made(jaxpr):
    """Shape and primitive of every intermediate of a program, loops and calls included."""
    for equation in jaxpr.eqns:
        inner = jax.tree.leaves(equation.params, is_leaf=lambda p: isinstance(p, core.Jaxpr | core.ClosedJaxpr))
        programs = [value for value in inner if isinstance(value, core.Jaxpr | core.ClosedJaxpr)]
        name = "a program" if programs else equation.primitive.name
        yield from ((tuple(v.aval.shape), name) for v in equation.outvars if hasattr(v.aval, "shape"))
        for value in programs:
            yield from _made(getattr(value, "jaxpr", value))


def test_a_client_costs_its_slots_not_the_experts():
    data, flops, slots = population(), {}, 4
    for experts in (4, 64):
        options = dict(aligner=aligner(num_experts=experts, max_slots=slots), cohort_size=CLIENTS, local_steps=2)
        alg = algorithm(model(experts), **options)
        state = alg.init(KEY, data)
        flops[experts] = count_flops(alg.step, state, data)
    assert flops[64] <= 1.1 * flops[4]
    shapes = {shape for shape, _ in _made(jax.make_jaxpr(alg.step)(state, data).jaxpr)}
    assert (CLIENTS, slots, 8, 6) in shapes  # the weights of the slots of each client: the walk sees them
    assert not [shape for shape in shapes if 64 in shape and np.prod(shape) >= CLIENTS * 64 * 8 * 6]


def test_a_million_clients_cost_no_more_than_a_thousand():
    """Nothing of the size of the population is made but states in which the rows of the cohort are replaced."""
    data, flops = population(), {}
    alg = algorithm(model(64), aligner=aligner("balanced", num_experts=64, max_slots=4))
    for number in (1000, 1_000_000):
        sizes = {CLIENTS: number, CLIENTS + 1: number + 1, len(data.order): 4 * number}
        large = jax.tree.map(lambda leaf, of=sizes: jax.ShapeDtypeStruct((of[len(leaf)], *leaf.shape[1:]), leaf.dtype), data)
        state = jax.eval_shape(alg.init, KEY, large)
        flops[number] = count_flops(alg.step, state, large)
    assert flops[1_000_000] == flops[1000]
    made = {name for shape, name in _made(jax.make_jaxpr(alg.step)(state, large).jaxpr) if max(shape, default=0) >= number}
    assert made == {"scatter", "a program"}


@pytest.mark.parametrize("engine", ["primal", "dual"])
def test_weights_stay_in_float32_where_layers_compute_in_bfloat16(engine):
    alg = algorithm(model(dtype=jnp.bfloat16), engine=engine)
    state = jax.eval_shape(alg.init, KEY, population())
    assert "bf16" in str(jax.make_jaxpr(alg.step)(state, population()))
    for leaf in jax.tree.leaves(jax.eval_shape(alg.step, state, population())[0]):
        assert not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.dtype == jnp.float32


@pytest.mark.parametrize(("name", "client"), [("greedy", 0), pytest.param("balanced", 2, marks=pytest.mark.slow)])
def test_a_client_with_broken_data_is_rejected(name, client):
    data = population(broken=[client])
    alg = algorithm(aligner=aligner(name), cohort_size=CLIENTS, solo_examples=BATCH)
    state, info = run(alg, data)
    assert info.rejected_updates == 1  # also where masked examples could be those of the first client
    floats = [leaf for leaf in jax.tree.leaves((state, info)) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert all(np.isfinite(leaf).all() for leaf in floats)
    assert distance(weights(state), weights(alg.init(KEY, data))) > 1e-3


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
