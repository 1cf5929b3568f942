"""Clients that are away, late or slower than their profiles, and experts that need not be downloaded again."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_round import BATCH, CLIENTS, EXPERTS, KEY, algorithm, aligner, distance, population, run, weights

from fedmoe_jax import cache
from fedmoe_jax.base import NO_EXPERT
from fedmoe_jax.conditions import Conditions, steady, varying


def fixed(available=(), slowdown=()):
    """Conditions that do not change, with {client: whether it is available} and {client: slowdown}."""
    there, slow = jnp.ones(CLIENTS, bool), jnp.ones(CLIENTS)
    for client, value in dict(available).items():
        there = there.at[client].set(value)
    for client, value in dict(slowdown).items():
        slow = slow.at[client].set(value)
    return Conditions(lambda key, round, client: (there[client], slow[client]))


def test_varying_draws_what_it_says_and_by_client():
    client = jnp.arange(2000)
    draw = jax.jit(varying(availability=0.7, speed_bias=0.5, speed_jitter=0.2).draw)
    (there, first), (again, second) = draw(KEY, jnp.int32(0), client), draw(KEY, jnp.int32(1), client)
    assert abs(there.mean() - 0.7) < 0.04 and abs((there & again).mean() - 0.49) < 0.05
    difference, mean = np.log(first) - np.log(second), (np.log(first) + np.log(second)) / 2
    assert abs(difference.std() - 0.2 * 2**0.5) < 0.02 and abs(mean.std() - (0.25 + 0.02) ** 0.5) < 0.03
    there_again, same = draw(KEY, jnp.int32(0), client[::-1])
    np.testing.assert_array_equal(same[::-1], first)
    np.testing.assert_array_equal(there_again[::-1], there)
    for draw in (steady().draw, varying().draw):
        there, slowdown = draw(KEY, jnp.int32(0), client)
        assert there.all() and (slowdown == 1).all()


@pytest.mark.parametrize(
    ("name", "value"), [("availability", 0.0), ("availability", 1.1), ("speed_bias", -1.0), ("speed_jitter", float("nan"))]
)
def test_conditions_that_cannot_be_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        varying(**{name: value})


def test_a_client_that_is_late_counts_as_one_that_was_away_but_for_its_download():
    data = population()
    options = dict(cohort_size=CLIENTS, deadline=1.0, solo_examples=BATCH)
    late, info = run(algorithm(conditions=fixed(slowdown={3: 1e9}), **options), data)
    away, other = run(algorithm(conditions=fixed(available={3: False}), **options), data)
    assert distance(weights(late), weights(away)) == 0
    np.testing.assert_array_equal(late.aligner.fitness.value, away.aligner.fitness.value)
    assert (late.aligner.fitness.value[3] == 1.0).all() and (late.aligner.fitness.value[2] != 1.0).any()
    np.testing.assert_array_equal(late.aligner.load.load, away.aligner.load.load)
    assert (info.clients, info.dropped_clients) == (CLIENTS - 1, 1) and (other.clients, other.dropped_clients) == (CLIENTS - 1, 0)
    assert (info.unavailable_clients, other.unavailable_clients) == (0, 1)
    np.testing.assert_array_equal(info.load, other.load)
    assert info.bytes_down > other.bytes_down and info.bytes_up == other.bytes_up
    assert info.simulated_seconds == 1.0 and other.simulated_seconds < 1.0


def test_slots_follow_the_observed_times():
    data = population(sizes=(4,) * CLIENTS)
    _, info = run(algorithm(cohort_size=CLIENTS), data)
    deadline = 1.5 * float(info.simulated_seconds)
    alg = algorithm(cohort_size=CLIENTS, deadline=deadline, conditions=fixed(slowdown={0: 1.8, 1: 100.0}))
    state, dropped, load = alg.init(KEY, data), [], []
    for _ in range(8):
        state, info = alg.step(state, data)
        dropped.append(int(info.dropped_clients))
        load.append(int(info.load.sum()))
    assert dropped[0] == 2 and load[0] == 2 * (CLIENTS - 2)  # nobody knew
    assert dropped[-1] == 1 and load[-1] == 2 * (CLIENTS - 2) + 1  # one holds less and is in time, one can do nothing in time
    np.testing.assert_allclose(state.pace[0], 1 + 0.8 * (1 - 0.7**8), rtol=1e-4)
    np.testing.assert_allclose(state.pace[2:], 1.0, rtol=1e-5)


@pytest.mark.parametrize("name", ["random", pytest.param("balanced", marks=pytest.mark.slow)])
def test_only_what_changed_is_downloaded_again(name):
    """Against a plain account of who has which version."""
    data = population()
    alg = algorithm(aligner=aligner(name), cohort_size=2, solo_examples=BATCH)
    state = alg.init(KEY, data)
    version, copies, saved = np.zeros(EXPERTS, int), {}, 0
    shared, expert = _shared_bytes(state), _expert_bytes(state)
    assert state.cache.experts.shape == (CLIENTS, 2 + (name == "balanced"))
    for _ in range(60):
        state, info = alg.step(state, data)
        present = np.flatnonzero(np.asarray(state.cache.round == state.round - 1))
        needed = 0
        for client in present:
            received = [e for e in np.asarray(state.cache.experts[client]).tolist() if e != NO_EXPERT]
            new = [e for e in received if copies.get(client, {}).get(e) != version[e]]
            saved += len(received) - len(new)
            needed += len(new)
            copies[client] = {e: version[e] for e in received}
        assert info.bytes_down == len(present) * shared + needed * expert
        version += np.asarray(info.tokens) > 0
    assert saved > 3


def _shared_bytes(state):
    return sum(leaf.size * 4 for leaf in jax.tree.leaves(state.shared))


def _expert_bytes(state):
    return sum(leaf[0].size * 4 for leaf in jax.tree.leaves(state.experts))


def test_what_was_received_in_the_round_of_a_change_is_old():
    kept = cache.keep(cache.empty(3, 2), jnp.array([2, 0]), jnp.array([True, False]), jnp.array([[1, 0], [0, 1]]), jnp.int32(4))
    np.testing.assert_array_equal(kept.experts, [[-1, -1], [-1, -1], [1, 0]])
    fresh = cache.current(kept, jnp.array([0, 2]), jnp.array([3, 4, -1]))
    np.testing.assert_array_equal(fresh, [[False] * 3, [True, False, False]])


@pytest.mark.slow
def test_one_slow_round_shuts_nobody_out_for_good():
    data = population(sizes=(4,) * CLIENTS)
    _, info = run(algorithm(cohort_size=CLIENTS), data)
    first = Conditions(lambda key, round, client: (jnp.ones(client.shape, bool), jnp.where((client == 0) & (round == 0), 100.0, 1.0)))
    alg = algorithm(cohort_size=CLIENTS, deadline=1.5 * float(info.simulated_seconds), conditions=first)
    state, clients = alg.init(KEY, data), []
    for _ in range(40):
        state, info = alg.step(state, data)
        clients.append(int(info.clients))
    assert clients[1] == CLIENTS - 1 and clients[-1] == CLIENTS and info.load.sum() == 2 * CLIENTS


def test_a_round_takes_as_long_as_its_slowest_client():
    """Download, compute and upload of each client, by hand."""
    sizes, slow = (3, 9, 4, 1, 7, 5, 8, 2), {1: 2.0, 4: 3.0}
    data = population(sizes=sizes)
    profile = dataclasses.replace(data.profile, uplink_bytes_per_second=jnp.linspace(1e3, 2e3, CLIENTS))
    data = dataclasses.replace(data, profile=profile)
    alg = algorithm(cohort_size=CLIENTS, conditions=fixed(slowdown=slow))
    cost = alg.parts.trainer.cost(data, jnp.int32(0))
    _, info = run(alg, data)
    bytes_ = float(cost.shared_bytes + 2 * cost.expert_bytes)
    flops = float(cost.shared_flops + 2 * cost.expert_flops)
    seconds = [
        slow.get(client, 1.0) * (bytes_ / 1e9 + size * flops / 1e9 + bytes_ / float(profile.uplink_bytes_per_second[client]))
        for client, size in enumerate(sizes)
    ]
    assert np.argmax(seconds) == 4
    np.testing.assert_allclose(info.simulated_seconds, max(seconds), rtol=1e-4)
