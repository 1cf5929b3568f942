"""Secure aggregation: sums to the last bit with any dropouts, messages and too few shares that tell nothing, and fixed point."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedmoe_jax import aggregation
from fedmoe_jax.aggregation import secure
from fedmoe_jax.base import ClientUpdate

CLIENTS, VALUES, THRESHOLD = 7, 12, 3
SEEDS = st.integers(0, 2**32 - 1)
KEY = jax.random.key(1)


@functools.cache
def protocol(threshold):
    return jax.jit(functools.partial(secure.secure_sum, threshold=threshold))


def words(draw, *shape):
    return jnp.asarray(draw.integers(0, 2**32, shape, np.uint32))


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_the_sum_is_that_of_the_survivors_to_the_last_bit(seed):
    draw = np.random.default_rng(seed)
    client, values = jnp.asarray(draw.permutation(1000)[:CLIENTS], jnp.int32), words(draw, CLIENTS, VALUES)
    joined, survived = draw.random(CLIENTS) < 0.8, draw.random(CLIENTS) < 0.6
    found, enough = protocol(THRESHOLD)(jax.random.key(seed), client, values, joined, survived)
    arrived = joined & survived
    assert enough == (arrived.sum() >= THRESHOLD)
    expected = np.asarray(values)[arrived].sum(0, dtype=np.uint32) if enough else np.zeros(VALUES)
    np.testing.assert_array_equal(found, expected)


def masks_by_hand(made, client, joined, row):
    """A client's masks, in a loop over the others."""
    total = np.asarray(secure.mask(made.own[row], VALUES))
    for other in range(CLIENTS):
        if joined[other] and other != row:
            words = np.asarray(secure.mask(made.pairs[row, other], VALUES))
            total = total + words if client[row] < client[other] else total - words
    return total


def test_masks_are_those_of_the_protocol_and_vanish_from_the_sum():
    draw = np.random.default_rng(0)
    client, joined = jnp.asarray(draw.permutation(99)[:CLIENTS], jnp.int32), np.arange(CLIENTS) != 4
    made = secure.seeds(KEY, client)
    np.testing.assert_array_equal(made.pairs, np.swapaxes(made.pairs, 0, 1))
    sent = secure.masked(jnp.zeros((CLIENTS, VALUES), jnp.uint32), made, client, jnp.asarray(joined))
    for row in range(CLIENTS):
        np.testing.assert_array_equal(sent[row], masks_by_hand(made, np.asarray(client), joined, row))
    own = sum(np.asarray(secure.mask(made.own[row], VALUES)) for row in np.flatnonzero(joined))
    np.testing.assert_array_equal(np.asarray(sent)[joined].sum(0, dtype=np.uint32), own)


def test_a_message_alone_looks_uniform_whatever_it_holds():
    client = jnp.arange(3)

    @jax.jit
    def sent(key, values):
        return secure.masked(values, secure.seeds(key, client), client, jnp.ones(3, bool))[1]

    keys = jax.random.split(KEY, 400)
    for value in (0, 12345):
        found = np.asarray(jax.vmap(sent, (0, None))(keys, jnp.full((3, 50), value, jnp.uint32)))
        for bits in (found >> 24, found & 0xFF):  # the first and the last of four bytes
            assert stats.chisquare(np.bincount(bits.ravel(), minlength=256)).pvalue > 1e-4
        apart = np.corrcoef(found.astype(float).T) - np.eye(50)
        assert np.abs(apart).max() < 5.5 / math.sqrt(400)


def test_any_enough_shares_tell_the_secret_and_fewer_fit_any_secret():
    secrets = jnp.asarray([[0, 1, 0xFFFFFFFF], [0xFFFF, 0x10000, 123456789]], jnp.uint32)
    shares = secure.share(KEY, secrets, 5, 3)
    assert shares.shape == (5, 2, 3, 2) and int(shares.max()) < secure.PRIME
    recover = jax.jit(functools.partial(secure.reconstruct, threshold=3))
    for some in itertools.combinations(range(5), 3):
        np.testing.assert_array_equal(recover(shares, jnp.isin(jnp.arange(5), jnp.asarray(some))), secrets)
    wrong = recover(shares, jnp.isin(jnp.arange(5), jnp.asarray([1, 4])))
    assert (wrong != secrets).all()
    lone = jax.vmap(lambda key, secret: secure.share(key, secret, 5, 3)[jnp.asarray([1, 4])], (0, None))
    keys = jax.random.split(KEY, 20000)
    both = [np.asarray(lone(keys, jnp.uint32(secret)))[..., 1].astype(int) for secret in (0, 0xFFFF)]
    for pair in both:  # two shares of three are uniform on the plane, of either secret
        counts = np.histogram2d(*pair.T, bins=8, range=[[0, secure.PRIME]] * 2)[0]
        assert stats.chisquare(counts.ravel()).pvalue > 1e-4


