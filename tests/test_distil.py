"""Router rows distilled from the Gaussians of what experts were sent: as good as any linear router, and served as plain weights."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from test_gaussians import gaussians, log_posterior

from fedmoe_jax import cli, distil, nn, posterior
from fedmoe_jax.experts import ExpertParam, Slots, SlotState, partition
from fedmoe_jax.training.config import TrainConfig, from_toml
from fedmoe_jax.training.evaluate import global_evaluation, restored

KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def layer():
    return gaussians(1, experts=4, features=6)[0]


def test_features_are_drawn_from_the_gaussians(layer):
    features, share = (np.asarray(a, np.float64) for a in distil._drawn(layer, KEY))
    count, total = (np.asarray(a, np.float64) for a in (layer.count, layer.total))
    assert share.sum() == pytest.approx(1, rel=1e-5) and len(features) >= distil.SAMPLES
    features, share = features.reshape(4, -1, 6), share.reshape(4, -1)
    np.testing.assert_allclose(share.sum(1), count.sum(1) / count.sum(), rtol=1e-4)
    for expert in range(3):
        mean = total[expert].sum(0) / count[expert].sum()
        error = features[expert].std(0) / np.sqrt(features.shape[1])
        assert (np.abs(features[expert].mean(0) - mean) < 5 * error).all()


def test_rows_are_the_best_linear_router_of_the_posterior(layer):
    features, share = (np.asarray(a, np.float64) for a in distil._drawn(layer, KEY))
    target = softmax(log_posterior(layer, features), axis=1)

    def loss(rows):
        return -(share[:, None] * target * log_softmax(features @ rows.reshape(4, 6).T, axis=1)).sum()

    found = np.asarray(jax.jit(distil.rows)(layer, jnp.zeros((4, 6)), KEY), np.float64)
    best = minimize(loss, np.zeros(24), method="L-BFGS-B").fun
    assert best < loss(np.zeros(24)) - 0.1
    assert loss(found.ravel()) < best + 0.02 * (loss(np.zeros(24)) - best)
    assert ((features @ found.T).argmax(1) == 3).mean() < 0.1  # nothing was sent to the last expert


@pytest.mark.parametrize("change", [dict(count=jnp.zeros((4, 4))), dict(second=jnp.full((4, 6, 6), jnp.nan))])
def test_rows_stay_where_there_is_nothing_to_learn_from(layer, change):
    start = jax.random.normal(KEY, (4, 6))
    np.testing.assert_array_equal(distil.rows(dataclasses.replace(layer, **change), start, KEY), start)


def test_matrices_are_factored_one_at_a_time(layer):
    """Batches of them can wait for each other's threads for ever, on a CPU."""

    def both(layer):
        return distil.rows(layer, jnp.zeros((4, 6)), KEY), posterior.posteriors((layer,))

    program = jax.jit(both).trace(layer).lower(lowering_platforms=("cpu",)).as_text()
    calls = re.findall(r"custom_call @(lapack\w+)\(.*: \(tensor<(\w+)>", program)
    assert {name for name, _ in calls} >= {"lapack_ssyevd_ffi", "lapack_sgetrf_ffi"}
    assert all(shape in ("6x6xf32", "1x6x6xf32") for _, shape in calls)


class Rowless(nnx.Module):
    """A layer of experts that needs no router."""

    def __init__(self):
        self.weight, self.slots = ExpertParam(jnp.zeros((4, 6))), SlotState(Slots(jnp.ones(4, bool), jnp.zeros(4)))


def test_a_layer_without_a_router_is_refused(layer):
    parts = partition(Rowless())
    with pytest.raises(ValueError, match="router is 'distilled', but the model has a MoE layer with 0 RouterParams"):
        distil.weights(parts, parts.experts, parts.shared, (layer,))


def test_each_layer_gets_rows_of_its_own_statistics(layer):
    layers = nnx.List([nn.MoE(6, 8, 4, rngs=nnx.Rngs(seed)) for seed in range(2)])
    parts = partition(layers)
    other = gaussians(2, experts=4, features=6)[0]
    found = distil.weights(parts, parts.experts, parts.shared, (layer, other))
    for place, seen in enumerate((layer, other)):
        expected = distil.rows(seen, jnp.zeros((4, 6)), jax.random.key(0))
        np.testing.assert_allclose(found[place]["router"].get_value(), expected, atol=0.03)  # of different programs
        assert np.abs(found[1 - place]["router"].get_value() - expected).max() > 0.3
        np.testing.assert_array_equal(found[place]["w_in"].get_value(), parts.experts[place]["w_in"].get_value())


@pytest.mark.slow
def test_a_run_leaves_the_distilled_weights_and_trains_as_with_statistics(tmp_path):
    flags = ["--population", "8", "--cohort", "4", "--experts", "4", "--rounds", "2", "--eval_every", "2", "--model_options", "hidden=16"]
    runs = {}
    for router in ("statistics", "distilled"):
        out = tmp_path / router
        assert cli.main(["train", *flags, "--router", router, "--out", str(out)]) == 0
        runs[router] = dict(np.load(out / "weights.npz")), json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    (plain, record), (weights, other) = runs["statistics"], runs["distilled"]
    changed = [name for name in plain if (plain[name] != weights[name]).any()]
    assert changed == [name for name in plain if "router" in name] and len(changed) == 1
    same = set(record) - {"eval_accuracy", "eval_loss", "wall_seconds", "clients_per_second", "peak_memory_bytes"}
    assert all(record[name] == other[name] for name in same) and record["eval_loss"] != other["eval_loss"]
    _, setup, state = restored(tmp_path / "distilled", TrainConfig(**from_toml(tmp_path / "distilled" / "config.toml")))
    experts = distil.weights(setup.parts, state.experts, state.shared, state.statistics)
    np.testing.assert_array_equal(weights[changed[0]], experts["moe"]["router"].get_value())
    assert other["eval_loss"] == global_evaluation(setup)(state)["eval_loss"]
