"""Capacity: memory and deadline limit the slots, as a slow count of experts does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_jax.alignment import capacity
from fedmoe_jax.base import ClientProfile, RoundCost

CLIENTS, MAX_SLOTS = 5, 4
amounts = st.lists(st.floats(1.0, 1e3, width=32), min_size=CLIENTS, max_size=CLIENTS)
profiles = st.builds(lambda *columns: ClientProfile(*(jnp.array(c, jnp.float32) for c in columns)), *[amounts] * 4)
costs = st.builds(lambda *numbers: RoundCost(*(jnp.float32(n) for n in numbers)), *[st.floats(0.0, 500.0, width=32) for _ in range(8)])


def oracle_seconds(profile, cost, client, slots, examples, probes):
    p, c = jax.tree.map(np.float64, (profile, cost))
    down = c.shared_bytes + (slots + (probes if slots else 0)) * c.expert_bytes
    up = c.shared_bytes + slots * c.expert_bytes
    flops = examples * (c.shared_flops + slots * c.expert_flops)
    if slots:
        flops += c.solo_shared_flops + (slots + probes) * c.solo_expert_flops
    return down / p.downlink_bytes_per_second[client] + flops / p.flops_per_second[client] + up / p.uplink_bytes_per_second[client]


@settings(deadline=None)
@given(profile=profiles, cost=costs, deadline=st.floats(0.1, 1e4), examples=st.integers(0, 30))
def test_slots_are_the_most_that_fit(profile, cost, deadline, examples):
    counts = jnp.full(CLIENTS, examples)
    slots = capacity.slots(profile, cost, deadline=deadline, max_slots=MAX_SLOTS, examples=counts, probes=2)
    assert ((slots >= 0) & (slots <= MAX_SLOTS)).all()
    for client, count in enumerate(slots.tolist()):
        for k in range(1, MAX_SLOTS + 1):
            memory = float(cost.shared_memory) + k * float(cost.expert_memory)
            seconds = oracle_seconds(profile, cost, client, k, examples, 2)
            closest = min(abs(memory / float(profile.memory_bytes[client]) - 1), abs(seconds / deadline - 1))
            if closest > 1e-5:
                assert (k <= count) == (memory <= float(profile.memory_bytes[client]) and seconds <= deadline)


@settings(deadline=None)
@given(profile=profiles, cost=costs, count=st.integers(0, MAX_SLOTS))
def test_seconds_match_the_oracle(profile, cost, count):
    found = capacity.seconds(profile, cost, jnp.full(CLIENTS, count), examples=jnp.full(CLIENTS, 7), probes=1)
    wanted = [oracle_seconds(profile, cost, client, count, 7, 1) for client in range(CLIENTS)]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_no_limit_gives_all_slots_and_no_memory_none():
    cost = RoundCost(*(jnp.float32(1e6) for _ in range(8)))
    profile = capacity.uniform(3)
    for deadline in (None, float("inf"), jnp.float32(jnp.inf)):
        assert (capacity.slots(profile, cost, deadline=deadline, max_slots=4) == 4).all()
    assert (capacity.slots(profile, cost, deadline=1e-3, max_slots=4) == 0).all()
    unlimited = ClientProfile(*[jnp.full(3, jnp.inf)] * 4)
    assert (capacity.slots(unlimited, cost, deadline=1.0, max_slots=4) == 4).all()
    poor = dataclasses.replace(unlimited, memory_bytes=jnp.array([1.9e6, 2e6, 3.5e6]))
    np.testing.assert_array_equal(capacity.slots(poor, cost, deadline=None, max_slots=4), [0, 1, 2])


def test_a_constant_deadline_is_checked_inside_jit():
    cost, profile, limit = RoundCost(*(jnp.float32(1.0) for _ in range(8))), capacity.uniform(2), jnp.float32(5)
    jitted = jax.jit(lambda pace: capacity.slots(profile, cost, deadline=limit, max_slots=3, pace=pace))
    np.testing.assert_array_equal(jitted(jnp.ones(2)), capacity.slots(profile, cost, deadline=5.0, max_slots=3))


def test_slots_work_under_jit_with_a_traced_deadline():
    cost = RoundCost(*(jnp.float32(1e6) for _ in range(8)))
    profile = ClientProfile.sample(jax.random.key(0), 50, source="tiers")
    solve = jax.jit(lambda deadline: capacity.slots(profile, cost, deadline=deadline, max_slots=8))
    few, many = solve(5.0), solve(20.0)
    assert (few <= many).all() and few.sum() < many.sum()


def test_bad_arguments_are_refused():
    cost = RoundCost(*(jnp.float32(1.0) for _ in range(8)))
    profile = capacity.uniform(2)
    with pytest.raises(ValueError, match="max_slots is 0"):
        capacity.slots(profile, cost, deadline=None, max_slots=0)
    for deadline in (-1.0, jnp.float32(-1)):
        with pytest.raises(ValueError, match="deadline is -1"):
            capacity.slots(profile, cost, deadline=deadline, max_slots=1)
    with pytest.raises(ValueError, match="beta is 2"):
        capacity.observe(jnp.ones(2), jnp.ones(2), jnp.ones(2), beta=2.0)
    with pytest.raises(ValueError, match="rate is -1"):
        capacity.forgive(jnp.ones(2), rate=-1.0)
    with pytest.raises(ValueError, match="probes is -1"):
        capacity.slots(profile, cost, deadline=None, max_slots=1, probes=-1)
    with pytest.raises(ValueError, match="num_clients is 0"):
        capacity.uniform(0)
    with pytest.raises(ValueError, match="memory_bytes is 0"):
        capacity.uniform(1, memory_bytes=0.0)


def test_a_slow_client_gets_fewer_slots_and_a_broken_profile_none():
    cost = RoundCost(*(jnp.float32(1e6) for _ in range(8)))
    profile = capacity.uniform(3)
    deadline = float(capacity.seconds(profile, cost, jnp.full(3, 4))[0])
    slots = capacity.slots(profile, cost, deadline=deadline, max_slots=4, pace=jnp.array([1.0, 1.5, 100.0]))
    assert slots[0] == 4 and 0 < slots[1] < 4 and slots[2] == 0
    broken = dataclasses.replace(profile, memory_bytes=profile.memory_bytes.at[1].set(jnp.nan))
    np.testing.assert_array_equal(capacity.slots(broken, cost, deadline=None, max_slots=4), [4, 0, 4])


def test_pace_is_a_moving_average_of_observed_over_expected_times():
    pace = capacity.observe(jnp.array([1.0, 2.0, 1.0]), jnp.array([3.0, 1.0, 0.0]), jnp.array([1.0, 1.0, 0.0]), beta=0.25)
    np.testing.assert_allclose(pace, [1.5, 1.75, 1.0])
    unknown = capacity.observe(jnp.full(2, 2.0), jnp.array([jnp.nan, jnp.inf]), jnp.ones(2), beta=0.25)
    np.testing.assert_array_equal(unknown, 2.0, err_msg="what is not finite teaches nothing")


def test_what_a_client_still_has_is_not_downloaded():
    cost = RoundCost(*(jnp.float32(1e6) for _ in range(8)))
    profile = capacity.uniform(1)
    whole, half = (capacity.seconds(profile, cost, jnp.array([2]), probes=2, downloads=d)[0] for d in (None, jnp.array([2])))
    np.testing.assert_allclose(whole - half, 2 * 1e6 / profile.downlink_bytes_per_second[0], rtol=1e-5)
