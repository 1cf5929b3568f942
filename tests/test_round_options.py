"""Options of a round: personal routers, local steps, proximal term, optimizers by round, deadlines, and wrong arguments."""

import dataclasses
from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from small_round import BATCH, CLIENTS, EXPERTS, KEY, SIZES, algorithm, aligner, distance, model, population, run, weights

from fedmoe_jax import aggregation, alignment, partition, sampling
from fedmoe_jax.base import stage_key
from fedmoe_jax.experts import RouterParam
from fedmoe_jax.local import primal
from fedmoe_jax.local.cost import round_cost
from fedmoe_jax.local.primal import local_batch, num_processed, num_steps
from fedmoe_jax.models.losses import cross_entropy


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


def test_batches_are_the_same_whether_all_orders_are_drawn_at_once(monkeypatch):
    data, steps = population(), jnp.arange(3 * -(-max(SIZES) // BATCH))
    found = []
    for most in (0, 1 << 12):
        monkeypatch.setattr(primal, "_AT_ONCE", most)
        drawn = jax.jit(jax.vmap(lambda client: jax.vmap(primal.local_batches(KEY, data, client, len(steps), BATCH))(steps)))
        found.append(drawn(jnp.arange(len(SIZES))))
    jax.tree.map(np.testing.assert_array_equal, *found)
    for client, step in ((0, 0), (1, 2), (len(SIZES) - 1, len(steps) - 1)):
        one = local_batch(KEY, data, jnp.int32(client), step, BATCH)
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(itemgetter((client, step)), found[1]), one)


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


@pytest.mark.parametrize("prox_on", ["all", "shared", "router"])
def test_prox_pulls_the_part_that_it_is_on(prox_on):
    data, alg = population(), {}
    options = dict(client_optimizer=optax.sgd(0.1), local_steps=20, router_prior=0.0)
    for prox in (0.0, 10.0):
        alg = algorithm(prox=prox, prox_on=prox_on, **options)
        start, (state, _) = alg.init(KEY, data), run(alg, data)
        routers, others = (nnx.split_state(tree.experts, RouterParam, ...) for tree in (start, state)), (start.shared, state.shared)
        (rows, kept), (new_rows, new_kept) = routers
        here = np.array([distance(rows, new_rows), distance(kept, new_kept), distance(*others)])
        plain = here if prox == 0.0 else plain
    pulled = {"all": [True, True, True], "shared": [False, False, True], "router": [True, False, False]}[prox_on]
    assert ((here < 0.4 * plain) == pulled).all(), (here, plain)


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
        (dict(aggregator=aggregation.median(), control_variates=True), "control_variates: what clients return for it is summed"),
        (dict(aggregator=aggregation.median(), router="statistics"), "router 'statistics': what clients return for it is summed"),
        (
            dict(aggregator=aggregation.median(), personal_budget_bytes=1.0),
            "aggregator keeps the updates of a cohort of 5, which takes",
        ),
        (dict(prox_on="experts"), "prox_on is 'experts', it must be 'all', 'shared' or 'router'"),
        (dict(deadline=0.0), "deadline is 0.0"),
        (dict(router="other"), "router is 'other', it must be 'shared', 'personal' or 'statistics'"),
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


@pytest.mark.parametrize(("name", "probes", "most"), [pytest.param("random", 0, 2, marks=pytest.mark.slow), ("greedy", 1, 1)])
def test_the_deadline_has_room_for_probes(name, probes, most):
    data = population()
    batch = jax.eval_shape(lambda: data.batch(jnp.int32(0), jnp.arange(BATCH)))
    cost = round_cost(partition(model()), cross_entropy, optax.sgd(0.3), batch)
    slow = dataclasses.replace(data.profile, downlink_bytes_per_second=jnp.full(CLIENTS, float(cost.expert_bytes)))  # one expert a second
    shared = float(cost.shared_bytes / cost.expert_bytes)
    options = dict(aligner=aligner(name), cohort_size=CLIENTS, deadline=shared + 2.5, solo_examples=BATCH)
    _, info = run(algorithm(**options), dataclasses.replace(data, profile=slow))
    assert info.load.sum() == most * CLIENTS and info.simulated_seconds <= shared + 2.5
    assert info.bytes_down - info.bytes_up == probes * CLIENTS * cost.expert_bytes


def test_clients_too_slow_for_the_deadline_are_dropped():
    data = population()
    slow = dataclasses.replace(data.profile, uplink_bytes_per_second=data.profile.uplink_bytes_per_second.at[:4].set(1e-3))
    _, info = run(algorithm(cohort_size=CLIENTS, deadline=1.0), dataclasses.replace(data, profile=slow))
    assert info.dropped_clients == 4 and info.clients == 4 and info.simulated_seconds <= 1


def test_a_round_tells_by_how_many_clients_the_bounds_of_load_were_missed():
    far = alignment.load.monitor()._replace(bounds=lambda state, slots, wanted: (jnp.full(EXPERTS, CLIENTS), jnp.full(EXPERTS, CLIENTS)))
    made = alignment.balanced(num_experts=EXPERTS, max_slots=2, load=far)
    _, info = run(algorithm(aligner=made, cohort_size=CLIENTS), population())
    assert info.load_violation == CLIENTS * (EXPERTS - 2)
