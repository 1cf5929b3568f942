"""Clients that report false fitness: what they get out of it, with scores as they are and as ranks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedmoe_jax import alignment, sampling
from fedmoe_jax.alignment import fitness
from fedmoe_jax.base import Cohort, Feedback

CLIENTS, COHORT, EXPERTS, ROUNDS = 100, 20, 8, 200
LIARS = np.arange(CLIENTS) % 10 == 3
FAVOURITE = np.arange(CLIENTS) // 2 % EXPERTS
SCORES = {"as they are": fitness.solo(), "ranked": fitness.ranked(fitness.solo())}


def losses(what):
    """Of each client with each expert alone: each has a favourite. Liars report perfect scores of all experts, or of expert 0 alone."""
    each = 2 + 0.1 * np.random.default_rng(0).normal(size=(CLIENTS, EXPERTS))
    each[np.arange(CLIENTS), FAVOURITE] = 1.0
    if what == "all perfect":
        each[LIARS] = 0.0
    if what == "one perfect":
        each[LIARS] = 1e3
        each[LIARS, 0] = 0.0
    return jnp.array(each, jnp.float32)


@functools.cache
def program(name):
    aligner = alignment.balanced(num_experts=EXPERTS, max_slots=1, fitness=SCORES[name])

    def one(losses, state, index):
        key = jax.random.fold_in(jax.random.key(0), index)
        client = sampling.cohort(key, CLIENTS, COHORT)
        cohort = Cohort(client, jnp.ones(COHORT, bool), jnp.ones(COHORT, jnp.int32))
        aligned, state = aligner.align(jax.random.fold_in(key, 1), state, cohort)
        tried, nothing = jnp.concatenate([aligned.held, aligned.probed], axis=1), jnp.zeros((COHORT, 1))
        feedback = Feedback(jnp.full(COHORT, 40), jnp.full((COHORT, 1), 40), nothing + 1, nothing, losses[client[:, None], tried])
        return aligner.learn(state, cohort, aligned, feedback), (client, aligned.held[:, 0])

    return jax.jit(lambda losses: jax.lax.scan(functools.partial(one, losses), aligner.init(CLIENTS), jnp.arange(ROUNDS))[1])


@functools.cache
def shares(name, what):
    """How often honest clients hold their favourite, those among them whose favourite is expert 0, and how often liars hold expert 0."""
    client, held = (np.asarray(rows)[ROUNDS // 4 :].reshape(-1) for rows in program(name)(losses(what)))
    honest, fans = ~LIARS[client], ~LIARS[client] & (FAVOURITE[client] == 0)
    return (held == FAVOURITE[client])[honest].mean(), (held == 0)[fans].mean(), (held == 0)[~honest].mean()


def test_who_claims_that_all_experts_suit_it_gets_what_others_leave():
    for name in SCORES:
        everyone, fans, _ = shares(name, "nobody")
        with_liars, fans_with_liars, _ = shares(name, "all perfect")
        assert with_liars > everyone - 0.02 and fans_with_liars > fans - 0.02


def test_an_expert_can_be_bought_with_scores_and_with_ranks_for_no_more_than_an_even_split():
    _, fans, _ = shares("as they are", "nobody")
    _, left, bought = shares("as they are", "one perfect")
    assert left < 0.5 * fans and bought > 0.75
    np.testing.assert_allclose([fans, left], [0.76, 0.27], atol=0.01)  # what the README says
    _, fans, _ = shares("ranked", "nobody")
    _, left, bought = shares("ranked", "one perfect")
    np.testing.assert_allclose([fans, left], [0.75, 0.56], atol=0.01)
    places, honest, liars = COHORT / EXPERTS, (~LIARS & (FAVOURITE == 0)).mean() * COHORT, LIARS.mean() * COHORT
    assert left > min(fans, places / (honest + liars)) - 0.1 and bought < places / (honest + liars) + 0.1


def test_others_lose_little_of_their_favourites():
    for name, most in {"as they are": 0.2, "ranked": 0.1}.items():
        assert 0 < shares(name, "nobody")[0] - shares(name, "one perfect")[0] < most


@settings(max_examples=30, deadline=None)
@example(seed=268985, equal=False)
@given(seed=st.integers(0, 2**32 - 1), equal=st.booleans())
def test_ranks_are_the_share_of_others_that_suit_no_better_and_no_row_bids_more_than_another(seed, equal):
    draw = np.random.default_rng(seed)
    value = draw.normal(size=(5, EXPERTS)) * 10.0 ** draw.integers(-3, 30, (5, 1))
    value = np.round(value) if equal else value
    rule = fitness.ranked(fitness.solo(exploration=0.0))
    state = rule.init(5, EXPERTS)
    state = fitness.FitnessState(jnp.array(value, jnp.float32), state.count, state.seen, state.round, state.spread, state.told)
    score = np.asarray(rule.score(state, jnp.arange(5)))
    value = np.asarray(fitness.solo(exploration=0.0).score(state, jnp.arange(5)))  # 1 + (value - 1), in which near ones are the same
    np.testing.assert_allclose(score, ((value[:, None] <= value[..., None]).sum(2) - 1) / (EXPERTS - 1), rtol=1e-6)
    best_first = -np.sort(-score, axis=1)
    assert (best_first[:, :1] - best_first <= np.arange(EXPERTS) / (EXPERTS - 1) + 1e-6).all()


def test_ranks_of_one_expert_and_of_equal_ones():
    for experts, expected in ((1, 0.0), (3, 1.0)):
        rule = fitness.ranked(fitness.usage_driven())
        np.testing.assert_array_equal(rule.score(rule.init(2, experts), jnp.arange(2)), np.full((2, experts), expected))
    assert fitness.ranked(fitness.solo(probes=3)).probes == 3
