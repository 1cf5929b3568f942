"""Evaluation: the global model on the global test set, and each client with the experts that it would be assigned."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedmoe_jax import alignment, distil, posterior, sharding
from fedmoe_jax.alignment.aligner import AlignerState
from fedmoe_jax.alignment.fitness import FitnessState
from fedmoe_jax.base import NO_EXPERT, Aligner, Alignment, Batch, Cohort, stage_key
from fedmoe_jax.data import sources
from fedmoe_jax.experts import Slots, bind, gather, groups, num_experts
from fedmoe_jax.local.routers import own_routers
from fedmoe_jax.nn.moe import mix_all
from fedmoe_jax.round import State
from fedmoe_jax.training import metrics
from fedmoe_jax.training.checkpoint import Checkpoints
from fedmoe_jax.training.clients import evaluated
from fedmoe_jax.training.config import TrainConfig
from fedmoe_jax.training.setup import Setup, build

_BATCH = 256
_CLIENT_BATCH = 32
_CHUNK = 50


def global_evaluation(setup: Setup) -> Callable[[State], dict[str, Any]]:
    """evaluate(state) -> eval_loss and eval_accuracy: all experts, routed as the configuration says, no prior, the global test set."""
    parts = setup.parts
    experts = len(groups(parts.experts)) * num_experts(parts.experts)
    size, distilled = min(_BATCH, len(setup.test[0])), setup.config.router == "distilled"
    if distilled:
        distil.routers(setup.model)

    def one(weights, routers, x, y, rows, key):
        mask = rows < x.shape[0]
        rows = jnp.minimum(rows, x.shape[0] - 1)
        model = bind(parts, *weights, Slots(jnp.ones(experts, bool), jnp.zeros(experts), mask))
        if routers is not None:
            posterior.serve(model, routers)
        if setup.config.router == "soft":
            mix_all(model)
        loss, aux = setup.loss_fn(model, Batch(x[rows], y[rows], mask), key)
        correct = aux.get("correct", jnp.full_like(loss, jnp.nan))
        return jnp.where(mask, loss, 0).sum(), jnp.where(mask, correct, 0).sum()

    @jax.jit
    def evaluate(weights, statistics, x, y, key):
        routers = None if statistics is None else posterior.posteriors(statistics)
        index = jnp.arange(-(-x.shape[0] // size) * size).reshape(-1, size)
        sums = jax.lax.map(lambda rows: one(weights, routers, x, y, rows, key), index)
        return jax.tree.map(lambda values: values.sum() / x.shape[0], sums)

    def run(state: State) -> dict[str, Any]:
        statistics = None if distilled else state.statistics
        loss, correct = evaluate(global_weights(setup, state), statistics, *setup.test, state.key)
        return {"eval_loss": float(loss), "eval_accuracy": float(correct)}

    return run


def global_weights(setup: Setup, state: State) -> tuple[Any, Any]:
    """Expert and shared weights that the global model serves with: those of the state, or with a distilled router."""
    experts = state.experts
    if setup.config.router == "distilled" and state.statistics is not None:
        experts = distil.weights(setup.parts, experts, state.shared, state.statistics)
    return experts, state.shared


def client_evaluation(setup: Setup, chunk: int = _CHUNK) -> Callable[[State], dict[str, Any]]:
    """evaluate(state) -> `metrics.CLIENT_ACCURACIES` over clients that have test examples, `chunk` of them at once.

    Label priors (`clients.label_prior`) are added to the logits. Fittest experts, of those that the aligner may give a client, are
    left out where an aligner of one's own may score otherwise, or where all are held anyway.
    """
    everyone, cost = evaluated(setup.population.num_clients), setup.cost()

    def accuracy(state, holdout, client, held, prior, labels):
        experts = gather(state.experts, held)
        if state.personal is not None:
            experts = own_routers(experts, state.personal, client, held)

        def add(index, right):
            batch = holdout.batch(client, index * _CLIENT_BATCH + jnp.arange(_CLIENT_BATCH))
            model = bind(setup.parts, experts, state.shared, Slots(held != NO_EXPERT, prior, batch.mask))
            logits = model(batch.x)
            correct = jax.vmap(lambda served: setup.loss_fn(lambda _: served, batch, state.key)[1]["correct"])
            return right + jnp.where(batch.mask, correct(jnp.stack([logits, logits + labels])), 0).sum(1)

        count = holdout.num_examples(client)
        right = jax.lax.fori_loop(0, -(-count // _CLIENT_BATCH), add, jnp.zeros(2))
        return jnp.where(count > 0, right / jnp.maximum(count, 1), jnp.nan)

    @jax.jit
    def evaluate(state, holdout, cohort, labels):
        alignments = [served(aligner, state, cohort) for aligner in (setup.aligner, *fittest(setup, state))]
        rows = [(cohort.client, each.held, setup.config.router_prior * each.centred, labels) for each in alignments]
        rows = jax.tree.map(lambda *columns: jnp.concatenate(columns), *rows)
        each = jax.lax.map(lambda row: accuracy(state, holdout, *row), rows, batch_size=min(chunk, _CHUNK, cohort.client.shape[0]))
        return sharding.everywhere(jnp.concatenate(jnp.split(each, len(alignments)), axis=1), setup.mesh)

    def run(state: State) -> dict[str, Any]:
        each = np.asarray(evaluate(state, setup.holdout, setup.admit(everyone, state.pace[everyone], cost), setup.label_prior))
        each = each[np.isfinite(each).all(1)]
        if not each.size:
            return {}
        values = (float(value) for column in each.T for value in (column.mean(), np.quantile(column, 0.1)))
        return dict(zip(metrics.CLIENT_ACCURACIES[: 2 * each.shape[1]], values, strict=True))

    return run


def served(aligner: Aligner, state: State, cohort: Cohort) -> Alignment:
    """The experts with which an aligner serves these clients after a round."""
    key = stage_key(jax.random.fold_in(state.key, state.round), "evaluate")
    return aligner.align(key, state.aligner, cohort)[0]


def fittest(setup: Setup, state: State) -> tuple[Aligner, ...]:
    """An aligner that gives each client its fittest experts by what the one of the run has learnt; empty where there is none."""
    aligner = setup.aligner
    learnt = isinstance(state.aligner, AlignerState) and isinstance(state.aligner.fitness, FitnessState)
    if not learnt or ":" in setup.config.aligner or aligner.num_experts is None or aligner.max_slots == aligner.num_experts:
        return ()
    sizes: dict[str, Any] = dict(num_experts=aligner.num_experts, max_slots=aligner.max_slots, groups=aligner.groups)
    return (alignment.greedy(**sizes, fitness=setup.fitness),)


def evaluate_run(folder: Path, config: TrainConfig, data: str) -> dict[str, Any]:
    """Evaluates the newest checkpoint of a run.

    Args:
      folder: the run.
      config: its configuration.
      data: as `config.data`, then also with its clients and aligner; or other data for the same model: its test set, or all
        of it where it has none.

    Raises:
      ValueError: if there is no checkpoint, or the data do not fit the model.
    """
    done, setup, state = restored(folder, config)
    results = {"round": done, "data": data}
    if data == config.data and (folder / "roster.json").exists():  # its clients, who are elsewhere, have not these data
        return results | global_evaluation(setup)(state)
    if data == config.data:
        return results | global_evaluation(setup)(state) | client_evaluation(setup)(state)
    return results | global_evaluation(dataclasses.replace(setup, test=_other_test(setup, data)))(state)


def restored(folder: Path, config: TrainConfig) -> tuple[int, Setup, State]:
    """A run's newest checkpoint: rounds done, what the run is made of, state.

    Raises:
      ValueError: if there is none, or it is not of this configuration.
    """
    if (folder / "roster.json").exists():
        from fedmoe_jax.deploy import server

        return server.restored(folder, config)
    config = dataclasses.replace(config, devices=None, expert_devices=1)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        setup = build(config)
        template = setup.algorithm(1).init(jax.random.key(config.seed), setup.population)
        done, state, _ = checkpoints.restore(template)
    return done, setup, state


def _other_test(setup: Setup, name: str) -> tuple[jax.Array, jax.Array]:
    other, (x, y) = sources.load(name), setup.test
    if other.x.shape[1:] != x.shape[1:] or other.test_y.ndim != y.ndim:
        raise ValueError(f"data: examples of {name} have shape {other.x.shape[1:]}, those of the run {x.shape[1:]}")
    if other.num_classes > setup.num_classes:
        raise ValueError(f"data: {name} has {other.num_classes} classes, the model {setup.num_classes}")
    if not other.held_out:
        return jnp.asarray(other.test_x), jnp.asarray(other.test_y)
    return jnp.concatenate([other.x, other.test_x]), jnp.concatenate([other.y, other.test_y])
