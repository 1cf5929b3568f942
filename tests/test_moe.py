"""The MoE layer: its three ways to compute rows against one slow oracle, held experts, masks, and auxiliary losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from moe_oracle import CLIENTS, EXAMPLES, FEATURES, HIDDEN, SLOTS, TOKENS, layer, limit_of, oracle, scenario, split

from fedmoe_jax.experts import ExpertParam, RouterParam, Slots
from fedmoe_jax.nn import dispatch, routing
from fedmoe_jax.nn.moe import MoE

MODES = ("dense", "tiled", "limited")


def force(monkeypatch, mode):
    """Makes dropless layers of any size choose `mode`."""
    monkeypatch.setattr(dispatch, "tiled_rows", lambda pairs, slots: 0 if mode == "tiled" else 1 << 30)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("top_k", "activation"), [(1, "relu"), (2, "swiglu"), (3, "relu")])
def test_values_equal_oracle_for_a_cohort(monkeypatch, mode, top_k, activation):
    force(monkeypatch, mode)
    weights, call = split(layer(mode, top_k=top_k, activation=activation))
    cohort = jax.jit(jax.vmap(call, (None, 0, 0, 0, 0)))
    double = {name: np.asarray(w, np.float64) for name, w in weights.items()}
    for seed in range(3):
        inputs = scenario(seed)
        y, tokens, penalty = cohort(weights, *inputs)
        for c in range(CLIENTS):
            one = [value[c] for value in inputs]
            expected = oracle(double, *one, top_k=top_k, limit=limit_of(mode, top_k), at=(double["router"], one[0]))
            np.testing.assert_allclose(y[c], expected[0], atol=2e-5)
            np.testing.assert_array_equal(tokens[c], expected[1])
            np.testing.assert_allclose(penalty[c], expected[2], rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("top_k", [1, 2])
def test_gradients_equal_differences_of_oracle(monkeypatch, mode, top_k):
    force(monkeypatch, mode)
    weights, call = split(layer(mode, top_k=top_k))
    x, *slots = scenario(7)
    random = np.random.default_rng(0)
    each = {name: np.stack([np.asarray(w)] * CLIENTS) for name, w in weights.items()}
    cotangent = random.normal(size=(EXAMPLES, TOKENS, FEATURES)).astype(np.float32)

    def objective(weights, x, *slots):
        y, _, penalty = call(weights, x, *slots)
        return (y * cotangent).sum() + penalty

    by_weights, by_x = jax.jit(jax.vmap(jax.grad(objective, (0, 1))))(each, x, *slots)
    for c in range(CLIENTS):
        base = {name: np.asarray(w, np.float64) for name, w in weights.items()} | {"x": x[c].astype(np.float64)}
        one = [value[c] for value in slots]
        for name, gradient in (by_weights | {"x": by_x}).items():
            direction = random.normal(size=base[name].shape)

            def value(step, name=name, direction=direction, base=base, one=one):
                moved = base | {name: base[name] + step * direction}
                at = (base["router"], base["x"])
                y, _, penalty = oracle(moved, moved["x"], *one, top_k=top_k, limit=limit_of(mode, top_k), at=at)
                return (y * cotangent).sum() + penalty

            expected = (value(1e-6) - value(-1e-6)) / 2e-6
            found = (np.asarray(gradient[c], np.float64) * direction).sum()
            np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4, err_msg=f"client {c}, {name}")


@pytest.mark.parametrize("mode", MODES)
def test_no_held_expert_gives_zero_and_finite_gradients(monkeypatch, mode):
    force(monkeypatch, mode)
    for top_k in (1, 2):
        weights, call = split(layer(mode, top_k=top_k))
        x, *_ = scenario(3)

        def objective(weights, x, call=call):
            y, tokens, penalty = call(weights, x, jnp.zeros(SLOTS, bool))
            return y.sum() + penalty, (y, tokens, penalty)

        gradients, (y, tokens, penalty) = jax.jit(jax.grad(objective, (0, 1), has_aux=True))(weights, jnp.asarray(x[0]))
        assert not np.any(y)
        assert not np.any(tokens)
        assert float(penalty) == 0
        for gradient in jax.tree.leaves(gradients):
            np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("mode", MODES)
def test_empty_slots_get_no_gradient(monkeypatch, mode):
    force(monkeypatch, mode)
    weights, call = split(layer(mode))
    x, *_ = scenario(3)
    held = np.array([True, False, True, True, False, False, True, True])

    def objective(weights):
        y, _, penalty = call(weights, jnp.asarray(x[0]), jnp.asarray(held), jnp.where(held, 0.0, 50.0))
        return (y**2).sum() + penalty

    for name, gradient in jax.jit(jax.grad(objective))(weights).items():
        moved = np.abs(gradient).reshape(SLOTS, -1).max(1) > 0
        np.testing.assert_array_equal(moved, held, err_msg=name)


@pytest.mark.parametrize("mode", MODES)
def test_masked_examples_change_nothing(monkeypatch, mode):
    force(monkeypatch, mode)
    weights, call = split(layer(mode))
    x, held, prior, _ = (jnp.asarray(value[1]) for value in scenario(5, clients=2))
    mask = jnp.arange(EXAMPLES) % 3 > 0

    def objective(weights, x):
        y, tokens, penalty = call(weights, x, held, prior, mask)
        return jnp.where(mask[:, None, None], y, 0).sum() + penalty, (y, tokens, penalty)

    run = jax.jit(jax.grad(objective, has_aux=True))
    result = run(weights, x)
    other = run(weights, jnp.where(mask[:, None, None], x, 100 * x[::-1] + 1))
    jax.tree.map(np.testing.assert_array_equal, result, other)
    for value in result[1][:2]:
        np.testing.assert_array_equal(np.abs(value).reshape(EXAMPLES, -1).max(1) > 0, mask)


def test_single_choice_has_gate_one_and_teaches_the_router():
    logits = jnp.array([[0.3, -1.0, 2.0], [0.0, 4.0, 1.0]])
    held, real = jnp.array([True, True, False]), jnp.ones(2, bool)
    gates, gradient = jax.jit(jax.value_and_grad(lambda z: routing.route(z, held, real, top_k=1).gate.sum()))(logits)
    assert float(gates) == 2
    expected = jax.grad(lambda z: jax.nn.log_softmax(z[:, :2])[jnp.arange(2), jnp.array([0, 1])].sum())(logits)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)
    assert np.abs(gradient[:, :2]).min() > 0.01


def test_gates_without_renormalising_are_probabilities():
    logits = jnp.array([[0.3, -1.0, 2.0]])
    routed = routing.route(logits, jnp.ones(3, bool), jnp.ones(1, bool), top_k=2, renormalize=False)
    np.testing.assert_array_equal(routed.slot[:, 0], [2, 0])
    np.testing.assert_allclose(routed.gate[:, 0], jax.nn.softmax(logits)[0, jnp.array([2, 0])], rtol=1e-6)


def test_balance_loss_is_one_when_balanced_and_grows_when_not():
    held, real = jnp.array([True, True, False, True]), jnp.ones(30, bool)
    even = jnp.log(jnp.eye(4)[jnp.array([0, 1, 3] * 10)] * 0.4 + 0.3)
    skewed = jnp.zeros((30, 4)).at[:, 1].set(5.0)
    loss = jax.jit(lambda z: routing.balance_loss(routing.route(z, held, real, top_k=1), held, real))
    balance = [float(loss(z)) for z in (even, skewed)]
    np.testing.assert_allclose(balance[0], 1.0, rtol=1e-5)
    assert balance[1] > 2.5


def test_shared_experts_are_added_everywhere_and_are_ordinary_parameters():
    model = MoE(FEATURES, HIDDEN, SLOTS, activation="swiglu", shared_experts=2, rngs=nnx.Rngs(0))
    assert model.shared.into.kernel.shape == (FEATURES, 2 * HIDDEN)
    assert not any(isinstance(v, ExpertParam) for _, v in nnx.iter_graph(model.shared))

    @nnx.jit
    def run(model, x):
        shared = model.shared
        y, inner = model(x), shared.out(jax.nn.silu(shared.gate(x)) * shared.into(x))
        model.shared = None
        return y, model(x), inner

    with_shared, without, shared = run(model, jnp.asarray(scenario(0)[0][0]))
    np.testing.assert_allclose(with_shared, without + shared, atol=1e-5)
    assert np.abs(shared).max() > 0.1


def test_parameters_and_shapes():
    model = MoE(FEATURES, HIDDEN, SLOTS, activation="gelu", out_features=3, rngs=nnx.Rngs(0))
    shapes = {path[0]: v.shape for path, v in nnx.iter_graph(model) if isinstance(v, ExpertParam)}
    assert shapes == {
        "router": (SLOTS, FEATURES),
        "w_in": (SLOTS, FEATURES, HIDDEN),
        "w_out": (SLOTS, HIDDEN, 3),
        "b_in": (SLOTS, HIDDEN),
        "b_out": (SLOTS, 3),
    }
    assert isinstance(model.router, RouterParam)
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(x):
        model = nnx.merge(graphdef, state, copy=True)
        return model(x), model.slots.get_value().tokens, model.slots.get_value().penalty

    for shape in ((2,), (2, 3, 4), (0,), (2, 0)):
        y, tokens, penalty = run(jnp.ones((*shape, FEATURES)))
        assert y.shape == (*shape, 3)
        assert tokens.shape == (shape[0], SLOTS)
        assert np.isfinite(penalty)


def test_computes_in_dtype_with_float32_parameters():
    x = jnp.asarray(scenario(0)[0][0])
    for mode in ("dense", "limited"):
        (weights, call), (half_weights, half_call) = split(layer(mode)), split(layer(mode, dtype=jnp.bfloat16))
        assert {w.dtype for w in half_weights.values()} == {jnp.dtype("float32")}
        held = jnp.ones(SLOTS, bool)
        (y, tokens, _), (half, half_tokens, penalty) = call(weights, x, held), half_call(half_weights, x, held)
        assert half.dtype == jnp.bfloat16
        assert penalty.dtype == jnp.float32
        np.testing.assert_array_equal(tokens, half_tokens)
        np.testing.assert_allclose(half.astype(jnp.float32), y, atol=0.1, rtol=0.05)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"top_k": 0}, "top_k"),
        ({"top_k": SLOTS + 1}, "top_k"),
        ({"activation": "tanh"}, "activation"),
        ({"token_capacity": 0.0}, "token_capacity"),
        ({"shared_experts": -1}, "shared_experts"),
        ({"num_experts": 0}, "num_experts"),
        ({"hidden": 0}, "hidden"),
    ],
)
def test_impossible_arguments_are_named(options, name):
    arguments = {"features": FEATURES, "hidden": HIDDEN, "num_experts": SLOTS} | options
    with pytest.raises(ValueError, match=f"^{name} is"):
        MoE(**arguments, rngs=nnx.Rngs(0))


def test_weights_and_slots_must_agree():
    model = layer()
    model.slots.set_value(Slots(held=jnp.ones(2, bool), prior=jnp.zeros(2)))
    with pytest.raises(ValueError, match=r"slots\.held has 2 entries, the weights have 8 experts"):
        model(jnp.ones((2, FEATURES)))
