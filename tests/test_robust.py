"""Tests of robust rules: each against a slow NumPy oracle, for experts of uneven holders, with ties, and with too few voters."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_groups import Net

from fedmoe_jax import NO_EXPERT, aggregation, partition
from fedmoe_jax.aggregation.robust import norms
from fedmoe_jax.base import ClientUpdate

CLIENTS, SLOTS, EXPERTS, CHUNK = 9, 2, 4, 3
EXPERT_ZEROS = {"w": jnp.zeros((EXPERTS, 2, 3)), "b": jnp.zeros(EXPERTS)}
SHARED_ZEROS = {"v": jnp.zeros((3,)), "s": jnp.zeros(())}
SEEDS = st.integers(0, 2**32 - 1)


def plain_median(rows):
    return np.median(rows, axis=0)


def plain_trimmed_mean(rows, share):
    cut = min(math.ceil(round(share * len(rows), 9)), (len(rows) - 1) // 2)
    return np.sort(rows, axis=0)[cut : len(rows) - cut].mean(0)


def plain_krum(rows, byzantine, keep):
    """Ties at the limit share what is left, so that no order of clients matters."""
    bad = byzantine if isinstance(byzantine, int) else math.ceil(round(byzantine * len(rows), 9))
    if len(rows) < 2 * bad + 3:
        return None
    distance = ((rows[:, None] - rows[None]) ** 2).sum(-1)
    scores = np.array([np.sort(np.delete(distance[i], i))[: len(rows) - bad - 2].sum() for i in range(len(rows))])
    kept = len(rows) - bad if keep is None else min(keep, len(rows) - bad)
    limit = np.sort(scores)[kept - 1]
    below, equal = rows[scores < limit], rows[scores == limit]
    return (below.sum(0) + (kept - len(below)) * equal.mean(0)) / kept


def plain_geometric_median(rows, iterations, smoothing):
    centre = np.median(rows, axis=0)
    for _ in range(iterations):
        weight = 1 / np.maximum(np.sqrt(((rows - centre) ** 2).sum(1)), smoothing)
        centre = weight @ rows / weight.sum()
    return centre


GEOMETRIC = dict(iterations=6, smoothing=1e-3)  # with less, a step from a median that is a client's own delta would magnify rounding
RULES = {
    "median": (aggregation.median(), plain_median),
    "trimmed": (aggregation.trimmed_mean(share=0.2), functools.partial(plain_trimmed_mean, share=0.2)),
    "untrimmed": (aggregation.trimmed_mean(share=0.0), functools.partial(plain_trimmed_mean, share=0.0)),
    "krum": (aggregation.krum(byzantine=1), functools.partial(plain_krum, byzantine=1, keep=1)),
    "two of krum": (aggregation.krum(byzantine=0, keep=2), functools.partial(plain_krum, byzantine=0, keep=2)),
    "multi-krum": (aggregation.krum(byzantine=0.2, keep=None), functools.partial(plain_krum, byzantine=0.2, keep=None)),
    "geometric": (aggregation.geometric_median(**GEOMETRIC), functools.partial(plain_geometric_median, **GEOMETRIC)),
}


def plain_of_few(rows):
    if len(rows) < 2:
        return np.zeros(rows.shape[1])
    size = np.sqrt((rows**2).sum(1))
    return np.mean([row * min(1, size.min() / n) if n else row for row, n in zip(rows, size, strict=True)], axis=0)


def plain(rule, rows):
    made = rule(rows) if len(rows) >= 3 else None
    return plain_of_few(rows) if made is None else made


def update(seed, ties=False):
    """Random deltas. Experts have uneven numbers of holders, some slots are empty or without tokens, some clients are absent."""
    draw = np.random.default_rng(seed)
    chance = draw.dirichlet(np.full(EXPERTS, 0.7)) * 0.9 + 0.1 / EXPERTS
    held = np.stack([draw.choice(EXPERTS, SLOTS, replace=False, p=chance) for _ in range(CLIENTS)])
    held[draw.random(held.shape) < 0.2] = NO_EXPERT
    examples = draw.integers(0, 6, CLIENTS) * (draw.random(CLIENTS) < 0.9)
    tokens = np.where((held == NO_EXPERT) | (examples == 0)[:, None], 0, draw.integers(0, 9, held.shape))

    def deltas(tree, lead, skip):
        values = {name: draw.normal(size=(*lead, *a.shape[skip:])) for name, a in tree.items()}
        return {name: jnp.asarray(np.round(value) if ties else value, jnp.float32) for name, value in values.items()}

    ints = (jnp.asarray(a, jnp.int32) for a in (held, examples, tokens))
    return ClientUpdate(deltas(SHARED_ZEROS, (CLIENTS,), 0), deltas(EXPERT_ZEROS, (CLIENTS, SLOTS), 1), *ints)


def oracle(rule, clients):
    """(experts, shared) by the definition, in loops and float64."""
    held, tokens, examples = (np.asarray(a) for a in (clients.held, clients.tokens, clients.examples))
    experts = {name: np.zeros(a.shape) for name, a in EXPERT_ZEROS.items()}
    for expert in range(EXPERTS):
        pairs = [(c, k) for c, k in np.argwhere(held == expert) if tokens[c, k] > 0]
        rows = [np.concatenate([np.ravel(clients.experts[name][c, k]) for name in sorted(experts)]) for c, k in pairs]
        made = plain(rule, np.array(rows, float).reshape(len(pairs), 7))
        experts["b"][expert], experts["w"][expert] = made[0], made[1:].reshape(2, 3)
    rows = np.concatenate([np.asarray(clients.shared[name], float).reshape(CLIENTS, -1) for name in sorted(SHARED_ZEROS)], 1)
    made = plain(rule, rows[examples > 0])
    return experts, {"s": made[0], "v": made[1:]}


@functools.cache
def program(name, chunk=CLIENTS):
    rule, _ = RULES[name]

    def run(clients):
        total = rule.init(EXPERT_ZEROS, SHARED_ZEROS, CLIENTS, SLOTS)
        for start in range(0, CLIENTS, chunk):
            total = rule.add(total, jax.tree.map(lambda a, s=start: a[s : s + chunk], clients))
        return rule.finish(total)

    return jax.jit(run)


def close(a, b, atol=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=atol), a, b)


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, ties=st.booleans())
@example(seed=4384, ties=True)
def test_a_rule_is_its_definition_in_any_order(name, seed, ties):
    clients = update(seed, ties)
    expected = oracle(RULES[name][1], clients)
    close(program(name)(clients), expected)
    order = np.random.default_rng(seed).permutation(CLIENTS)
    close(program(name)(jax.tree.map(lambda a: a[order], clients)), expected)


@pytest.mark.parametrize("name", ["median", "multi-krum"])
def test_chunks_change_nothing(name):
    for seed in range(5):
        close(program(name, CHUNK)(update(seed)), program(name)(update(seed)), atol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_equal_deltas_are_returned_as_they_are_and_absent_ones_count_nowhere(name):
    same = jax.tree.map(lambda a: jnp.full_like(a, 2) if a.dtype == jnp.float32 else a, update(0))
    same = dataclasses.replace(
        same,
        held=jnp.tile(jnp.array([0, 3]), (CLIENTS, 1)),
        tokens=jnp.full((CLIENTS, SLOTS), 7).at[7:].set(0),
        examples=jnp.full(CLIENTS, 5).at[7:].set(0),
    )
    same = jax.tree.map(lambda a: a.at[7:].set(-3e38) if a.dtype == jnp.float32 else a, same)
    experts, shared = program(name)(same)
    np.testing.assert_allclose(experts["w"][jnp.array([0, 3])], 2, rtol=1e-5)
    np.testing.assert_array_equal(experts["w"][1:3], 0)
    np.testing.assert_allclose(shared["v"], 2, rtol=1e-5)


def test_an_untrimmed_mean_is_the_mean_of_clients_and_no_rule_moves_what_nobody_sent():
    clients = dataclasses.replace(update(3), examples=jnp.arange(1, CLIENTS + 1))
    _, shared = program("untrimmed")(clients)
    close(shared, jax.tree.map(lambda a: a.mean(0), clients.shared), atol=1e-6)
    nobody = dataclasses.replace(clients, examples=jnp.zeros(CLIENTS, jnp.int32), tokens=jnp.zeros((CLIENTS, SLOTS), jnp.int32))
    for name in RULES:
        jax.tree.map(lambda a: np.testing.assert_array_equal(a, 0), program(name)(nobody))


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, size=st.sampled_from([1.0, 1e3, 1e30, 3e38]), bad=st.integers(0, 4))
def test_a_minority_cannot_move_the_median_out_of_what_others_sent(seed, size, bad):
    draw = np.random.default_rng(seed)
    clients = dataclasses.replace(
        update(seed),
        held=jnp.tile(jnp.array([1, 2]), (CLIENTS, 1)),
        tokens=jnp.full((CLIENTS, SLOTS), 1),
        examples=jnp.full(CLIENTS, 1),
    )
    liars = draw.permutation(CLIENTS)[:bad]

    def spoilt(a):
        sign = draw.choice([-1.0, 1.0], size=a[liars].shape)
        return a.at[liars].set(jnp.asarray(sign * size, jnp.float32)) if a.dtype == jnp.float32 else a

    made = program("median")(jax.tree.map(spoilt, clients))
    honest = jax.tree.map(lambda a: np.delete(np.asarray(a), liars, axis=0), (clients.experts, clients.shared))
    for name, value in made[0].items():
        for slot, expert in enumerate((1, 2)):
            assert (value[expert] >= honest[0][name][:, slot].min(0)).all() and (value[expert] <= honest[0][name][:, slot].max(0)).all()
    for name, value in made[1].items():
        assert (value >= honest[1][name].min(0)).all() and (value <= honest[1][name].max(0)).all()


@pytest.mark.parametrize("name", ["median", "trimmed", "krum", "multi-krum", "geometric"])
@pytest.mark.parametrize("size", [-10.0, 1e30, 3e38])
def test_one_bad_client_moves_no_rule_far(name, size):
    clients = dataclasses.replace(update(5), examples=jnp.full(CLIENTS, 1))
    clients = dataclasses.replace(clients, shared=jax.tree.map(lambda a: 1 + 0.1 * a, clients.shared))
    spoilt = dataclasses.replace(clients, shared=jax.tree.map(lambda a: a.at[4].set(size), clients.shared))
    for leaf in jax.tree.leaves(program(name)(spoilt)[1]):
        np.testing.assert_allclose(leaf, 1, atol=0.35)


def test_few_voters_are_scaled_to_the_least_norm_and_one_alone_changes_nothing():
    zero = jax.tree.map(jnp.zeros_like, update(0))
    b = zero.experts["b"].at[0, 0].set(3.0).at[1, 0].set(-1e30).at[2, 0].set(5.0)
    clients = dataclasses.replace(
        zero,
        held=jnp.full((CLIENTS, SLOTS), NO_EXPERT).at[:2, 0].set(1).at[2, 0].set(2),
        tokens=zero.tokens.at[:3, 0].set(1),
        examples=zero.examples.at[0].set(1),
        experts=zero.experts | {"b": b},
        shared=zero.shared | {"s": zero.shared["s"].at[0].set(4.0)},
    )
    for name in RULES:
        experts, shared = program(name)(clients)
        np.testing.assert_allclose(experts["b"], 0, atol=1e-6)  # 3 and -3; 5 comes alone
        assert shared["s"] == 0
    one_more = dataclasses.replace(clients, experts=zero.experts | {"b": b.at[1, 0].set(6.0)})
    np.testing.assert_allclose(program("median")(one_more)[0]["b"], [0, 3, 0, 0], rtol=1e-6)


def test_groups_have_votes_and_values_of_their_own():
    parts = partition(Net())
    draw, rule = np.random.default_rng(0), aggregation.median()

    def deltas(tree, lead, skip):
        return jax.tree.map(lambda leaf: jnp.array(draw.normal(size=(*lead, *leaf.shape[skip:])), jnp.float32), tree)

    held = jnp.array([[0, 1, 4, 5]] * 5 + [[2, 3, 6, NO_EXPERT]] * 4)
    tokens = jnp.where(held == NO_EXPERT, 0, 1).at[0, 3].set(0)
    update = ClientUpdate(deltas(parts.shared, (9,), 0), deltas(parts.experts, (9, SLOTS), 1), held, jnp.ones(9, jnp.int32), tokens)
    made, shared = jax.jit(lambda update: rule.finish(rule.add(rule.init(parts.experts, parts.shared, 9, SLOTS), update)))(update)
    assert jax.tree.structure((made, shared)) == jax.tree.structure((parts.experts, parts.shared))
    jax.tree.map(lambda got, rows: np.testing.assert_allclose(got, np.median(rows, axis=0), atol=1e-6), shared, update.shared)
    for (path, got), rows in zip(jax.tree_util.tree_flatten_with_path(made)[0], jax.tree.leaves(update.experts), strict=True):
        second = "[1]" in jax.tree_util.keystr(path)
        np.testing.assert_allclose(got[0], np.median(rows[:5, 0], axis=0), atol=1e-6)
        np.testing.assert_allclose(got[1], np.median(rows[1:5, 1] if second else rows[:5, 1], axis=0), atol=1e-6)
        np.testing.assert_allclose(got[2], np.median(rows[5:, 0], axis=0), atol=1e-6)
        np.testing.assert_allclose(got[3], 0 if second else np.median(rows[5:, 1], axis=0), atol=1e-6)


def test_norms_of_absurd_rows_are_numbers():
    np.testing.assert_allclose(norms(jnp.array([[3e30, 4e30], [0.0, 0.0], [3e-30, 4e-30]])), [5e30, 0, 5e-30], rtol=1e-6)
    assert norms(jnp.zeros((2, 0))).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: aggregation.trimmed_mean(share=0.5), "share is 0.5, it must be at least 0 and below 0.5"),
        (lambda: aggregation.trimmed_mean(share=-0.1), "share is -0.1"),
        (lambda: aggregation.krum(byzantine=-1), "byzantine is -1, it must be a whole number from 0, or a share below 0.5"),
        (lambda: aggregation.krum(byzantine=0.5), "byzantine is 0.5"),
        (lambda: aggregation.krum(byzantine=True), "byzantine is True"),
        (lambda: aggregation.krum(byzantine=1, keep=0), "keep is 0, it must be a whole number from 1, or None"),
        (lambda: aggregation.krum(byzantine=1, keep=-1), "keep is -1"),
        (lambda: aggregation.geometric_median(iterations=0), "iterations is 0, it must be a whole number from 1"),
        (lambda: aggregation.geometric_median(smoothing=0.0), "smoothing is 0.0, it must be above 0"),
        (lambda: aggregation.clip(norm=0.0), "norm is 0.0, it must be above 0"),
        (lambda: aggregation.clip(norm=math.nan), "norm is nan"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_every_rule_needs_deltas_and_collects_them():
    for rule, _ in RULES.values():
        assert rule.needs == "deltas" and rule.collects
    assert not aggregation.mean().collects
