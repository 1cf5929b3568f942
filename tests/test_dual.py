"""The dual engine gives what the primal one does, without a client's own copy of any kernel."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_round
from flax import nnx
from small_round import algorithm, distance, population, run, weights

from fedmoe_jax import Population, alignment, models, nn, partition
from fedmoe_jax.base import Batch
from fedmoe_jax.local import dual, plan
from fedmoe_jax.local.cohort import Trainer, batch_shape
from fedmoe_jax.models.losses import cross_entropy

SGD = optax.sgd(0.3)
LINEAR = {
    "sgd": SGD,
    "momentum": optax.sgd(0.2, momentum=0.9),
    "nesterov": optax.sgd(0.2, momentum=0.9, nesterov=True),
    "weight decay": optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.3)),
    "decay of kernels only": optax.chain(optax.add_decayed_weights(0.1, mask=lambda p: jax.tree.map(lambda w: w.ndim > 1, p)), SGD),
    "schedule": optax.sgd(optax.linear_schedule(0.5, 0.1, 4)),
}


TWO_STEPS = (3, 8, 4, 1, 7, 5, 8, 2)
"""Examples of clients that take at most two steps, which compile sooner than three."""
LAYERS = [dict(token_capacity=1.0), dict(activation="swiglu"), dict(shared_experts=1)]


def both(data, count=2, **options):
    """(state, info) after `count` rounds by the primal and by the dual engine, and how far the former came."""
    primal, dual = (run(algorithm(engine=engine, **options), data, count) for engine in ("primal", "dual"))
    start = algorithm(engine="primal", **options).init(small_round.KEY, data)
    return primal, dual, distance(weights(primal[0]), weights(start))


def assert_same(data, tolerance=5e-6, **options):
    (primal, info), (dual, info_dual), moved = both(data, **options)
    assert moved > 0.01 and distance(weights(primal), weights(dual)) <= tolerance * moved
    np.testing.assert_allclose(info_dual.train_loss, info.train_loss, rtol=1e-5)
    np.testing.assert_array_equal(info_dual.tokens, info.tokens)
    for a, b in zip(jax.tree.leaves(primal.aligner), jax.tree.leaves(dual.aligner), strict=True):
        if jnp.issubdtype(a.dtype, jnp.floating):
            np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", LINEAR)
def test_optimizers(name):
    """Clients of 1 to 9 examples take 1 to 3 steps an epoch."""
    assert_same(population(), client_optimizer=LINEAR[name], local_epochs=1)


OPTIONS = {
    "loop of many steps": dict(client_optimizer=LINEAR["momentum"], local_steps=11),
    "decay, prox and chunks": dict(client_optimizer=LINEAR["weight decay"], prox=0.5, chunk_size=2),
    "prox on the shared part": dict(prox=0.5, prox_on="shared"),
    "solo, personal router and prior": dict(solo_examples=4, router="personal", router_prior=2.0),
}
OPTIONS["all of them"] = {name: value for options in OPTIONS.values() for name, value in options.items()}


@pytest.mark.parametrize("options", [*(pytest.param(name, marks=pytest.mark.slow) for name in list(OPTIONS)[:-1]), "all of them"])
def test_options(options):
    assert_same(population(), **OPTIONS[options])


@pytest.mark.slow
@pytest.mark.parametrize("cohort", [3, 8])
def test_more_and_fewer_pairs_than_experts(cohort):
    assert_same(population(sizes=TWO_STEPS), cohort_size=cohort, aligner=small_round.aligner(max_slots=1))


@pytest.mark.slow
def test_clients_with_fewer_slots_or_none():
    assert_same(population(memory_bytes=8000.0, sizes=TWO_STEPS), aligner=small_round.aligner(max_slots=3))


@pytest.mark.parametrize(
    "moe", [dict(token_capacity=1.0, activation="swiglu"), *(pytest.param(moe, marks=pytest.mark.slow) for moe in LAYERS)], ids=str
)
def test_layers(moe):
    assert_same(population(sizes=TWO_STEPS), of=small_round.model(top_k=2, **moe), aligner=small_round.aligner(max_slots=3))


def test_inputs_that_are_known_before_training(monkeypatch):
    """Products with them are made once for all steps; here of the first layer, whatever it costs, for clients of one to three steps."""
    monkeypatch.setattr(plan, "_worth_it", lambda use, steps: True)
    options = dict(client_optimizer=LINEAR["decay of kernels only"], prox=0.5, local_epochs=1)
    known = [choice.name for choice in algorithm(engine="dual", **options).plan(population()) if choice.use and choice.use.known]
    assert known == ["1.into.kernel"]
    assert_same(population(), **options)


def test_tiles_of_tokens():
    """So many tokens for so many slots that the layer sorts them into tiles."""
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(600, small_round.FEATURES)).astype(np.float32), draw.integers(0, small_round.CLASSES, 600)
    data = Population.from_arrays(x, y, list(np.arange(600).reshape(3, 200)))
    net = small_round.model(num_experts=8)
    choices = plan.engines(partition(net), cross_entropy, batch_shape(data, 200), slots=8, probes=0, steps=3, engine="dual", balance=8.0)
    assert any(choice.use is not None and choice.use.tiled for choice in choices)
    options = dict(of=net, cohort_size=3, batch_size=200, aligner=alignment.full(num_experts=8))
    assert_same(data, local_epochs=2, **options)


@pytest.mark.parametrize(
    ("tie_embeddings", "remat", "layers", "solo"),
    [
        (False, False, 1, 0),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(True, False, 2, 2), (False, False, 2, 2), (False, True, 2, 0)]),
    ],
)
def test_transformer(tie_embeddings, remat, layers, solo):
    text = np.random.default_rng(0).integers(0, 11, (24, 9)).astype(np.int32)
    data = Population.from_arrays(text[:, :-1], text[:, 1:], list(np.arange(24).reshape(4, 6)))
    small = dict(layers=layers, features=8, heads=2, kv_heads=1, expert_hidden=6, tie_embeddings=tie_embeddings, remat=remat)
    net = models.create("transformer", input_shape=(8,), num_classes=11, num_experts=4, top_k=1, seed=0, per_layer=True, **small)
    aligner = alignment.random(num_experts=4, max_slots=2, groups=layers)
    options = dict(of=net, cohort_size=4, batch_size=3, solo_examples=solo, aligner=aligner)
    chosen = {choice.name: choice.use for choice in algorithm(engine="dual", **options).plan(data)}
    assert (chosen["1.embedding"] is None) == tie_embeddings
    assert_same(data, **options)


@pytest.mark.slow
def test_a_large_vocabulary_in_a_loop():
    """A table of which a client sees few rows; `auto` takes the dual engine for it. One round, in which rounding grows less than in two."""
    text = np.random.default_rng(0).integers(0, 500, (24, 9)).astype(np.int32)
    data = Population.from_arrays(text[:, :-1], text[:, 1:], list(np.arange(24).reshape(4, 6)))
    small = dict(layers=1, features=8, heads=2, kv_heads=1, expert_hidden=6)
    net = models.create("transformer", input_shape=(8,), num_classes=500, num_experts=4, top_k=1, seed=0, **small)
    options = dict(of=net, cohort_size=4, batch_size=3, client_optimizer=LINEAR["momentum"], prox=0.1)
    auto = algorithm(engine="auto", local_epochs=1, **options).plan(data)
    assert {choice.name: choice.use is not None for choice in auto}["1.embedding"]
    assert_same(data, count=1, local_epochs=5, **options)


def test_what_is_computed_again_stays_primal():
    shape = dict(input_shape=(8,), num_classes=11, num_experts=4, top_k=1, seed=0, layers=1, features=8, heads=2, expert_hidden=6)
    text = Batch(jnp.zeros((2, 8), jnp.int32), jnp.zeros((2, 8), jnp.int32), jnp.ones(2, bool))
    choices = plan.engines(
        partition(models.create("transformer", kv_heads=1, **shape, remat=True)),
        cross_entropy,
        text,
        slots=2,
        probes=0,
        steps=2,
        engine="dual",
        balance=8.0,
    )
    assert [choice.name for choice in choices if choice.use] == ["1.embedding", "1.head.kernel"]


@pytest.mark.slow
def test_several_runs_side_by_side():
    """Under vmap over runs the weights that all clients share have an axis more."""
    data, alg = population(sizes=TWO_STEPS), algorithm(engine="dual")
    states = [alg.init(jax.random.key(seed), data) for seed in range(2)]
    states[1] = dataclasses.replace(states[1], shared=jax.tree.map(lambda w: 1.1 * w, states[1].shared))
    together, _ = jax.vmap(alg.step, (0, None))(jax.tree.map(lambda *rows: jnp.stack(rows), *states), data)
    for run_, state in enumerate(states):
        alone, _ = alg.step(state, data)
        mine = jax.tree.map(lambda rows, run_=run_: rows[run_], weights(together))
        assert distance(mine, weights(alone)) <= 1e-5 * distance(weights(alone), weights(state))


@pytest.mark.slow
def test_bfloat16():
    """As near as the primal engine to a round in float32."""
    half, full = (small_round.model(top_k=2, dtype=dtype) for dtype in (jnp.bfloat16, jnp.float32))
    data = population(sizes=TWO_STEPS)
    exact, _ = run(algorithm(of=full, engine="primal"), data)
    errors = {}
    for engine in ("primal", "dual"):
        state, _ = run(algorithm(of=half, engine=engine), data)
        errors[engine] = distance(weights(state), weights(exact))
    assert 0 < errors["dual"] <= 2 * errors["primal"]


@pytest.mark.parametrize("sum_tells", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_client_with_broken_data_is_left_out(sum_tells, monkeypatch):
    monkeypatch.setattr(Trainer, "_sum_tells", lambda *_: sum_tells)
    (primal, info), (dual, info_dual), moved = both(population(broken=(5,), sizes=TWO_STEPS))
    assert info_dual.rejected_updates == info.rejected_updates == 1
    assert distance(weights(primal), weights(dual)) <= 5e-6 * moved


def test_no_client_has_a_copy_of_a_kernel():
    """No value of the round holds more kernels of experts than the model has, or heads than one, however its axes are."""
    wide = dict(hidden=64, expert_hidden=96)
    data, clients = population(), 8
    options = dict(of=small_round.model(**wide), cohort_size=clients, aligner=small_round.aligner("balanced"), solo_examples=4)
    most = {}
    for engine in ("primal", "dual"):
        step = algorithm(engine=engine, **options)
        state = step.init(small_round.KEY, data)
        text = step.step.lower(state, data).as_text()
        for kernel in ("(?:64x96|96x64)", "64x3"):
            axes = re.findall(rf"tensor<((?:\d+x)*){kernel}x(?:f32|bf16)>", text)
            most[engine, kernel] = max(math.prod(map(int, leading.split("x")[:-1])) for leading in axes)
    assert most["dual", "(?:64x96|96x64)"] == small_round.EXPERTS and most["primal", "(?:64x96|96x64)"] >= 2 * clients
    assert most["dual", "64x3"] == 1 and most["primal", "64x3"] == clients


OTHERS = {
    "adam": optax.adam(0.1),
    "slow adam": optax.adam(1e-6),
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), SGD),
    "clipped when large": optax.chain(optax.clip_by_global_norm(10.0), SGD),
    "adam of experts only": optax.chain(optax.masked(optax.scale_by_adam(), lambda p: jax.tree.map(lambda w: w.ndim == 3, p)), SGD),
    "adam after some steps": optax.radam(0.01),
    "centralised": optax.chain(optax.centralize(), SGD),
    "adam that warms up": lambda round: optax.adam(0.1 * jnp.minimum(round, 1)),
    "nothing": optax.set_to_zero(),
}


HARDEST = (
    "slow adam",
    "clipped when large",
    "adam after some steps",
    "centralised",
    "adam that warms up",
    "nothing",
)  # to tell from linear ones


@pytest.mark.parametrize("name", [name if name in HARDEST else pytest.param(name, marks=pytest.mark.slow) for name in OTHERS])
def test_other_optimizers_stay_primal(name):
    parts = partition(small_round.model())
    assert not plan.is_linear(OTHERS[name], (parts.experts, parts.shared))


def test_costs_of_both_engines_counted_by_hand():
    """300 rows of 64 features to 32, in one step and in three, a byte taking as long as 10 FLOPs."""
    use = dual.Use(jax.ShapeDtypeStruct((1, 300, 64), jnp.float32), jax.ShapeDtypeStruct((1, 300, 32), jnp.float32), False)
    products, weights, row = 6 * 300 * 64 * 32, 4 * 64 * 32, 4 * (64 + 32)
    primal, in_dual = plan._cost(use, (64, 32), 1, 1, 10.0)
    assert primal == products + 10 * 11 * weights
    assert in_dual == products + 10 * 4 * 300 * row
    primal, in_dual = plan._cost(use, (64, 32), 1, 3, 10.0)
    assert primal == 3 * products + 10 * 23 * weights
    before = 900 / 3  # rows, in the mean over the steps
    assert in_dual == pytest.approx(3 * products + 4 * 900 * before * (64 + 32) + 10 * row * (2 * 3 * before + 4 * 900))


@pytest.mark.parametrize("groups", [1, 4])
def test_what_norms_cost_counted_by_hand(groups):
    """All 900 rows of three steps, in one lane or four, by all of their lane: two products, each written and read in float32."""
    inputs, outputs = (jax.ShapeDtypeStruct((groups, 300 // groups, width), jnp.float32) for width in (64, 32))
    use, weight = dual.Use(inputs, outputs, False), jnp.zeros((groups, 64, 32))
    (primal, in_dual), (primal_norms, dual_norms) = (plan._cost(use, (64, 32), groups, 3, 10.0, norms) for norms in (False, True))
    pairs = groups * (900 // groups) ** 2
    assert primal_norms - primal == 10 * 4 * groups * 64 * 32
    assert dual_norms - in_dual == pytest.approx(2 * pairs * (64 + 32) + 10 * 4 * 4 * pairs)
    assert plan._saved(use, weight, groups, 3) - plan._saved(use, weight, groups, 3, norms=True) == 2 * 4 * pairs


def test_an_optimizer_that_is_not_linear_is_refused_or_left_to_the_primal_engine(monkeypatch):
    with pytest.raises(ValueError, match=r"engine: 'dual' cannot serve, since client_optimizer is not linear .*; use 'auto' or 'primal'"):
        algorithm(client_optimizer=OTHERS["adam"], engine="dual")
    monkeypatch.setitem(plan.BALANCE, jax.default_backend(), 1e6)  # traffic decides
    wide = small_round.model(hidden=64, expert_hidden=96)
    assert sum(choice.use is not None for choice in algorithm(of=wide, engine="auto").plan(population())) >= 2
    assert not any(choice.use for choice in algorithm(of=wide, engine="auto", client_optimizer=OTHERS["adam"]).plan(population()))


@pytest.mark.parametrize("name", LINEAR)
def test_linear_optimizers_are_recognised(name):
    parts = partition(small_round.model())
    assert plan.is_linear(LINEAR[name], (parts.experts, parts.shared))


def test_sgd_that_warms_up_is_linear():
    algorithm(client_optimizer=lambda round: optax.sgd(0.1 * jnp.minimum(round, 1)), engine="dual")


class Looped(nnx.Module):
    """One of its weights is a factor of many products, by one call."""

    def __init__(self, rngs):
        self.moe = nn.MoE(small_round.FEATURES, 8, 4, rngs=rngs)
        self.inside, self.once = (nn.Linear(small_round.FEATURES, small_round.FEATURES, rngs=rngs) for _ in range(2))

    def __call__(self, x):
        y, _ = jax.lax.scan(lambda total, row: (total + self.inside(row), None), jnp.zeros(x.shape[1]), x)
        return self.moe(self.once(x) + y)


def test_a_product_in_a_loop_stays_primal():
    shape = batch_shape(population(), small_round.BATCH)
    choices = plan.engines(partition(Looped(nnx.Rngs(0))), cross_entropy, shape, slots=2, probes=0, steps=3, engine="dual", balance=8.0)
    kernel = {choice.name: choice.use is not None for choice in choices if choice.name.endswith("kernel")}
    assert kernel == {"1.inside.kernel": False, "1.once.kernel": True}


def test_an_engine_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="engine is 'fast'"):
        algorithm(engine="fast")
