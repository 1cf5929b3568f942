"""Tests of costs: FLOPs counted by hand, bytes of real arrays, and the chunk that they imply."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedmoe_jax import partition
from fedmoe_jax.base import Batch, RoundCost
from fedmoe_jax.local import plan
from fedmoe_jax.local.cost import count_flops, round_cost, tree_bytes
from fedmoe_jax.models import create
from fedmoe_jax.models.losses import cross_entropy
from fedmoe_jax.nn.attention import is_fused

HIDDEN, EXPERT_HIDDEN, FEATURES, CLASSES, BATCH = 8, 16, 6, 3, 4
A, B = jnp.zeros((2, 3)), jnp.zeros((3, 5))


def cost(num_experts=4, optimizer=None, batch_size=BATCH, **options):
    shape = dict(input_shape=(FEATURES,), num_classes=CLASSES, num_experts=num_experts, top_k=1, seed=0)
    model = create("mlp", **shape, hidden=HIDDEN, expert_hidden=EXPERT_HIDDEN)
    batch = Batch(jnp.zeros((batch_size, FEATURES)), jnp.zeros(batch_size, jnp.int32), jnp.ones(batch_size, bool))
    return round_cost(partition(model), cross_entropy, optimizer or optax.sgd(0.1), batch, **options)


def looped(length):
    return lambda a, b: jax.lax.fori_loop(0, length, lambda _, total: total + a @ b, jnp.zeros((2, 5)))


@pytest.mark.parametrize(
    ("function", "args", "flops"),
    [
        (jnp.matmul, (A, B), 2 * 2 * 3 * 5),
        (jnp.add, (A, A), 0),
        (lambda a: a @ a, (jnp.zeros((0, 0)),), 0),
        (jax.vmap(jnp.matmul), (jnp.zeros((7, 2, 3)), jnp.zeros((7, 3, 5))), 7 * 60),
        (lambda a, b: jnp.einsum("end,edh->enh", a, b), (jnp.zeros((4, 2, 3)), jnp.zeros((4, 3, 5))), 4 * 60),
        (looped(9), (A, B), 9 * 60),
        (jax.jit(looped(9)), (A, B), 9 * 60),
        (lambda a, b, n: looped(n)(a, b), (A, B, 9), 60),
        (lambda a, b, p: jax.lax.cond(p, lambda: a @ b + a @ b, lambda: a @ b), (A, B, True), 2 * 60),
        (jax.grad(lambda a, b: (a @ b).sum(), (0, 1)), (A, B), 3 * 60),
        (
            lambda x, w: jax.lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")),
            (jnp.zeros((2, 6, 6, 3)), jnp.zeros((3, 3, 3, 5))),
            2 * (2 * 4 * 4 * 5) * (3 * 3 * 3),
        ),
    ],
)
def test_flops_by_hand(function, args, flops):
    assert count_flops(function, *args) == flops


def test_shapes_will_do():
    shapes = (jax.ShapeDtypeStruct((2, 3), jnp.float32), jax.ShapeDtypeStruct((3, 5), jnp.float32))
    assert count_flops(jnp.matmul, *shapes) == 60


def test_bytes_are_those_of_the_arrays():
    assert tree_bytes({"a": jnp.zeros((3, 4)), "b": (jnp.zeros(5, jnp.int8), jnp.zeros((), bool))}) == 48 + 5 + 1
    assert tree_bytes(()) == 0
    expert = HIDDEN + HIDDEN * EXPERT_HIDDEN + EXPERT_HIDDEN + EXPERT_HIDDEN * HIDDEN + HIDDEN
    assert cost().expert_bytes == 4 * expert
    shared = FEATURES * HIDDEN + HIDDEN + HIDDEN + HIDDEN * CLASSES + CLASSES
    assert cost().shared_bytes == 4 * shared
    assert cost(personal_router=True).expert_bytes == 4 * (expert - HIDDEN)


def test_costs_do_not_depend_on_the_number_of_experts():
    jax.tree.map(np.testing.assert_array_equal, cost(num_experts=2), cost(num_experts=64))


def test_optimizer_state_takes_memory_but_not_the_link():
    plain, adam = cost(), cost(optimizer=optax.adam(0.1))
    assert adam.expert_bytes == plain.expert_bytes and adam.shared_bytes == plain.shared_bytes
    np.testing.assert_allclose(adam.expert_memory - plain.expert_memory, 2 * plain.expert_bytes, rtol=0.01)
    assert plain.expert_memory > 3 * plain.expert_bytes + 4 * BATCH * (2 * EXPERT_HIDDEN + HIDDEN)  # weights, and what a batch leaves


def test_activations_grow_with_the_batch_and_flops_of_an_example_do_not():
    small, large = cost(batch_size=4), cost(batch_size=64)
    assert large.shared_memory > 4 * small.shared_memory
    np.testing.assert_allclose(large.shared_flops, small.shared_flops, rtol=1e-6)


def test_what_is_computed_again_takes_flops_instead_of_memory():
    text = Batch(jnp.zeros((4, 32), jnp.int32), jnp.zeros((4, 32), jnp.int32), jnp.ones(4, bool))

    def of_transformer(remat):
        shape = dict(input_shape=(32,), num_classes=5, num_experts=2, top_k=1, seed=0, layers=6, features=16, heads=2)
        model = create("transformer", **shape, expert_hidden=32, remat=remat)
        return round_cost(partition(model), cross_entropy, optax.sgd(0.1), text)

    plain, again = of_transformer(False), of_transformer(True)
    assert again.shared_memory < 0.6 * plain.shared_memory and again.expert_memory < plain.expert_memory
    assert 1.1 * plain.shared_flops < again.shared_flops < 1.5 * plain.shared_flops


def test_costs_do_not_depend_on_whose_attention_is_used(monkeypatch):
    text = Batch(jnp.zeros((4, 32), jnp.int32), jnp.zeros((4, 32), jnp.int32), jnp.ones(4, bool))
    shape = dict(input_shape=(32,), num_classes=5, num_experts=2, top_k=1, seed=0, layers=1, features=16, heads=2, dtype=jnp.bfloat16)
    parts = partition(create("transformer", **shape, expert_hidden=32))
    anywhere = round_cost(parts, cross_entropy, optax.sgd(0.1), text)
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(compute_capability="9.0")])
    assert is_fused((4, 32, 2, 8), jnp.bfloat16)
    assert round_cost(parts, cross_entropy, optax.sgd(0.1), text) == anywhere


def test_flops_of_an_expert_are_those_of_its_products():
    router = 3 * 2 * HIDDEN
    feed_forward = 3 * 2 * 2 * HIDDEN * EXPERT_HIDDEN
    assert router + feed_forward <= cost().expert_flops <= 1.5 * (router + feed_forward)
    assert cost().shared_flops > 0


def test_solo_evaluation_costs_a_forward_pass_of_each_expert_and_one_of_the_shared_part():
    solo = Batch(jnp.zeros((5, FEATURES)), jnp.zeros(5, jnp.int32), jnp.ones(5, bool))
    with_it, without = cost(solo_batch=solo), cost()
    assert without.solo_shared_flops == without.solo_expert_flops == 0
    assert with_it.solo_shared_flops == 5 * 2 * FEATURES * HIDDEN  # what comes after the experts is done for each of them
    router = 2 * HIDDEN
    assert with_it.solo_expert_flops == pytest.approx(5 * (router + 2 * 2 * HIDDEN * EXPERT_HIDDEN + 2 * HIDDEN * CLASSES), rel=0.1)
    assert with_it.expert_flops == without.expert_flops


def chunk(cohort_size, memory_bytes, probes=0):
    each = RoundCost(*(jnp.float32(n) for n in (0, 0, 100, 50, 0, 0, 0, 0)))
    return plan.chunk_size(each, cohort_size=cohort_size, max_slots=2, probes=probes, memory_bytes=memory_bytes)


def test_side_by_side_are_all_clients_but_what_the_cache_of_a_cpu_holds(monkeypatch):
    sizes = dict(cohort_size=1000, max_slots=1, probes=0)
    each = RoundCost(*map(np.float32, (0, 0, 1e5, 9e5, 0, 0, 0, 0)))
    halved = [plan.Choice("w", None, 0.0, 0.0, "", saved) for saved in (2e5, 3e5)]
    assert plan.side_by_side(None, each, (), **sizes) == 8
    assert plan.side_by_side(None, each, tuple(halved), **sizes) == 16
    assert plan.side_by_side(20, each, (), **sizes) == 20
    assert plan.side_by_side(2000, each, (), **sizes) == 1000
    assert plan.room(1e12) == plan.CACHE_BYTES and plan.room(1e3) == 1e3
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert plan.side_by_side(None, each, (), **sizes) == 1000
    assert plan.room(1e12) == 1e12


def test_chunk_size_fits_the_memory_and_splits_evenly():
    assert chunk(10, 1e12) == 10
    assert chunk(10, 0.0) == 1
    assert chunk(10, 9 * 200 / plan.MEMORY_SHARE) == 5  # 9 fit, but two chunks of 5 leave none nearly empty
    assert chunk(10, 9 * 200 / plan.MEMORY_SHARE, probes=2) == 5
    for fitting in range(1, 30):
        size = chunk(23, fitting * 200.0 / plan.MEMORY_SHARE)
        assert 1 <= size <= min(fitting, 23) and -(-23 // size) == -(-23 // min(fitting, 23))
