"""Tests of aggregation: the mean against a slow NumPy oracle, in any chunks and any order."""

import dataclasses
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_jax import NO_EXPERT, aggregation
from fedmoe_jax.base import ClientUpdate

CLIENTS, SLOTS, EXPERTS = 6, 2, 4
EXPERT_ZEROS = {"w": jnp.zeros((EXPERTS, 2, 3)), "b": jnp.zeros(EXPERTS)}
SHARED_ZEROS = {"v": jnp.zeros((3,)), "s": jnp.zeros(())}


def update(seed):
    """Random deltas; each client holds distinct experts, some slots are empty, some clients are absent."""
    draw = np.random.default_rng(seed)
    held = np.stack([draw.permutation(EXPERTS)[:SLOTS] for _ in range(CLIENTS)])
    held[draw.random(held.shape) < 0.3] = NO_EXPERT
    examples = draw.integers(0, 9, CLIENTS)
    tokens = np.where((held == NO_EXPERT) | (examples == 0)[:, None], 0, draw.integers(0, 20, held.shape))

    def deltas(tree, lead, skip):
        return {name: jnp.asarray(draw.normal(size=(*lead, *a.shape[skip:])), jnp.float32) for name, a in tree.items()}

    ints = (jnp.asarray(a, jnp.int32) for a in (held, examples, tokens))
    return ClientUpdate(deltas(SHARED_ZEROS, (CLIENTS,), 0), deltas(EXPERT_ZEROS, (CLIENTS, SLOTS), 1), *ints)


def oracle(clients):
    """The definition, in loops and float64."""
    held, tokens, examples = (np.asarray(a) for a in (clients.held, clients.tokens, clients.examples))
    experts = {}
    for name, zeros in EXPERT_ZEROS.items():
        experts[name] = np.zeros(zeros.shape)
        for expert in range(EXPERTS):
            pairs = [(tokens[c, k], np.asarray(clients.experts[name][c, k], float)) for c, k in np.argwhere(held == expert)]
            if total := sum(weight for weight, _ in pairs):
                experts[name][expert] = sum(weight * delta for weight, delta in pairs) / total
    shared = {
        name: sum(n * np.asarray(d, float) for n, d in zip(examples, clients.shared[name], strict=True)) / max(examples.sum(), 1)
        for name in SHARED_ZEROS
    }
    return experts, shared


@jax.jit
def whole(clients):
    rule = aggregation.mean()
    return rule.finish(rule.add(rule.init(EXPERT_ZEROS, SHARED_ZEROS), clients))


@jax.jit
def in_chunks(clients):
    rule = aggregation.mean()
    total = rule.init(EXPERT_ZEROS, SHARED_ZEROS)
    for start in range(0, CLIENTS, 2):
        total = rule.add(total, jax.tree.map(lambda a, s=start: a[s : s + 2], clients))
    return rule.finish(total)


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), a, b)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_mean_matches_the_oracle_in_one_piece_and_in_chunks(seed):
    clients = update(seed)
    close(whole(clients), oracle(clients))
    close(in_chunks(clients), oracle(clients))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_order_of_clients_does_not_matter(seed):
    clients = update(seed)
    order = np.random.default_rng(seed).permutation(CLIENTS)
    close(whole(jax.tree.map(lambda a: a[order], clients)), whole(clients))


def test_equal_deltas_are_returned_as_they_are():
    ones = jax.tree.map(lambda a: jnp.full_like(a, 2) if a.dtype == jnp.float32 else a, update(0))
    ones = dataclasses.replace(ones, held=jnp.tile(jnp.array([0, 3]), (CLIENTS, 1)), tokens=jnp.full((CLIENTS, SLOTS), 7))
    experts, shared = whole(ones)
    np.testing.assert_allclose(experts["b"], [2, 0, 0, 2], rtol=1e-6)
    np.testing.assert_allclose(shared["v"], [2, 2, 2], rtol=1e-6)


def test_absent_clients_change_nothing_bit_for_bit():
    present = dataclasses.replace(update(1), examples=jnp.array([3, 1, 4, 0, 0, 0]))
    present = dataclasses.replace(present, tokens=present.tokens.at[3:].set(0))
    other = jax.tree.map(lambda a: a.at[3:].set(1e6) if a.dtype == jnp.float32 else a, present)
    jax.tree.map(np.testing.assert_array_equal, whole(present), whole(other))


