"""Clients served with their fittest experts, against one client after the other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fedmoe_jax.experts import Slots, bind, gather
from fedmoe_jax.nn.linear import as_float
from fedmoe_jax.nn.moe import mix_all
from fedmoe_jax.training import metrics, setup
from fedmoe_jax.training.config import TrainConfig
from fedmoe_jax.training.evaluate import client_evaluation, global_evaluation

CLIENTS, EXPERTS, SLOTS, PRIOR = 12, 4, 2, 10.0
CONFIG = TrainConfig(
    population=CLIENTS,
    cohort=4,
    experts=EXPERTS,
    slots=SLOTS,
    aligner="random",
    router_prior=PRIOR,
    alpha=0.1,
    model_options={"hidden": 16},
)
FITTEST = [name for name in metrics.CLIENT_ACCURACIES if "fittest" in name]


def made(**changes):
    """A setup and a state whose aligner knows how fit each expert is to each client."""
    built = setup.build(dataclasses.replace(CONFIG, **changes))
    state = built.algorithm(CONFIG.cohort).init(jax.random.key(0), built.population)
    known = dataclasses.replace(state.aligner.fitness, value=jax.random.uniform(jax.random.key(1), state.aligner.fitness.value.shape))
    return built, dataclasses.replace(state, aligner=dataclasses.replace(state.aligner, fitness=known))


def test_clients_are_also_served_with_their_fittest_experts():
    built, state = made()

    @jax.jit
    def answers(client, held, prior):
        batch = built.holdout.batch(client, jnp.arange(built.holdout.max_examples))
        model = bind(built.parts, gather(state.experts, held), state.shared, Slots(jnp.ones(SLOTS, bool), prior, batch.mask))
        return model(batch.x), batch.y, batch.mask

    value, right = np.asarray(state.aligner.fitness.value), []
    for client in range(CLIENTS):
        held = np.sort(np.argsort(-value[client])[:SLOTS])
        prior = PRIOR * (value[client, held] - value[client].mean())
        logits, y, mask = map(np.asarray, answers(client, held, prior))
        if mask.any():
            labels = np.asarray(built.label_prior)[client]
            right.append([(np.argmax(logits[mask] + extra, 1) == y[mask]).mean() for extra in (0, labels)])
    plain, served = np.array(right).T
    expected = [plain.mean(), np.quantile(plain, 0.1), served.mean(), np.quantile(served, 0.1)]
    found = client_evaluation(built)(state)
    assert [found[name] for name in FITTEST] == pytest.approx(expected, abs=1e-5)
    assert list(found) == list(metrics.CLIENT_ACCURACIES) and found["client_accuracy_mean"] != found["client_accuracy_fittest_mean"]


def test_greedy_gives_the_fittest_anyway():
    built, state = made(aligner="greedy")
    found = client_evaluation(built)(state)
    assert [found[name] for name in FITTEST] == [found[name.replace("_fittest", "")] for name in FITTEST]


@pytest.mark.parametrize("aligner", ["full", "fedmoe_jax.alignment:random"])
def test_fittest_experts_are_left_out_where_none_are_known(aligner):
    built, state = made(aligner=aligner)
    assert set(client_evaluation(built)(state)) == set(metrics.CLIENT_ACCURACIES) - set(FITTEST)


def test_a_soft_router_mixes_all_experts_in_the_global_model():
    built, state = made(router="soft")
    model = bind(built.parts, state.experts, state.shared, Slots(jnp.ones(EXPERTS, bool), jnp.zeros(EXPERTS)))
    x, y = built.test
    hidden = jax.nn.relu(model.into(as_float(x).reshape(len(x), -1)))
    moe = model.moe
    gates = jax.nn.softmax(hidden @ moe.router.get_value().T)
    inside = jax.nn.relu(jnp.einsum("nd,edh->neh", hidden, moe.w_in.get_value()) + moe.b_in.get_value())
    out = jnp.einsum("neh,ehf->nef", inside, moe.w_out.get_value()) + moe.b_out.get_value()
    logits = model.head(model.norm((gates[..., None] * out).sum(1)))
    found = global_evaluation(built)(state)
    assert found["eval_accuracy"] == pytest.approx(float((logits.argmax(1) == y).mean()), abs=0.002)
    loss = -jax.nn.log_softmax(logits)[jnp.arange(len(y)), y].mean()
    assert found["eval_loss"] == pytest.approx(float(loss), rel=1e-4)
    assert found["eval_loss"] != pytest.approx(global_evaluation(made()[0])(state)["eval_loss"], rel=1e-3)


def test_only_models_with_layers_of_ours_can_mix_all_experts():
    with pytest.raises(ValueError, match=r"router is 'soft', but the model has no nn\.MoE layer"):
        mix_all(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
