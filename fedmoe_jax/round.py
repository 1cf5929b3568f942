"""One round of federated Mixture-of-Experts training, as one pure function, and the state that it carries."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from fedmoe_jax import aggregation, arguments, cache, invariants, mass, packed, posterior, sampling, scaffold, sharding
from fedmoe_jax.aggregation import Transform, compression
from fedmoe_jax.alignment import capacity, holders
from fedmoe_jax.alignment.capacity import admit as admit
from fedmoe_jax.base import NO_EXPERT, Aggregator, Aligner, Alignment, Cohort, LossFn, Population, RoundCost, stage_key
from fedmoe_jax.conditions import Conditions, steady
from fedmoe_jax.experts import combine, groups, map_groups, num_experts
from fedmoe_jax.info import Info, Traffic, downloads, summarize
from fedmoe_jax.local import plan, primal
from fedmoe_jax.local.cohort import Trainer, batch_shape
from fedmoe_jax.local.routers import keep_routers, router_rows
from fedmoe_jax.state import State as State
from fedmoe_jax.state import start

STATISTICS_BATCHES = 4
"""Batches of its examples of which a client returns statistics in a round, with router "statistics"."""


class Opening(NamedTuple):
    """What a round has settled before its clients train: who takes part, who holds what, and what that is to cost.

    `key` is that of local training, `planned` the seconds that the round takes each client by its profile, `kept` whether the aligner
    did what it promised, where that is to be checked.
    """

    key: Key[Array, ""]
    available: Bool[Array, " client"]
    unavailable: Bool[Array, " client"]
    admitted: Bool[Array, " client"]
    cohort: Cohort
    alignment: Alignment
    aligned: PyTree
    prior: Float[Array, "client all_slots"]
    cost: RoundCost
    traffic: Traffic
    planned: Float[Array, " client"]
    kept: Any = None


class Parts(NamedTuple):
    """A round before and after local training, for clients that train elsewhere (`deploy`).

    begin(state, population, available, sampled) -> Opening, of the clients `sampled`, those of `sampling.of_round` in a simulation, and
    finish(state, opening, trainees, taken, reached, outcome) -> (State, Info): `trainees` is the cohort of those whose update
    is there, `taken` their seconds, `reached` who surely received what it holds, `outcome` as `Trainer.train` returns it.
    """

    begin: Callable[..., Opening]
    finish: Callable[..., tuple[State, Info]]
    trainer: Trainer


class Algorithm(NamedTuple):
    """init(key, population) -> State; step(state, population) -> (State, Info), one round, jit-compiled.

    plan(population) tells how local training treats each weight, and why. `parts` are those of `step`.
    """

    init: Callable[[Key[Array, ""], Population], State]
    step: Callable[[State, Population], tuple[State, Info]]
    plan: Callable[[Population], tuple[plan.Choice, ...]]
    parts: Parts | None = None


def federated_moe(
    model: nnx.Module,
    loss_fn: LossFn,
    *,
    client_optimizer: optax.GradientTransformation | Callable[[Array], optax.GradientTransformation],
    server_optimizer: optax.GradientTransformation,
    aligner: Aligner,
    cohort_size: int,
    batch_size: int,
    local_epochs: int | None = None,
    local_steps: int | None = None,
    prox: float = 0.0,
    prox_on: str = "all",
    router: str = "shared",
    router_prior: float = 0.0,
    deadline: float | None = None,
    conditions: Conditions | None = None,
    solo_examples: int | None = None,
    chunk_size: int | None = None,
    engine: str = "auto",
    aggregator: Aggregator | None = None,
    broadcast: Transform | None = None,
    control_variates: bool = False,
    reject_above: float | None = None,
    min_holders: int = 1,
    sampling_rate: float | None = None,
    personal_budget_bytes: float = 4e9,
    check: bool = False,
    mesh: jax.sharding.Mesh | None = None,
) -> Algorithm:
    """Federated training of a model whose experts are spread over clients by an aligner.

    Args:
      model: an nnx model with ExpertParams; its weights are the initial ones. Layers of different `ExpertParam` groups follow
        assignments of their own, for as many of which the aligner must be made.
      loss_fn: loss_fn(model, batch, key) -> (loss[example], aux), see `base.LossFn`.
      client_optimizer: an optax optimizer, fresh in each round, or a function of the round that makes one.
      server_optimizer: gets minus the aggregated delta as its gradient; `optax.sgd(1.0)` is FedAvg.
      cohort_size: clients sampled each round, at most the population.
      local_epochs, local_steps: exactly one of them: passes over a client's data, or optimizer steps.
      batch_size: examples in a local step.
      prox, prox_on: weight of the FedProx term and what it pulls, see `local.primal.pulls`.
      router: "shared", or "personal": router rows stay on the client. Those of the global model are the population's mean,
        which the simulation keeps for evaluation and which no client sends. "statistics": shared on clients, but the server
        keeps statistics of what each expert was sent, of which it makes the router of the global model, see `posterior`.
      router_prior: multiple of a client's centred fitness added to its router logits during its own training.
      deadline: seconds that a client has; it limits slots. Clients too slow for the shared part take no part, and what
        arrives late is lost.
      conditions: who can be reached and how fast clients really are; default `conditions.steady()`.
      solo_examples: examples of the solo evaluation, 0 for none; `batch_size` if None.
      chunk_size: clients trained side by side on a device; if None all of the cohort, on a CPU as many as its cache holds. Changes
        results by rounding only.
      engine: how clients train. "primal" gives each its own copy of the weights, "dual" none of a kernel's (see `local.dual`,
        for optimizers that are linear), "auto" whichever is predicted to cost less for each kernel. Changes results by rounding only.
      aggregator: of the clients' updates, `aggregation.mean()` if None; a chain that compresses them is trained with the primal engine.
      broadcast: what becomes of weights on their way to clients, `aggregation.quantize(...)`; they arrive as they are if None. Clients
        train from what arrives and return the difference to it, which the server adds to its exact weights.
      control_variates: clients correct their gradients as in SCAFFOLD, see `scaffold`, which doubles the traffic and keeps a
        gradient of the whole model for each client of the population. Clients then train with the primal engine.
      reject_above: rejects a client's update whose norm is above so many times that of the same weights as it received them, taken
        as 1 where it is less. Clients then train with the primal engine. What is not finite is always rejected.
      min_holders: clients that must hold an expert, lest it be left out of the round and keep its weights: where fewer are assigned to it
        nobody gets it, and where fewer send it something, in time, nothing is learnt of it. See `alignment.holders`.
      sampling_rate: chance of each client to be in a round, above 0 and at most 1 (Poisson sampling), see `sampling.drawn`. Always
        `cohort_size` clients if None.
      personal_budget_bytes: most that personal routers, control variates and residuals may each take in all.
      check: each round's `Info` tells whether `invariants.NAMES` hold.
      mesh: devices that share the work, of `distributed.mesh`; the population is best placed on it with `distributed.place`. Changes
        results by rounding only.

    Raises:
      ValueError: naming the argument that cannot be.
    """
    numbers: dict[str, Any] = dict(cohort_size=cohort_size, batch_size=batch_size, chunk_size=chunk_size, prox=prox)
    numbers |= dict(local_epochs=local_epochs, local_steps=local_steps, router_prior=router_prior)
    numbers |= dict(solo_examples=solo_examples, deadline=deadline, reject_above=reject_above, min_holders=min_holders)
    numbers |= dict(sampling_rate=sampling_rate)
    experts, parts = arguments.checked(model, aligner, router, numbers)
    mesh = sharding.checked(mesh, num_experts(parts.experts))
    aggregator = aggregation.mean() if aggregator is None else aggregator
    conditions = steady() if conditions is None else conditions
    limit = jnp.inf if deadline is None else deadline
    used, refused = plan.chosen(engine, client_optimizer, aggregator, parts, control_variates, reject_above)
    arguments.check_aggregation(aggregator, broadcast, control_variates, router, mesh, min_holders)
    arguments.check_room(aggregator, parts, cohort_size, aligner.max_slots, personal_budget_bytes)
    trainer = Trainer(
        parts, loss_fn, client_optimizer, batch_size, local_epochs, local_steps, primal.pulls(parts, prox, prox_on), router == "personal",
        batch_size if solo_examples is None else solo_examples, chunk_size, aggregator,
        aligner.max_slots, aligner.probes, used, control_variates, STATISTICS_BATCHES * batch_size if router == "statistics" else 0,
        broadcast, reject_above, mesh, check and aggregator.law is not None,
    )  # fmt: skip

    def init(key: Key[Array, ""], population: Population) -> State:
        if cohort_size > population.num_clients:
            raise ValueError(f"cohort_size is {cohort_size}, it must be at most the population, {population.num_clients}")
        personal = router_rows(parts.experts, population.num_clients, personal_budget_bytes) if router == "personal" else None
        private = None if aggregator.private is None else aggregator.private.start(key)
        controls, residuals, sizes = None, None, (population.num_clients, personal_budget_bytes)
        if control_variates:
            controls = scaffold.start(parts.experts, parts.shared, *sizes, personal_router=router == "personal")
        if aggregator.encoder is not None:
            residuals = aggregator.encoder.init(scaffold.travelling(parts.experts, router == "personal"), parts.shared, *sizes)
        statistics = posterior.start(parts, batch_shape(population, batch_size)) if router == "statistics" else None
        own = personal, controls, statistics, residuals, private
        return sharding.place(start(key, population.num_clients, parts, own, server_optimizer, aligner), population.num_clients, mesh)

    def begin(state: State, population: Population, available: Bool[Array, " client"], sampled: Int[Array, " client"]) -> Opening:
        key = jax.random.fold_in(state.key, state.round)
        cost = trainer.cost(population, state.round)
        drawn = sampling.drawn(state.key, state.round, population.num_clients, cohort_size, sampling_rate)
        available, unavailable = available & drawn, drawn & ~available
        examples = trainer.examples(jax.vmap(population.num_examples)(sampled))
        cached = cache.current(state.cache, sampled, state.last_trained)
        limits = dict(deadline=deadline, examples=examples, pace=state.pace[sampled], available=available, cached=cached)
        cohort, admitted = admit(population, sampled, cost, aligner, **limits)
        made, aligned = aligner.align(stage_key(key, "align"), state.aligner, cohort)
        alignment = holders.leave_out(made, experts, min_holders)
        kept = invariants.as_promised(made, alignment, min_holders, aligner.groups, experts) if check else None
        down, up = trainer.expert_bytes()
        traffic = downloads(alignment, cached, down, trainer.report_bytes(population), up)
        planned = _seconds(population, cost, alignment, traffic, examples, sampled)
        prior = router_prior * alignment.centred
        settled = (cohort, alignment, aligned, prior, cost, traffic, planned, kept)
        return Opening(stage_key(key, "local"), available, unavailable, admitted, *settled)

    def finish(state: State, opening: Opening, trainees: Cohort, taken: Float[Array, " client"], reached: Any, outcome: Any) -> Any:
        cohort, alignment = opening.cohort, opening.alignment
        delta, routers, kept, feedback, summary, masses = outcome
        tokens = combine(feedback.tokens.astype(jnp.float32), alignment.held, jnp.ones(alignment.held.shape), experts)
        served = holders.served(trainees, alignment, feedback, experts, min_holders, hidden=aggregator.private is not None)
        (weights, shared), optimizer = _serve(server_optimizer, state, delta, *served)
        personal = None
        if routers is not None:
            personal, weights = keep_routers(state.personal, weights, routers, trainees, alignment.held)
        told = _told(aggregator.private, state, trainees, alignment, feedback)
        learnt = aligner.learn(opening.aligned, trainees, alignment, told)
        total, last = state.tokens + tokens, jnp.where(served[0], state.round, state.last_trained)
        pace, held = _of_clients(state, cohort, alignment, taken, opening.planned, reached)
        controls, seen, residuals, private = kept
        carried = (personal, controls, seen, residuals, private, optimizer, learnt)
        new = State(state.key, state.round + 1, weights, shared, *carried, total, last, pace, held)
        dropped = opening.available & ~opening.admitted | cohort.present & ~trainees.present
        facts = dict(tokens=tokens, total=total, staleness=state.round - last, unavailable=opening.unavailable, dropped=dropped)
        info = summarize(cohort, trainees, alignment, opening.cost, opening.traffic, jnp.minimum(taken, limit), summary, **facts)
        if check:
            conserved = mass.conserved(aggregator.law, masses, delta, alignment.held, feedback, state.round)
            looked = (cohort, trainees, alignment, feedback, info.load, tokens, (weights, shared), aligner.groups)
            info = dataclasses.replace(info, invariants=invariants.holding(*looked, opening.kept, conserved))
        return sharding.keep(new, state.pace.shape[0], mesh), sharding.everywhere(info, mesh)

    @jax.jit
    def step(state: State, population: Population) -> tuple[State, Info]:
        sampled = sampling.of_round(state.key, state.round, population.num_clients, cohort_size)
        available, slowdown = conditions.draw(stage_key(state.key, "conditions"), state.round, sampled)
        opening = begin(state, population, available, sampled)
        taken = slowdown * opening.planned
        trainees = dataclasses.replace(opening.cohort, present=opening.cohort.present & (taken <= limit))
        arrived = _arrived(broadcast, state)
        outcome = trainer.train(opening.key, arrived, population, trainees, opening.alignment, opening.prior, opening.cost)
        return finish(state, opening, trainees, taken, opening.cohort.present, outcome)

    def explain(population: Population) -> tuple[plan.Choice, ...]:
        return tuple(choice._replace(reason=refused or choice.reason) for choice in trainer.plan(population))

    return Algorithm(init, step, explain, Parts(begin, finish, trainer))


def rounds(step: Callable[[State, Population], tuple[State, Info]], most: int) -> Callable[..., tuple[State, Info]]:
    """Many rounds without a host transfer: run(state, population, count) -> (state, Info of each round), jit-compiled.

    `count`, 1 to `most`, is traced, so that a shorter last block does not compile again; rows of Info past it are
    0. If it is None, there are `most` rounds, and a GPU does not wait for its host between them. The state is donated.
    """

    def run(state, population, count=None):
        _, shape = jax.eval_shape(step, state, population)
        rows = packed.zeros(shape, most)

        def body(index, carry):
            state, rows = carry
            state, info = step(state, population)
            return state, packed.put(rows, index, info)

        state, rows = jax.lax.fori_loop(0, most if count is None else count, body, (state, rows))
        return state, packed.rows(rows, shape)

    return jax.jit(run, donate_argnums=0)


def _seconds(population, cost, alignment, traffic, examples, client) -> Float[Array, " client"]:
    """What the round takes each client by its profile."""
    profile = jax.tree.map(lambda row: row[client], population.profile)
    experts = traffic.bytes_down / jnp.maximum(cost.expert_bytes, 1.0)
    return capacity.seconds(profile, cost, traffic.held, examples=examples, probes=traffic.probed, downloads=experts)


def _of_clients(state, cohort, alignment, taken, planned, reached):
    """Pace and cache of all clients after a round that took those of the cohort so many seconds. Who was not reached may have nothing."""
    known = state.pace[cohort.client]
    seen = jnp.where(cohort.present, capacity.observe(known, taken, planned), capacity.forgive(known))
    pace = state.pace.at[cohort.client].set(seen)
    received = jnp.where(reached[:, None], jnp.concatenate([alignment.held, alignment.probed], axis=1), NO_EXPERT)
    return pace, cache.keep(state.cache, cohort.client, cohort.present, received, state.round)


def _arrived(broadcast, state) -> State:
    """The state with its weights as clients receive them."""
    if broadcast is None:
        return state
    weights = compression.received(broadcast, state.key, state.round, state.experts, state.shared, state.last_trained)
    return dataclasses.replace(state, experts=weights[0], shared=weights[1])


def _told(private, state, trainees, alignment, feedback):
    """What the aligner gets to know."""
    if private is None:
        return feedback
    key = jax.random.fold_in(state.private.key, state.round)
    return private.reported(stage_key(key, "feedback"), trainees, alignment, feedback)


def _serve(server_optimizer, state, delta, served, anyone):
    """The server's step on minus the delta. What too few trained keeps its value, and the optimizer learns nothing of it."""
    old = (state.experts, state.shared)

    def trained(served, new, value):
        return jnp.where(served.reshape(-1, *(1,) * (value.ndim - 1)), new, value)

    def among(new, other):
        experts = map_groups(trained, groups(state.experts), served, new[0], other[0])
        return experts, jax.tree.map(lambda new, value: jnp.where(anyone, new, value), new[1], other[1])

    gradient = among(jax.tree.map(jnp.negative, delta), jax.tree.map(jnp.zeros_like, delta))
    updates, optimizer = server_optimizer.update(gradient, state.optimizer, old)
    return among(optax.apply_updates(old, updates), old), optimizer
