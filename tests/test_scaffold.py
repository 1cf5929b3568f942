"""SCAFFOLD: against its own algorithm where every client holds all, and what must hold where clients hold a few experts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from small_groups import Net
from small_round import BATCH, CLIENTS, EXPERTS, KEY, algorithm, aligner, distance, model, population, run, weights
from test_round import close

from fedmoe_jax import alignment, partition, scaffold
from fedmoe_jax.base import client_keys, stage_key
from fedmoe_jax.local.cohort import batch_shape
from fedmoe_jax.local.cost import round_cost
from fedmoe_jax.local.primal import local_batch
from fedmoe_jax.models.losses import cross_entropy

EVERYONE = dict(aligner=alignment.full(num_experts=EXPERTS), cohort_size=CLIENTS)


def reference(start, data, count, client_lr=0.3, steps=2, corrected=True):
    """Rounds of algorithm 1 of Karimireddy et al. (2020), option II, with all clients; returns (experts, shared)."""
    parts = partition(start)

    def gradient(now, batch):
        def loss(now):
            values, _ = cross_entropy(nnx.merge(parts.graphdef, *now, parts.rest, copy=True), batch, KEY)
            return jnp.where(batch.mask, values, 0).sum() / batch.mask.sum()

        return jax.grad(loss)(now)

    @jax.jit
    def local_step(y, batch, mine, everyone, corrected):
        return jax.tree.map(lambda w, g, m, c: w - client_lr * (g - corrected * (m - c)), y, gradient(y, batch), mine, everyone)

    @jax.jit
    def mean(trees):
        return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *trees)

    x = parts.experts, parts.shared
    own = [jax.tree.map(jnp.zeros_like, x)] * CLIENTS
    for round in range(count):
        keys = client_keys(stage_key(jax.random.fold_in(KEY, round), "local"), jnp.arange(CLIENTS))
        everyone, trained = mean(own), []
        for client in range(CLIENTS):
            y = x
            for step in range(steps):
                batch = local_batch(jax.random.fold_in(keys[client], 0), data, jnp.int32(client), step, BATCH)
                y = local_step(y, batch, own[client], everyone, float(corrected))
            own[client] = jax.tree.map(lambda mine, c, w, v: mine - c + (w - v) / (steps * client_lr), own[client], everyone, x, y)
            trained.append(y)
        x = mean(trained)
    return x


def test_every_client_with_every_expert_is_scaffold():
    start, data = model(top_k=EXPERTS), population(sizes=(8,) * CLIENTS)
    state, _ = run(algorithm(start, control_variates=True, local_steps=2, **EVERYONE), data, 3)
    expected = reference(start, data, 3)
    close(weights(state), expected, atol=1e-5)
    assert distance(reference(start, data, 3, corrected=False), expected) > 1e-2


@pytest.mark.slow
def test_clients_do_not_drift_from_the_optimum_of_all():
    """After long local training, the gradient of the pooled loss."""
    start, data = model(top_k=EXPERTS), population(sizes=(4,) * CLIENTS)
    parts = partition(start)

    @jax.jit
    def slope(now):
        def pooled(now):
            logits = nnx.merge(parts.graphdef, *now, parts.rest, copy=True)(data.x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, data.y).mean()

        return optax.tree.norm(jax.grad(pooled)(now))

    options = dict(local_steps=10, client_optimizer=optax.sgd(0.05), **EVERYONE)
    ends = {on: slope(weights(run(algorithm(start, control_variates=on, **options), data, 60)[0])) for on in (False, True)}
    assert ends[True] < 0.5 * ends[False]


@pytest.mark.parametrize("router", [pytest.param("shared", marks=pytest.mark.slow), "personal"])
def test_sums_are_those_of_what_clients_keep(router):
    data = population()
    options = dict(control_variates=True, router=router, local_epochs=2)
    state, _ = run(algorithm(**options), data, 4)
    chunked, _ = run(algorithm(chunk_size=3, **options), data, 4)
    close(state, chunked, atol=1e-5)
    kept = state.controls
    tokens = lambda leaf: kept.tokens.reshape(*kept.tokens.shape, *(1,) * (leaf.ndim - 2))  # noqa: E731
    examples = lambda leaf: kept.examples.reshape(-1, *(1,) * (leaf.ndim - 1))  # noqa: E731
    close(kept.sums.experts, jax.tree.map(lambda leaf: (tokens(leaf) * leaf).sum(0), kept.experts), atol=1e-5)
    close(kept.sums.shared, jax.tree.map(lambda leaf: (examples(leaf) * leaf).sum(0), kept.shared), atol=1e-5)
    close((kept.sums.tokens, kept.sums.examples), (kept.tokens.sum(0), kept.examples.sum()))
    assert float(kept.sums.tokens.min()) > 0 and len(jax.tree.leaves(kept.experts)) == len(jax.tree.leaves(state.experts)) - (
        router == "personal"
    )


def test_a_control_variate_travels_with_each_weight():
    parts, batch = partition(model()), batch_shape(population(), BATCH)
    plain, doubled = (round_cost(parts, cross_entropy, optax.sgd(0.3), batch, control_variates=on) for on in (False, True))
    assert doubled.shared_bytes == 2 * plain.shared_bytes and doubled.expert_bytes == 2 * plain.expert_bytes
    assert doubled.shared_memory > plain.shared_memory and doubled.expert_memory > plain.expert_memory


@pytest.mark.slow
def test_a_correction_is_the_mean_of_all_minus_the_own_for_each_group():
    draw, parts = np.random.default_rng(0), partition(Net())
    client, held = np.array([4, 1, 6]), np.array([[0, 2, 5, 7], [1, 2, 5, -1], [2, -1, 7, 5]])  # two slots of each of two groups
    tokens, examples = np.array([[3, 1, 2, 2], [4, 5, 0, 0], [6, 0, 1, 4]]), np.array([3, 9, 4])
    slots = jax.tree.map(lambda w: jnp.asarray(draw.normal(size=(3, 2, *w.shape[1:])), jnp.float32), parts.experts)
    shared = jax.tree.map(lambda w: jnp.asarray(draw.normal(size=(3, *w.shape)), jnp.float32), parts.shared)

    def learn(controls, gradient, good):
        return scaffold.learn(controls, jnp.array(client), good, jnp.array(held), gradient, jnp.array(tokens), jnp.array(examples))

    controls = scaffold.start(parts.experts, parts.shared, CLIENTS, 1e9)
    everyone, wrong = jnp.ones(3, bool), jax.tree.map(lambda leaf: leaf * 9, (slots, shared))
    controls = learn(controls, wrong, everyone)
    controls = learn(controls, (slots, shared), everyone)
    controls = learn(controls, wrong, ~everyone)  # changes nothing
    controls = learn(controls, jax.tree.map(lambda leaf: leaf * 1e31, (slots, shared)), everyone)  # nor does what is too large
    for row in range(3):
        own, of_shared = scaffold.correction(controls, controls.sums, jnp.int32(client[row]), jnp.array(held[row]))
        for got, given in zip(jax.tree.leaves(of_shared), jax.tree.leaves(shared), strict=True):
            np.testing.assert_allclose(got, np.average(given, axis=0, weights=examples) - given[row], rtol=1e-3, atol=1e-4)
        for (path, got), given in zip(jax.tree_util.tree_flatten_with_path(own)[0], jax.tree.leaves(slots), strict=True):
            places = slice(2, 4) if ".1." in jax.tree_util.keystr(path, simple=True, separator=".") else slice(0, 2)
            experts, weights = held[:, places], tokens[:, places]
            for slot in range(2):
                same = (experts == experts[row, slot]) & (weights > 0)
                wanted = np.zeros_like(got[slot])
                if weights[row, slot]:
                    wanted = np.average(np.asarray(given)[same], axis=0, weights=weights[same]) - given[row, slot]
                np.testing.assert_allclose(got[slot], wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_who_holds_an_expert_for_the_first_time_trains_it_uncorrected():
    data = population()
    options = dict(aligner=aligner("random", max_slots=1), cohort_size=CLIENTS)
    corrected, plain = (run(algorithm(control_variates=on, **options), data) for on in (True, False))
    close(weights(corrected[0]), weights(plain[0]))
    assert corrected[1].bytes_up == 2 * plain[1].bytes_up and corrected[1].bytes_down == 2 * plain[1].bytes_down
    held = np.asarray(corrected[0].controls.tokens > 0)
    assert (held.sum(1) == 1).all()


def test_clients_with_broken_data_or_too_little_memory_keep_no_control_variate():
    alg = algorithm(control_variates=True, cohort_size=CLIENTS)
    state, info = run(alg, population(broken=[2]), 2)
    assert info.rejected_updates == 1 and state.controls.examples[2] == 0 and not state.controls.tokens[2].any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state.controls, weights(state))))
    absent, _ = run(alg, population(memory_bytes=1), 2)  # nobody can take part
    assert not any(leaf.any() for leaf in jax.tree.leaves(absent.controls))


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="control_variates keeps a gradient of the whole model for every client, which takes"):
        algorithm(control_variates=True, personal_budget_bytes=1e3).init(KEY, population())
    with pytest.raises(ValueError, match="engine: 'dual' cannot serve, since control_variates are added to each client's gradients"):
        algorithm(control_variates=True, engine="dual")
    assert {choice.use for choice in algorithm(control_variates=True, engine="auto").plan(population())} == {None}
