"""From a configuration to what a run needs: data on the device, model, aligner, algorithm."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from fedmoe_jax import distributed, models
from fedmoe_jax.alignment import fitness
from fedmoe_jax.base import Aligner, Cohort, Fitness, RoundCost
from fedmoe_jax.conditions import varying
from fedmoe_jax.data import partition as splits
from fedmoe_jax.data import sources
from fedmoe_jax.data.population import Population
from fedmoe_jax.distributed import processes
from fedmoe_jax.experts import Partition, groups, partition
from fedmoe_jax.local.cohort import batch_shape
from fedmoe_jax.local.cost import round_cost
from fedmoe_jax.local.plan import chunk_size, room
from fedmoe_jax.local.primal import num_processed
from fedmoe_jax.round import STATISTICS_BATCHES, Algorithm, State, admit, federated_moe
from fedmoe_jax.training import clients
from fedmoe_jax.training.config import MODELS, TrainConfig
from fedmoe_jax.training.named import aggregator, broadcast, make_aligner, make_fitness
from fedmoe_jax.training.optimizers import client_optimizer, server_optimizer
from fedmoe_jax.training.stream import Stream
from fedmoe_jax.training.weights import load_weights

MOST_LABEL_BYTES = 4e9
"""Most that label priors of all clients may take."""
LOCAL_TEST_FRACTION = 0.2
"""Share of each client's examples that is its own test split."""
TRAINED_AS = {"soft": "shared", "distilled": "statistics"}
"""Routers of the global model with which clients train as with another."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a run is made of. `population` holds the clients' training examples, `holdout` their own test splits. With a `mesh`
    the population is a `distributed.ShardedPopulation` there, and what evaluation needs is on each of its devices.

    `label_prior` is that of `clients.label_prior`. `digests` tell whether data and profiles are the same as before.
    With a `stream`, which then has the training examples, the population knows their number only. `solo` settles `solo_examples`.
    """

    config: TrainConfig
    population: Any
    holdout: Population
    test: tuple[jax.Array, jax.Array]
    num_classes: int
    label_prior: jax.Array
    model: nnx.Module
    parts: Partition
    aligner: Aligner
    loss_fn: Any
    fitness: Fitness
    stream: Stream | None = None
    digests: dict[str, str] = dataclasses.field(default_factory=dict)
    check: bool = False
    solo: int | None = None
    mesh: Mesh | None = None

    def algorithm(self, chunk: int) -> Algorithm:
        """The round, with `chunk` clients trained side by side."""
        config = self.config
        conditions = varying(availability=config.availability, speed_bias=config.speed_bias, speed_jitter=config.speed_jitter)
        return federated_moe(
            self.model, self.training_loss, client_optimizer=client_optimizer(config), server_optimizer=server_optimizer(config),
            aligner=self.aligner, cohort_size=config.cohort, batch_size=config.batch_size, local_steps=config.local_steps,
            local_epochs=None if config.local_steps is not None else config.local_epochs, prox=config.prox, prox_on=config.prox_on,
            router=TRAINED_AS.get(config.router, config.router), router_prior=config.router_prior,
            deadline=config.deadline, chunk_size=chunk, conditions=conditions,
            solo_examples=self.solo_examples, engine=config.engine, control_variates=config.control_variates,
            aggregator=aggregator(config), broadcast=broadcast(config), reject_above=config.reject_above, check=self.check,
            min_holders=config.min_holders, sampling_rate=config.sampling_rate, mesh=self.mesh,
        )  # fmt: skip

    def aligner_scores(self, state: State) -> Any:
        """Fitness [client, expert] of the first 1,000 clients, for a picture; None where the aligner learns none that we can read.

        Experts go group after group. A pair never tried is NaN, where its prior is not a score as well.
        """
        learnt = getattr(state.aligner, "fitness", None)
        if not isinstance(learnt, fitness.FitnessState):
            return None
        client = jnp.arange(min(self.population.num_clients, 1000))
        known_prior = self.config.fitness in ("solo", "ranked_solo", "loss") and ":" not in self.config.aligner  # others score it as well
        prior = self.fitness.init(1, 1).value if known_prior else jnp.nan

        def known(learnt: fitness.FitnessState) -> jax.Array:
            return jnp.where(learnt.value[client] == prior, jnp.nan, self.fitness.score(learnt, client))

        learnt = processes.gathered(learnt)
        return np.asarray(known(learnt)) if self.aligner.groups == 1 else np.concatenate(jax.vmap(known)(learnt), axis=1)

    @functools.cached_property
    def solo_examples(self) -> int:
        """Examples of the solo evaluation: a batch, but no more than take a quarter of the mean client's FLOPs."""
        if self.solo is not None:
            return self.solo
        batch, slots = self.config.batch_size, self.aligner.max_slots
        if self.config.fitness not in ("solo", "ranked_solo"):
            return 0
        cost = self._cost(batch)
        examples = self._processed(jnp.arange(self.population.num_clients)).mean()
        training = examples * (cost.shared_flops + slots * cost.expert_flops)
        each = (cost.solo_shared_flops + (slots + self.aligner.probes) * cost.solo_expert_flops) / batch
        return max(1, min(batch, int(training / (3 * each))))

    @functools.cached_property
    def training_loss(self) -> Any:
        """What clients minimise; `loss_fn` is that of evaluation."""
        loss_fn = getattr(models.losses, self.config.loss)
        return models.losses.augmented(loss_fn) if self.config.augment else loss_fn

    def cost(self) -> RoundCost:
        """What one round costs one client."""
        return self._cost(self.solo_examples)

    def _cost(self, solo_examples: int) -> RoundCost:
        config = self.config
        solo = batch_shape(self.population, solo_examples) if solo_examples else None
        optimizer = client_optimizer(config)(jnp.int32(0))
        options: dict[str, Any] = dict(personal_router=config.router == "personal", control_variates=config.control_variates)
        if TRAINED_AS.get(config.router, config.router) == "statistics":
            options["statistics_batch"] = batch_shape(self.population, STATISTICS_BATCHES * config.batch_size)
        options |= dict(solo_batch=solo, max_slots=self.aligner.max_slots)
        links = {"down": broadcast(config), "up": aggregator(config).encoder}
        options |= {way: link.num_bytes for way, link in links.items() if link is not None}
        return round_cost(self.parts, self.training_loss, optimizer, batch_shape(self.population, config.batch_size), **options)

    def _processed(self, client: jax.Array) -> jax.Array:
        """Examples that these clients process in a round."""
        sizes: dict[str, Any] = dict(
            batch_size=self.config.batch_size, local_epochs=self.config.local_epochs, local_steps=self.config.local_steps
        )
        return num_processed(jax.vmap(self.population.num_examples)(client), **sizes)

    def admit(self, client: jax.Array, pace: jax.Array | float, cost: RoundCost) -> Cohort:
        """These clients as a cohort, with the slots that a round of this cost would give them at their pace."""
        config = self.config
        examples = self._processed(client)
        return admit(self.population, client, cost, self.aligner, deadline=config.deadline, examples=examples, pace=pace)[0]

    def chunk(self, memory_bytes: float) -> int:
        """The configured chunk, or the one that `fitting` gives."""
        return self.fitting(memory_bytes) if self.config.chunk is None else min(self.config.chunk, self.config.cohort)

    def fitting(self, memory_bytes: float) -> int:
        """Clients that train side by side in `memory_bytes`, or the cache of a CPU, at most the cohort or a device's share of it."""
        saved = sum(choice.saved for choice in self.algorithm(self.config.cohort).plan(self.population))
        return self._chunk(room(memory_bytes), saved)

    def copied(self, memory_bytes: float) -> int:
        """Clients that fit side by side where each has copies of all that it holds."""
        return self._chunk(memory_bytes, 0.0)

    def _chunk(self, memory_bytes: float, saved: float) -> int:
        each = -(-self.config.cohort // (1 if self.mesh is None else self.mesh.size))
        sizes = dict(cohort_size=each, max_slots=self.aligner.max_slots, probes=self.aligner.probes)
        return chunk_size(self.cost(), **sizes, memory_bytes=memory_bytes, saved=saved)


def build(config: TrainConfig) -> Setup:
    """Loads the data, splits it, and makes model and aligner. `config` must be valid.

    Raises:
      ValueError: naming the field that cannot be.
    """
    mesh = make_mesh(config)
    dataset = sources.load(config.data)  # a test set that must be drawn is the same for every seed
    owners, content = clients.split(config, dataset), dataset.digest()
    dataset = clients.shifted(config, dataset, owners)
    train, held_out = splits.holdout(owners, LOCAL_TEST_FRACTION, config.seed)
    profile, test = clients.profile(config, len(owners)), (jnp.asarray(dataset.test_x), jnp.asarray(dataset.test_y))
    digests = {"data": content, "profile": clients.digest(profile)}
    labels = dict(num_classes=dataset.num_classes, label_prior=clients.label_prior(dataset, train))
    if config.stream is not None and config.loss == "balanced_softmax":
        raise ValueError("loss: balanced_softmax does not go with stream; leave out one of them")
    if config.stream is not None:
        stream, of_test = (Stream.from_arrays(dataset.x, dataset.y, owned, profile) for owned in (train, held_out))
        holdout = of_test.window(np.asarray(clients.evaluated(len(owners))))
        made = dataclasses.replace(assemble(config, stream.index, holdout, test, labels), stream=stream, digests=digests)
        return _on(mesh, made)
    if (needed := 4 * len(train) * dataset.num_classes) > MOST_LABEL_BYTES and config.loss == "balanced_softmax":
        raise ValueError(f"loss: balanced_softmax keeps a number for each client and class, which takes {needed} bytes of at most 4e9")
    prior = clients.label_prior(dataset, train, np.arange(len(train))) if config.loss == "balanced_softmax" else None
    population: Any
    if mesh is not None:
        population = distributed.from_arrays(dataset.x, dataset.y, train, profile, prior, mesh=mesh)
        holdout = Stream.from_arrays(dataset.x, dataset.y, held_out, profile).window(np.asarray(clients.evaluated(len(owners))))
    else:
        x, y = jnp.asarray(dataset.x), jnp.asarray(dataset.y)
        population, holdout = (Population.from_arrays(x, y, owned, profile, own) for owned, own in ((train, prior), (held_out, None)))
    return _on(mesh, dataclasses.replace(assemble(config, population, holdout, test, labels), digests=digests))


def make_mesh(config: TrainConfig) -> Mesh | None:
    """The devices that a configuration names, None for one.

    Raises:
      ValueError: naming the field that cannot be.
    """
    found, parts = len(jax.devices()), config.expert_devices
    number = config.devices or (parts if jax.process_count() == 1 else found)
    if number > found or (number < found and jax.process_count() > 1):
        what = "at most the number there is" if jax.process_count() == 1 else "all those of all processes"
        raise ValueError(f"devices: must be {what} ({found}), got {number}")
    if config.stream is not None and jax.process_count() > 1:
        raise ValueError("stream: does not go with several processes, each of which has the examples of its own devices' clients only")
    if number % parts or config.experts % parts:
        raise ValueError(f"expert_devices: must divide devices ({number}) and experts ({config.experts}), got {parts}")
    return None if number == 1 else distributed.mesh(number // parts, parts)


def _on(mesh: Mesh | None, setup: Setup) -> Setup:
    """The setup on a mesh. Windows of a stream go to all of its devices."""
    if mesh is None:
        return setup
    holdout, test, prior = distributed.everywhere((setup.holdout, setup.test, setup.label_prior), mesh)
    return dataclasses.replace(setup, mesh=mesh, holdout=holdout, test=test, label_prior=prior)


def variant(setup: Setup, config: TrainConfig) -> Setup:
    """The same clients and data, not copied, with the model and aligner of `config`, which differs in seed or aligner only."""
    made = assemble(config, setup.population, setup.holdout, setup.test, dict(num_classes=setup.num_classes, label_prior=setup.label_prior))
    return dataclasses.replace(made, stream=setup.stream, digests=setup.digests)


def assemble(config: TrainConfig, population: Population, holdout: Population, test: tuple[Any, Any], labels: dict[str, Any]) -> Setup:
    """Makes model and aligner for these data. `labels` has num_classes and label_prior.

    Raises:
      ValueError: naming the field that cannot be.
    """
    shape = test[0].shape[1:]
    if config.augment and len(shape) not in (2, 3):
        raise ValueError(f"augment: {config.data} has examples of shape {shape}, only images can be mirrored and shifted")
    model = models.create(**architecture(config, shape, labels["num_classes"]))
    if config.init_from is not None:
        load_weights(model, config.init_from)
    parts = partition(model)
    number = len(groups(parts.experts))
    if number > 1 and config.assignment == "shared":
        raise ValueError(f"assignment: {config.model} has {number} groups of experts, each with an assignment of its own; use per_layer")
    setup = Setup(
        config, population, holdout, test, **labels, model=model, parts=parts, aligner=make_aligner(config, number),
        loss_fn=models.losses.cross_entropy, fitness=make_fitness(config),
    )  # fmt: skip
    try:
        setup.cost()  # traces the model on a batch
    except Exception as error:  # whatever a model that does not fit raises
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"model: {config.model} does not fit data {config.data} ({reason})") from error
    return setup


def architecture(config: TrainConfig, input_shape: tuple[int, ...], num_classes: int) -> dict[str, Any]:
    """The arguments of `models.create` that make the model of a configuration.

    Raises:
      ValueError: naming `model_options` or `shared_experts`, if they cannot be.
    """
    options: dict[str, Any] = dict(config.model_options)
    if taken := sorted(set(options) & {"name", "input_shape", "num_classes", "num_experts", "top_k", "seed", "dtype", "per_layer"}):
        raise ValueError(f"model_options: {', '.join(taken)} cannot be set there, it follows from the data or has a field of its own")
    if config.model in MODELS:
        options = {"balance_weight": config.balance_weight, "shared_experts": config.shared_experts, **options}
    elif config.shared_experts:
        raise ValueError(f"shared_experts: {config.model} must make its own; leave it at 0, or pass it with model_options")
    return dict(
        name=config.model, input_shape=input_shape, num_classes=num_classes, num_experts=config.experts, top_k=config.top_k,
        seed=config.seed, dtype=None if config.dtype == "float32" else jnp.bfloat16, per_layer=config.assignment == "per_layer", **options,
    )  # fmt: skip
