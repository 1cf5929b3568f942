"""Models: through partition and bind, trained as clients train them, causal, and made by name."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fedmoe_jax import experts, models
from fedmoe_jax.base import Batch
from fedmoe_jax.experts import Slots
from fedmoe_jax.models.losses import cross_entropy
from fedmoe_jax.nn.linear import as_float

E, CLASSES, EXAMPLES, LENGTH = 6, 5, 4, 7
SHAPES = {"mlp": (3, 4), "resnet": (8, 8, 2), "transformer": (LENGTH,)}
OPTIONS = {
    "mlp": {"hidden": 8, "expert_hidden": 8},
    "resnet": {"widths": (4, 8), "expert_hidden": 8},
    "transformer": {"features": 8, "heads": 4, "kv_heads": 2, "expert_hidden": 8},
}
NAMES = tuple(SHAPES)


def create(name, **options):
    common = {"input_shape": SHAPES[name], "num_classes": CLASSES, "num_experts": E, "top_k": 2, "seed": 0}
    return models.create(name, **common | OPTIONS[name] | options)


def batch(name, seed=0, examples=EXAMPLES):
    random = np.random.default_rng(seed)
    if name == "transformer":
        text = random.integers(0, CLASSES, (examples, LENGTH + 1))
        x, y = text[:, :-1], text[:, 1:]
    else:
        x, y = random.integers(0, 256, (examples, *SHAPES[name])).astype(np.uint8), random.integers(0, CLASSES, examples)
    return Batch(jnp.asarray(x), jnp.asarray(y), jnp.arange(examples) != 1)


def loss_of(parts):
    """(weights, held, prior, batch) -> mean loss with penalty, (logits, tokens): what a client minimises."""

    def loss(weights, held, prior, data):
        model = experts.bind(parts, *weights, Slots(held=held, prior=prior, mask=data.mask))
        logits = []
        values, aux = cross_entropy(lambda x: logits.append(model(x)) or logits[0], data, jax.random.key(0))
        tokens, penalty = experts.report(model)
        mean = jnp.where(data.mask, values, 0).sum() / data.mask.sum()
        return mean + penalty, (logits[0], tokens, aux["correct"])

    return loss


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    parts = experts.partition(create(request.param))
    return request.param, parts, jax.jit(jax.value_and_grad(loss_of(parts), has_aux=True))


def test_partition_and_shapes(case):
    name, parts, run = case
    assert experts.num_experts(parts.experts) == E
    assert jax.tree.leaves(parts.shared)
    weights = (parts.experts, parts.shared)
    assert {leaf.dtype for leaf in jax.tree.leaves(weights)} == {jnp.dtype("float32")}
    (loss, (logits, tokens, correct)), _ = run(weights, jnp.ones(E, bool), jnp.zeros(E), batch(name))
    inner = (LENGTH,) if name == "transformer" else ()
    assert logits.shape == (EXAMPLES, *inner, CLASSES)
    assert 0.5 < float(loss) < 5
    layers, choices = (2, 2 * LENGTH) if name == "transformer" else (1, 2)
    np.testing.assert_array_equal(tokens.sum(1), layers * choices * (np.arange(EXAMPLES) != 1))
    assert correct.shape == (EXAMPLES,)


def test_gathered_slots_equal_the_full_model_restricted_to_them(case):
    name, parts, run = case
    held = jnp.array([4, -1, 1])
    prior = jnp.linspace(-1, 1, E)
    data = batch(name)
    slots = (experts.gather(parts.experts, held), parts.shared)
    (loss, (logits, tokens, _)), gradient = run(slots, held >= 0, prior[held], data)
    restricted = jnp.zeros(E, bool).at[jnp.array([4, 1])].set(True)
    (full_loss, (full_logits, full_tokens, _)), full = run((parts.experts, parts.shared), restricted, prior, data)
    np.testing.assert_allclose(loss, full_loss, rtol=1e-5)
    np.testing.assert_allclose(logits, full_logits, atol=1e-5)
    np.testing.assert_array_equal(tokens[:, jnp.array([0, 2])], full_tokens[:, jnp.array([4, 1])])
    np.testing.assert_array_equal(tokens[:, 1], 0)
    combined = experts.combine(jax.tree.map(lambda g: g[None], gradient[0]), held[None], jnp.ones((1, 3)), E)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), (combined, gradient[1]), full)


def test_clients_without_experts_train_the_shared_part_only(case):
    name, parts, run = case
    held = jnp.full(3, -1)
    (loss, (_, tokens, _)), gradient = run((experts.gather(parts.experts, held), parts.shared), held >= 0, jnp.zeros(3), batch(name))
    assert np.isfinite(loss)
    assert not np.any(tokens)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient[0]))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient[1]))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(gradient[1]))


def test_gradients_of_a_cohort_equal_those_of_each_client(case):
    name, parts, run = case
    held = jnp.array([[0, 3, 5], [2, -1, -1]])
    data = jax.tree.map(lambda *leaves: jnp.stack(leaves), batch(name, 1), batch(name, 2))
    gathered = experts.gather(parts.experts, held)
    shared = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.9 * leaf]), parts.shared)  # clients have weights of their own
    arguments = ((gathered, shared), held >= 0, jnp.zeros((2, 3)), data)
    together = jax.jit(jax.vmap(run))(*arguments)
    for client in range(2):
        alone = run(*jax.tree.map(lambda leaf, client=client: leaf[client], arguments))
        of_client = jax.tree.map(lambda leaf, client=client: leaf[client], together)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), alone, of_client)


def test_sgd_lowers_the_loss(case):
    name, parts, run = case
    weights, data = (parts.experts, parts.shared), batch(name)
    losses = []
    for _ in range(11):
        (loss, _), gradient = run(weights, jnp.ones(E, bool), jnp.zeros(E), data)
        weights = jax.tree.map(lambda w, g: w - 0.1 * g, weights, gradient)
        losses.append(float(loss))
    assert losses[1] < losses[0]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_experts_are_the_only_way_through(name):
    model = create(name)
    for state in (model.moe.w_out, model.moe.b_out):
        state.set_value(jnp.zeros_like(state.get_value()))
    logits = nnx.jit(lambda model, x: model(x))(model, batch(name).x)
    np.testing.assert_array_equal(logits, np.broadcast_to(logits[:1], logits.shape))


def test_uint8_is_scaled():
    model, x = create("mlp"), batch("mlp").x
    run = nnx.jit(lambda model, x: model(x))
    np.testing.assert_allclose(run(model, x), run(model, x.astype(jnp.float32) / 255), atol=1e-6)
    assert as_float(jnp.array([0, 255], jnp.uint8)).tolist() == [0, 1]
    assert as_float(jnp.array([0, 255], jnp.int32)).tolist() == [0, 255]


def test_every_model_computes_in_dtype():
    for name in NAMES:
        logits = jax.eval_shape(lambda x, name=name: create(name, dtype="bfloat16")(x), batch(name).x)
        assert logits.dtype == jnp.bfloat16, name


def test_images_without_channel_axis():
    logits = jax.eval_shape(lambda x: create("resnet", input_shape=(6, 5), widths=(4,))(x), jnp.ones((2, 6, 5)))
    assert logits.shape == (2, CLASSES)


def test_seed_decides_the_weights():
    leaves = [jax.tree.leaves(nnx.state(create("mlp", seed=seed), nnx.Param)) for seed in (0, 0, 1)]
    assert all(np.array_equal(a, b) for a, b in zip(leaves[0], leaves[1], strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(leaves[0], leaves[2], strict=True))


@pytest.mark.parametrize("options", [{}, {"tie_embeddings": True, "qk_norm": "head", "head_dim": 6}])
def test_transformer_is_causal(options):
    model = create("transformer", top_k=1, layers=1, **options)
    run = nnx.jit(lambda model, x: model(x))
    x = batch("transformer").x
    for position in (0, 3, LENGTH - 1):
        other = x.at[:, position].set((x[:, position] + 1) % CLASSES)
        a, b = run(model, x), run(model, other)
        np.testing.assert_allclose(a[:, :position], b[:, :position], atol=1e-6)
        assert np.abs(a[:, position:] - b[:, position:]).max() > 1e-3


def test_transformer_has_names_for_pretrained_weights():
    model = create("transformer", head_dim=6, qk_norm="head")
    shapes = {".".join(map(str, path)): v.shape for path, v in nnx.iter_graph(model) if isinstance(v, nnx.Param)}
    assert shapes["embedding"] == (CLASSES, 8)
    assert shapes["head.kernel"] == (8, CLASSES)
    assert shapes["layers.0.attention.q.kernel"] == (8, 24)
    assert shapes["layers.1.attention.k.kernel"] == (8, 12)
    assert shapes["layers.1.attention.q_norm.scale"] == (6,)
    assert shapes["layers.1.moe.router"] == (E, 8)
    assert shapes["layers.1.moe.w_gate"] == (E, 8, 8)
    assert not [name for name in shapes if "bias" in name or ".b_" in name]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vgg", {}, "^model is 'vgg', must be one of mlp, resnet, transformer"),
        ("mlp", {"depth": 3, "width": 2}, "^model 'mlp' has no option depth, width"),
        ("mlp", {"top_k": 9}, "^top_k is 9"),
        ("resnet", {"input_shape": (4,)}, "^input_shape is"),
        ("resnet", {"widths": ()}, "^widths is"),
        ("transformer", {"heads": 3}, "^kv_heads is 2, must divide heads"),
        ("transformer", {"heads": 3, "kv_heads": 1}, "^heads is 3, must divide features"),
        ("transformer", {"head_dim": 3}, "^head_dim is 3"),
        ("transformer", {"qk_norm": "layer"}, "^qk_norm is"),
        ("no_such_module:make", {}, "^model is 'no_such_module:make', which cannot be imported"),
        ("json:make", {}, "^model is 'json:make', which cannot be imported"),
        (":make", {}, "^model is ':make', which cannot be imported"),
        ("json:dumps", {}, "^model 'json:dumps' must be a callable that takes"),
        ("json:__name__", {}, "^model 'json:__name__' must be a callable that takes"),
        ("builtins:dict", {}, "^model 'builtins:dict' returned dict"),
    ],
)
def test_impossible_models_are_named(name, options, message):
    arguments = {"input_shape": (4, 4), "num_classes": 3, "num_experts": 4, "top_k": 1, "seed": 0} | options
    with pytest.raises(ValueError, match=message):
        models.create(name, **arguments)


def test_own_model_by_name(monkeypatch):
    class Own(models.MLP):
        def __init__(self, *, input_shape, num_classes, num_experts, top_k, seed, dtype, hidden):
            sizes = {"num_experts": num_experts, "top_k": top_k, "hidden": hidden, "expert_hidden": 8}
            super().__init__(input_shape, num_classes, **sizes, dtype=dtype, rngs=nnx.Rngs(seed))

    module = types.ModuleType("own_models")
    module.Own = Own
    monkeypatch.setitem(sys.modules, "own_models", module)
    arguments = {"input_shape": SHAPES["mlp"], "num_classes": CLASSES, "num_experts": E, "top_k": 1, "seed": 0}
    assert models.create("own_models:Own", **arguments, hidden=8).into.kernel.shape == (12, 8)
    with pytest.raises(ValueError, match="model 'own_models:Own' must be a callable that takes"):
        models.create("own_models:Own", **arguments, hidden=8, depth=5)


def test_longer_text_than_max_length():
    with pytest.raises(ValueError, match="x has 7 tokens, max_length is 6"):
        create("transformer", max_length=6)(batch("transformer").x)


def test_a_transformer_computes_its_layers_again_in_less_memory():
    shape = dict(input_shape=(64,), num_classes=7, num_experts=2, top_k=1, seed=0, layers=2, features=16, heads=2, expert_hidden=64)
    x = jax.random.randint(jax.random.key(0), (8, 64), 0, 7)

    def outcome(remat):
        graph, state = nnx.split(models.create("transformer", **shape, remat=remat))

        def loss(state):
            model = nnx.merge(graph, state)
            return jax.nn.logsumexp(model(x), axis=-1).mean(), experts.report(model)

        kept = jax.eval_shape(lambda state: jax.vjp(loss, state, has_aux=True)[1], state)
        gradient = jax.jit(jax.value_and_grad(loss, has_aux=True, allow_int=True))
        return gradient(state), sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))

    (plain, most), (again, less) = outcome(False), outcome(True)
    for ours, wanted in zip(jax.tree.leaves(again), jax.tree.leaves(plain), strict=True):
        if ours.dtype != jax.dtypes.float0:
            np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-6)
    assert less < 0.3 * most
