"""Tests of expert parameters: the split of a model, dispatch into slots and the way back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_jax import NO_EXPERT, ExpertParam, Slots, partition
from fedmoe_jax.experts import RouterParam, SlotState, bind, combine, gather, held_mask, num_experts, report
from fedmoe_jax.models import create

CLIENTS, SLOTS, EXPERTS = 4, 3, 5
held_arrays = st.lists(st.integers(NO_EXPERT, EXPERTS - 1), min_size=CLIENTS * SLOTS, max_size=CLIENTS * SLOTS).map(
    lambda values: np.array(values, np.int32).reshape(CLIENTS, SLOTS)
)


def mlp(**options):
    return create("mlp", input_shape=(6,), num_classes=3, num_experts=EXPERTS, top_k=2, seed=0, hidden=8, expert_hidden=4, **options)


def slot_state(slots=EXPERTS):
    return SlotState(Slots(jnp.ones(slots, bool), jnp.zeros(slots)))


class Layer(nnx.Module):
    """A module with whatever variables it is given."""

    def __init__(self, **variables):
        for name, variable in variables.items():
            setattr(self, name, variable)


def test_partition_splits_by_type_and_merges_back():
    model = mlp()
    parts = partition(model)
    names = {path[-1] for path, _ in nnx.to_flat_state(parts.experts)}
    assert names == {"router", "w_in", "w_out", "b_in", "b_out"}
    assert all(leaf.shape[0] == EXPERTS for leaf in jax.tree.leaves(parts.experts))
    shared = {path[0] for path, _ in nnx.to_flat_state(parts.shared)}
    assert shared == {"into", "norm", "head"}
    whole = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert whole == sum(leaf.size for leaf in jax.tree.leaves((parts.experts, parts.shared)))
    assert num_experts(parts.experts) == EXPERTS
    x = jnp.linspace(-1, 1, 12).reshape(2, 6)
    bound = bind(parts, parts.experts, parts.shared, Slots(jnp.ones(EXPERTS, bool), jnp.zeros(EXPERTS)))
    np.testing.assert_array_equal(bound(x), model(x))


def test_router_rows_can_be_told_apart():
    router, others = nnx.split_state(partition(mlp()).experts, RouterParam, ...)
    assert [path[-1] for path, _ in nnx.to_flat_state(router)] == ["router"]
    assert len(jax.tree.leaves(others)) == 4


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (lambda: dict(w=nnx.Param(jnp.zeros((5, 2)))), "no ExpertParam"),
        (lambda: dict(a=ExpertParam(jnp.zeros((5, 2))), b=ExpertParam(jnp.zeros((4, 2))), s=slot_state()), "different leading sizes"),
        (lambda: dict(a=ExpertParam(jnp.zeros(())), s=slot_state()), "different leading sizes"),
        (lambda: dict(a=ExpertParam(jnp.zeros((5, 2)))), "a has no SlotState"),
        (
            lambda: dict(inner=Layer(a=ExpertParam(jnp.zeros((5, 2)))), other=Layer(s=slot_state())),
            "inner.a has no SlotState",
        ),
        (lambda: dict(a=ExpertParam(jnp.zeros((5, 2))), s=slot_state(), m=nnx.BatchStat(jnp.zeros(2))), "batch statistics"),
    ],
)
def test_partition_refuses(variables, message):
    with pytest.raises(ValueError, match=message):
        partition(Layer(**variables()))


def test_bind_does_not_touch_the_original_and_report_adds_up_layers():
    model = mlp()
    parts = partition(model)
    held = jnp.array([True, False, True])
    experts = gather(parts.experts, jnp.array([4, NO_EXPERT, 1]))
    bound = bind(parts, experts, parts.shared, Slots(held, jnp.zeros(3), jnp.array([True, True, False])))
    assert bound(jnp.ones((3, 6))).shape == (3, 3)
    tokens, penalty = report(bound)
    np.testing.assert_array_equal(tokens, [[1, 0, 1], [1, 0, 1], [0, 0, 0]])
    assert penalty.shape == () and model.moe.slots.get_value().tokens is None


def test_report_refuses_a_layer_that_ignores_its_slots():
    with pytest.raises(ValueError, match="does not read its SlotState"):
        report(Layer(a=ExpertParam(jnp.zeros((5, 2))), s=slot_state()))


@settings(max_examples=40, deadline=None)
@given(held=held_arrays, seed=st.integers(0, 1000))
def test_gather_combine_and_mask_match_loops(held, seed):
    draw = np.random.default_rng(seed)
    tree = {"a": draw.normal(size=(EXPERTS, 2, 3)).astype(np.float32), "b": draw.normal(size=(EXPERTS,)).astype(np.float32)}
    weight = draw.uniform(0, 3, size=held.shape).astype(np.float32)
    slots = jax.tree.map(np.asarray, gather(jax.tree.map(jnp.asarray, tree), jnp.asarray(held)))
    mask = np.zeros((CLIENTS, EXPERTS), bool)
    total = {name: np.zeros_like(value) for name, value in tree.items()}
    for client in range(CLIENTS):
        for slot in range(SLOTS):
            expert = held[client, slot]
            if expert == NO_EXPERT:
                continue
            mask[client, expert] = True
            for name, value in tree.items():
                np.testing.assert_array_equal(slots[name][client, slot], value[expert])
                total[name][expert] += weight[client, slot] * value[expert]
    combined = combine(jax.tree.map(jnp.asarray, slots), jnp.asarray(held), jnp.asarray(weight), EXPERTS)
    for name in tree:
        np.testing.assert_allclose(combined[name], total[name], rtol=1e-5, atol=1e-5)
    added = combine(jax.tree.map(jnp.asarray, slots), jnp.asarray(held), jnp.asarray(weight), EXPERTS, onto=jax.tree.map(jnp.asarray, tree))
    for name in tree:
        np.testing.assert_allclose(added[name], tree[name] + total[name], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(held_mask(jnp.asarray(held), EXPERTS), mask)


def test_empty_slots_are_lost_whatever_they_hold():
    held = jnp.full((2, 3), NO_EXPERT)
    combined = combine(jnp.full((2, 3, 4), jnp.inf), held, jnp.ones((2, 3)), EXPERTS)
    np.testing.assert_array_equal(combined, np.zeros((EXPERTS, 4)))
    assert not held_mask(held, EXPERTS).any()


def test_combine_is_the_transpose_of_gather():
    held = jnp.array([[0, 4, 4], [2, 0, 1]])
    weights, slots = jax.random.normal(jax.random.key(0), (EXPERTS, 3)), jax.random.normal(jax.random.key(1), (2, 3, 3))
    left = (gather(weights, held) * slots).sum()
    right = (weights * combine(slots, held, jnp.ones((2, 3)), EXPERTS)).sum()
    np.testing.assert_allclose(left, right, rtol=1e-5)
