"""The router of statistics: how tokens are routed by it, where that finds the right expert, and runs that are evaluated with it."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from moe_oracle import expert as expert_by_hand
from scipy.special import logsumexp
from small_round import (
    CLASSES,
    EXPERTS,
    KEY,
    algorithm,
    aligner,
    population,
)
from test_gaussians import log_posterior
from test_posterior import FLAT, HIDDEN, MIXED, TWO, Net, drawn, features_of, values_of
from test_round import same

from fedmoe_jax import nn, partition, posterior
from fedmoe_jax.experts import Slots, bind
from fedmoe_jax.posterior import Statistics
from fedmoe_jax.training import setup, trainer
from fedmoe_jax.training.checkpoint import Checkpoints
from fedmoe_jax.training.config import TrainConfig
from fedmoe_jax.training.evaluate import global_evaluation


def test_from_no_statistics_all_experts_are_alike():
    parts, batch = partition(Net(TWO)), drawn((6,), (6,))
    routers = jax.jit(posterior.posteriors)(posterior.start(parts, batch))
    for router in routers:
        logits = np.asarray(router.logits(jnp.ones((6, HIDDEN))))
        np.testing.assert_array_equal(logits, logits[:, :1] + np.zeros(EXPERTS))
        assert np.isfinite(logits).all()
    assert posterior.decayed(None) is None


def uneven(names, seed=0):
    """Statistics of some tokens for each layer of a Net, group after group."""
    draw, groups = np.random.default_rng(seed), tuple(dict.fromkeys(names))
    places = [groups.index(name) for name in sorted(names, key=groups.index)]

    def one(group):
        count = draw.integers(1, 9, (EXPERTS, CLASSES)) * 1.0
        mean, noise = draw.normal(size=(EXPERTS, CLASSES, HIDDEN)), draw.normal(size=(EXPERTS, 9, HIDDEN))
        second = np.einsum("ec,ecd,ecf->edf", count, mean, mean) + np.einsum("end,enf->edf", noise, noise)
        return Statistics(*(jnp.asarray(a, jnp.float32) for a in (count, count[..., None] * mean, second)), group=group)

    return tuple(map(one, places))


@pytest.mark.parametrize("options", [dict(names=MIXED), dict(token_capacity=0.3, top_k=2)])
def test_every_token_goes_to_all_experts_by_its_posterior(options):
    names = options.get("names", FLAT)
    parts, statistics, batch = partition(Net(**options)), uneven(names), drawn((9,), (9,))

    @jax.jit
    def served(statistics, x, mask):
        number = EXPERTS * len(set(names))
        net = bind(parts, parts.experts, parts.shared, Slots(jnp.ones(number, bool), jnp.zeros(number), mask))
        posterior.serve(net, posterior.posteriors(statistics))
        return net(x), [layer.slots.get_value().tokens for layer in net.moe]

    logits, tokens = served(statistics, batch.x, batch.mask)
    h, groups = features_of(parts.shared, batch.x), tuple(dict.fromkeys(names))
    order = sorted(range(len(names)), key=lambda place: (groups.index(names[place]), place))
    for place in range(len(names)):
        gates = np.exp(log_posterior(statistics[order.index(place)], h))
        gates *= np.asarray(batch.mask)[:, None] / gates.sum(1, keepdims=True)
        values = values_of(parts.experts, place)
        outputs = np.stack([expert_by_hand(values, e, h) for e in range(EXPERTS)])
        h = h + np.einsum("ne,end->nd", gates, outputs)
        np.testing.assert_array_equal(tokens[place], np.asarray(batch.mask)[:, None] * np.ones(EXPERTS))
    head = {name: np.asarray(parts.shared["head"][name].get_value()) for name in ("kernel", "bias")}
    real = np.asarray(batch.mask)
    np.testing.assert_allclose(np.asarray(logits)[real], (h @ head["kernel"] + head["bias"])[real], rtol=2e-3, atol=2e-3)


CONFIG = TrainConfig(
    population=20, cohort=5, experts=EXPERTS, rounds=4, eval_every=2, checkpoint_every=2, aligner="random", probes=0, fitness="usage",
    router="statistics", engine="primal", model_options={"hidden": 16},
)  # fmt: skip


@pytest.fixture(scope="module")
def built():
    return setup.build(CONFIG)


DOMAINS, MEANINGS = 2, 4


class Planted(nnx.Module):
    """A layer alone: inputs name their domain and what is meant, and expert e knows what domain e calls it."""

    def __init__(self):
        self.moe = nn.MoE(DOMAINS + MEANINGS, MEANINGS, DOMAINS, out_features=MEANINGS, use_bias=False, rngs=nnx.Rngs(0))
        self.moe.router.set_value(jnp.zeros((DOMAINS, DOMAINS + MEANINGS)))  # the mean of rows that say opposite things
        reads = np.concatenate([np.zeros((DOMAINS, MEANINGS)), np.eye(MEANINGS)]).astype(np.float32)
        self.moe.w_in.set_value(jnp.stack([reads] * DOMAINS))
        self.moe.w_out.set_value(jnp.stack([6 * jnp.roll(jnp.eye(MEANINGS), domain, axis=1) for domain in range(DOMAINS)]))

    def __call__(self, x):
        return self.moe(x)


def of_domains(count, seed):
    """(x, y, domain) of examples that tell their domain."""
    draw = np.random.default_rng(seed)
    domain, meaning = draw.integers(0, DOMAINS, count), draw.integers(0, MEANINGS, count)
    x = np.concatenate([np.eye(DOMAINS)[domain], np.eye(MEANINGS)[meaning]], 1) + 0.1 * draw.normal(size=(count, DOMAINS + MEANINGS))
    return jnp.asarray(x, jnp.float32), jnp.asarray((meaning + domain) % MEANINGS), domain


def test_where_features_tell_which_expert_is_right_the_router_of_statistics_finds_it(built):
    x, y, domain = of_domains(200, seed=0)
    sent = np.eye(DOMAINS)[domain][:, :, None] * np.eye(MEANINGS)[np.asarray(y)][:, None]
    sums = sent.sum(0), np.einsum("nec,nd->ecd", sent, x), np.einsum("nec,nd,nf->edf", sent, x, x)
    statistics = Statistics(*(jnp.asarray(a, jnp.float32) for a in sums), group=0)
    test_x, test_y, right = of_domains(90, seed=1)
    planted = dataclasses.replace(built, parts=partition(Planted()), test=(test_x, test_y))
    state = algorithm(Planted(), aligner=aligner("random", DOMAINS, 1)).init(KEY, population())
    evaluate = global_evaluation(planted)
    found = {
        name: evaluate(dataclasses.replace(state, statistics=value))
        for name, value in (("averaged", None), ("nothing", jax.tree.map(jnp.zeros_like, (statistics,))), ("posterior", (statistics,)))
    }
    assert found["posterior"]["eval_accuracy"] > 0.97 and found["averaged"]["eval_accuracy"] < 0.65
    assert found["posterior"]["eval_loss"] < 0.1 * found["averaged"]["eval_loss"]
    assert np.isfinite(found["nothing"]["eval_loss"]) and found["nothing"]["eval_loss"] != found["averaged"]["eval_loss"]
    gates = np.exp(log_posterior(statistics, np.asarray(test_x)))
    gates /= gates.sum(1, keepdims=True)
    assert (gates.argmax(1) == right).all()
    meant = np.maximum(np.asarray(test_x)[:, DOMAINS:], 0)
    logits = sum(gates[:, [e]] * 6 * np.roll(meant, e, axis=1) for e in range(DOMAINS))
    loss = logsumexp(logits, axis=1) - logits[np.arange(90), np.asarray(test_y)]
    assert found["posterior"]["eval_loss"] == pytest.approx(loss.mean(), rel=1e-3)


MEASURED = ("wall_seconds", "clients_per_second", "peak_memory_bytes")


def exact(records):
    """The metrics of a run that do not depend on the machine's speed."""
    return [{name: value for name, value in json.loads(json.dumps(line)).items() if name not in MEASURED} for line in records]


@pytest.mark.slow
def test_a_run_evaluates_with_its_statistics_and_resumes_with_them(built, tmp_path):
    run = trainer.Run(built)
    run.state = jax.device_put(run.state, jax.devices()[0])  # as it is restored, so that nothing compiles again
    with Checkpoints(tmp_path) as checkpoints:
        lines = exact(record for (record,) in run.blocks(checkpoints))
        seen, averaged = run.state.statistics, run.evaluations[0](dataclasses.replace(run.state, statistics=None))
        assert len(lines) == CONFIG.rounds and abs(averaged["eval_loss"] - lines[-1]["eval_loss"]) > 1e-3
        shutil.rmtree(tmp_path / str(CONFIG.rounds))
        run.done, run.state, _ = checkpoints.restore(built.algorithm(1).init(KEY, built.population))
    assert run.done == 2 and 0 < float(run.state.statistics[0].count.sum()) < float(seen[0].count.sum())
    assert exact(record for (record,) in run.blocks()) == lines[2:]
    same(run.state.statistics, seen)
    cost = built.cost()
    assert cost.report_bytes == 4 * (10 * 17 + 16 * 17 / 2)
