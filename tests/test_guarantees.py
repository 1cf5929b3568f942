"""What `balanced` promises over 500 rounds of random cohorts: no expert starves, and load comes out even."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmoe_jax import alignment, sampling
from fedmoe_jax.alignment import load
from fedmoe_jax.base import NO_EXPERT, Cohort, Feedback

CLIENTS, ROUNDS = 100, 500


def simulate(aligner, cohort_size, sizes, losses):
    """Clients and tokens of each expert over all rounds, and the longest that one was untrained.

    Each client's tokens go to its experts in random shares; `losses` [client, expert] is what an expert alone gives.
    """
    experts, slots = aligner.num_experts, aligner.max_slots

    def one(carry, index):
        state, last = carry
        key = jax.random.fold_in(jax.random.key(0), index)
        client = sampling.cohort(key, CLIENTS, cohort_size)
        cohort = Cohort(client, jnp.ones(cohort_size, bool), jnp.full(cohort_size, slots))
        aligned, state = aligner.align(jax.random.fold_in(key, 1), state, cohort)
        share = jax.random.dirichlet(jax.random.fold_in(key, 2), jnp.full(slots, 2.0), (cohort_size,))
        tokens = jnp.where(aligned.held == NO_EXPERT, 0, jnp.ceil(share * sizes[client][:, None])).astype(jnp.int32)
        tried = jnp.concatenate([aligned.held, aligned.probed], axis=1)
        nothing = jnp.zeros(tokens.shape)
        feedback = Feedback(sizes[client], tokens, nothing, nothing, losses[client[:, None], tried])
        state = aligner.learn(state, cohort, aligned, feedback)
        expert = jnp.where(tokens > 0, aligned.held, experts).reshape(-1)
        counts = jnp.zeros((2, experts)).at[:, expert].add(jnp.stack([jnp.ones(expert.shape), tokens.reshape(-1)]), mode="drop")
        last = jnp.where(counts[0] > 0, index, last)
        return (state, last), (counts, (index - last).max())

    start = aligner.init(CLIENTS), jnp.full(experts, -1)
    _, (counts, staleness) = jax.jit(lambda start: jax.lax.scan(one, start, jnp.arange(ROUNDS)))(start)
    return *np.asarray(counts.sum(axis=0)), int(staleness.max())


def variation(values):
    return values.std() / values.mean()


@functools.cache
def clients_of_hidden_tasks(experts):
    """Losses of clients that each suit one expert, of unequal popularity."""
    draw = np.random.default_rng(0)
    popularity = 1 / np.arange(1, experts + 1)
    losses = 2.0 + 0.1 * draw.normal(size=(CLIENTS, experts))
    losses[np.arange(CLIENTS), draw.choice(experts, CLIENTS, p=popularity / popularity.sum())] = 0.5
    return jnp.array(losses, jnp.float32)


def test_load_comes_out_even_where_greedy_leaves_it_uneven():
    sizes = jnp.full(CLIENTS, 200)
    losses = clients_of_hidden_tasks(8)
    clients, tokens, staleness = simulate(alignment.balanced(num_experts=8, max_slots=2), 20, sizes, losses)
    assert variation(clients) <= 0.01 and variation(tokens) <= 0.03
    assert staleness <= math.ceil(8 / 40)
    clients, tokens, _ = simulate(alignment.greedy(num_experts=8, max_slots=2), 20, sizes, losses)
    assert variation(clients) > 0.2 and variation(tokens) > 0.2


@pytest.mark.parametrize("count", ["tokens", pytest.param("clients", marks=pytest.mark.slow)])
def test_what_is_counted_comes_out_even_for_clients_of_unequal_size(count):
    sizes = jnp.array(np.random.default_rng(1).integers(20, 400, CLIENTS))
    aligner = alignment.balanced(num_experts=8, max_slots=2, load=load.monitor(count=count))
    clients, tokens, _ = simulate(aligner, 20, sizes, clients_of_hidden_tasks(8))
    assert variation(clients if count == "clients" else tokens) <= (0.01 if count == "clients" else 0.03)


@pytest.mark.parametrize("demand", [0.0, pytest.param(1.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("experts", "slots", "cohort_size"), [(64, 2, 20), pytest.param(8, 1, 3, marks=pytest.mark.slow)])
def test_no_expert_starves_when_there_are_more_experts_than_slots(experts, slots, cohort_size, demand):
    sizes = jnp.array(np.random.default_rng(1).integers(20, 400, CLIENTS))
    aligner = alignment.balanced(num_experts=experts, max_slots=slots, load=load.monitor(demand=demand))
    _, _, staleness = simulate(aligner, cohort_size, sizes, clients_of_hidden_tasks(experts))
    assert staleness <= math.ceil(experts / (slots * cohort_size))