def test_nobody_gives_zero():
    nobody = dataclasses.replace(update(2), examples=jnp.zeros(CLIENTS, jnp.int32), tokens=jnp.zeros((CLIENTS, SLOTS), jnp.int32))
    jax.tree.map(lambda a: np.testing.assert_array_equal(a, 0), whole(nobody))


@pytest.mark.parametrize("tokens", [1, 1000])
def test_an_expert_is_weighed_by_tokens_and_the_shared_part_by_examples(tokens):
    base = jax.tree.map(lambda a: jnp.zeros_like(a), update(3))
    base = dataclasses.replace(
        base,
        held=jnp.full((CLIENTS, SLOTS), NO_EXPERT).at[:2, 0].set(1),
        tokens=base.tokens.at[0, 0].set(tokens).at[1, 0].set(3 * tokens),
        examples=base.examples.at[0].set(3).at[1].set(1),
        experts=base.experts | {"b": base.experts["b"].at[1, 0].set(4.0)},
        shared=base.shared | {"s": base.shared["s"].at[0].set(4.0)},
    )
    experts, shared = whole(base)
    np.testing.assert_allclose(experts["b"], [0, 3, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(shared["s"], 3, rtol=1e-6)


def test_mean_reads_sums_only():
    assert aggregation.mean().needs == "sum"


@pytest.mark.parametrize("agreement", [0.3, 1.0])
def test_where_signs_disagree_the_mean_is_multiplied_by_how_far_they_agree(agreement):
    rule, clients = aggregation.mean(agreement=agreement), update(4)
    found = jax.jit(lambda clients: rule.finish(rule.add(rule.init(EXPERT_ZEROS, SHARED_ZEROS), clients)))(clients)
    signs = dataclasses.replace(clients, **{part: jax.tree.map(jnp.sign, getattr(clients, part)) for part in ("experts", "shared")})

    def masked(mean, sign):
        return mean * np.where(np.abs(sign) >= agreement, 1.0, np.abs(sign))

    expected = jax.tree.map(masked, oracle(clients), oracle(signs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected)
    plain = np.abs(oracle(clients)[0]["w"])
    assert (np.abs(found[0]["w"]) <= plain + 1e-6).all() and (np.abs(found[0]["w"]) < 0.99 * plain).any()
    assert rule.needs == "deltas"


def test_clients_of_one_mind_agree():
    clients = update(5)
    one = dataclasses.replace(clients, **{part: jax.tree.map(jnp.ones_like, getattr(clients, part)) for part in ("experts", "shared")})
    rule = aggregation.mean(agreement=1.0)
    jax.tree.map(np.testing.assert_array_equal, rule.finish(rule.add(rule.init(EXPERT_ZEROS, SHARED_ZEROS), one)), whole(one))


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
@pytest.mark.parametrize("name", ["agreement", "few_holders"])
def test_shares_are_from_0_to_1(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}, it must be from 0 to 1"):
        aggregation.mean(**{name: value})


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_experts_that_fewer_clients_trained_change_less(power):
    rule, clients = aggregation.mean(few_holders=power), update(4)

    @jax.jit
    def chunks(clients):
        first, second = (jax.tree.map(operator.itemgetter(rows), clients) for rows in (slice(0, 2), slice(2, None)))
        return rule.finish(rule.add(rule.add(rule.init(EXPERT_ZEROS, SHARED_ZEROS), first), second))

    experts, shared = oracle(clients)
    held, tokens = np.asarray(clients.held), np.asarray(clients.tokens)
    trained = np.array([((held == expert) & (tokens > 0)).sum() for expert in range(EXPERTS)])
    scale = np.minimum(trained / trained[trained > 0].mean(), 1) ** power
    assert len(set(scale[trained > 0])) > 1
    expected = {name: mean * scale.reshape(-1, *(1,) * (mean.ndim - 1)) for name, mean in experts.items()}, shared
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), chunks(clients), expected)
    assert rule.needs == "sum"