def test_products_and_inverses_are_those_of_the_field():
    draw = np.random.default_rng(0)
    numbers = np.concatenate([[0, 1, 2, secure.PRIME - 1, secure.PRIME - 2], draw.integers(0, secure.PRIME, 60)])
    a, b = np.meshgrid(numbers, numbers)
    found = secure._times(jnp.asarray(a, jnp.uint32), jnp.asarray(b, jnp.uint32))
    np.testing.assert_array_equal(found, a * b % secure.PRIME)
    inverse = secure._inverse(jnp.asarray(numbers[1:], jnp.uint32))
    np.testing.assert_array_equal(np.asarray(inverse, np.int64) * numbers[1:] % secure.PRIME, 1)


@pytest.mark.parametrize("threshold", [1, 4])
def test_a_threshold_out_of_range_is_named(threshold):
    three = jnp.ones(3, bool)
    with pytest.raises(ValueError, match=f"threshold is {threshold}, it must be from 2 to the clients, 3"):
        secure.secure_sum(KEY, jnp.arange(3), jnp.zeros((3, 2), jnp.uint32), three, three, threshold=threshold)


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.sampled_from([1, 2, 20, 1000]), st.sampled_from([0, 8, 20, 30]))
def test_fixed_point_rounds_towards_zero_and_stands_sums_of_its_clients(seed, clients, bits):
    point = secure.FixedPoint(bits, clients)
    draw = np.random.default_rng(seed)
    values = np.float32(draw.normal(size=64) * 10.0 ** draw.uniform(-6, 9, 64))
    code = np.asarray(point.encode(jnp.asarray(values))).astype(np.int32).astype(int)
    most = (2**31 - 1) // clients
    exact = np.trunc(values.astype(float) * 2.0**bits)
    inside = np.abs(exact) < most * (1 - 1e-6)
    np.testing.assert_array_equal(code[inside], exact[inside])
    assert (np.abs(code) * clients < 2**31).all() and (np.abs(code) <= np.abs(values.astype(float)) * 2.0**bits).all()
    total = np.uint32(np.int64(clients) * code % 2**32)
    np.testing.assert_allclose(point.decode(jnp.asarray(total)), clients * code / 2.0**bits, rtol=1e-6)


def test_no_number_and_infinities_are_encoded():
    point = secure.FixedPoint(16, 4)
    code = np.asarray(point.encode(jnp.asarray([jnp.nan, jnp.inf, -jnp.inf]))).astype(np.int32)
    assert code[0] == 0 and code[1] == -code[2] > 2**28


@pytest.mark.parametrize("point", [secure.FixedPoint(31, 4), secure.FixedPoint(-1, 4), secure.FixedPoint(8, 0)])
def test_a_wrong_fixed_point_is_named(point):
    with pytest.raises(ValueError, match=r"fixed_point is .*, fraction_bits must be from 0 to 30 and clients at least 1"):
        aggregation.fixed_mean(clients=1.0, holders=1.0, fixed_point=point)


def test_an_aggregate_is_that_of_the_protocol_for_each_expert_alone():
    """The shared part is summed over all clients, each expert over its holders; two of them drop out."""
    draw, experts, number = np.random.default_rng(3), 3, 6
    held = jnp.asarray([[0, 1], [1, 0], [2, 1], [0, 2], [0, 1], [2, 0]])
    shared, deltas = (jnp.asarray(draw.normal(size=shape), jnp.float32) for shape in ((number, 5), (number, 2, 5)))
    survived = np.array([True, True, False, True, True, False])
    examples = jnp.asarray(survived, jnp.int32)
    update = ClientUpdate({"v": shared}, {"w": deltas}, held, examples, examples[:, None] * jnp.ones_like(held))
    point = secure.FixedPoint(16, number)
    rule = aggregation.fixed_mean(clients=1.0, holders=1.0, fixed_point=point)
    made, whole = rule.finish(rule.add(rule.init({"w": jnp.zeros((experts, 5))}, {"v": jnp.zeros(5)}), update))
    client, survived = jnp.arange(number), jnp.asarray(survived)
    total, enough = protocol(2)(KEY, client, point.encode(shared), jnp.ones(number, bool), survived)
    assert enough
    np.testing.assert_array_equal(whole["v"], point.decode(total))
    for expert in range(experts):
        own = (held == expert).any(1)
        mine = jnp.take_along_axis(deltas, jnp.argmax(held == expert, 1)[:, None, None], 1)[:, 0]
        total, enough = protocol(2)(KEY, client, point.encode(mine), own, survived)
        if expert == 2:  # only one of its three holders is left
            assert not enough
        else:
            np.testing.assert_array_equal(made["w"][expert], point.decode(total))
