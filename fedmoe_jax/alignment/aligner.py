"""Aligners: capacity, fitness and load put together into who trains which experts this round."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from fedmoe_jax import sampling
from fedmoe_jax.alignment import assign
from fedmoe_jax.alignment import fitness as fitness_stage
from fedmoe_jax.alignment import load as load_stage
from fedmoe_jax.base import NO_EXPERT, Aligner, Alignment, Cohort, Feedback, Fitness, LoadMonitor, client_keys, pytree, stage_key
from fedmoe_jax.experts import by_group


@pytree
class AlignerState:
    """What was learnt: fitness of every pair, load of every expert, and the last prices of `balanced`."""

    fitness: PyTree
    load: PyTree
    prices: Float[Array, " expert"]


@pytree
class Promise:
    """What an aligner promises of an assignment, for who wants to check it: with several groups, of each.

    Clients fill so many `slots` of a group. Where load has bounds, `lower` and `upper` are the least and the most clients of an expert,
    and loads are outside of them by `violation` clients in all, 0 where that can be.
    """

    slots: Int[Array, "client *group"]
    lower: Int[Array, " all_experts"] | None = None
    upper: Int[Array, " all_experts"] | None = None
    violation: Int[Array, "*group"] | None = None


def random(
    *, num_experts: int, max_slots: int, groups: int = 1, fitness: Fitness | None = None, load: LoadMonitor | None = None
) -> Aligner:
    """Random experts for each client; the baseline. Fitness is learnt, for reports, but not used and not probed for.

    Args:
      num_experts: experts of the model, in each group.
      max_slots: the most experts of a group that a client gets, 1 to num_experts.
      groups: groups of experts, each with an assignment of its own, see `experts.ExpertParam`.
      fitness: how fitness is learnt; default `fitness.solo()`.
      load: how load is watched; default `load.monitor()`.

    Raises:
      ValueError: if `num_experts`, `max_slots` or `groups` is out of its range.
    """

    def choose(key, state, cohort, score):
        return assign.random(client_keys(key, cohort.client), cohort.slots, num_experts), state.prices

    return _aligner(choose, num_experts, max_slots, groups, fitness, load, probing=False)


def greedy(
    *, num_experts: int, max_slots: int, groups: int = 1, fitness: Fitness | None = None, load: LoadMonitor | None = None
) -> Aligner:
    """Each client's fittest experts, ties broken at random, whatever that does to the load. Arguments as in `random`."""

    def choose(key, state, cohort, score):
        return assign.greedy(score, cohort.slots, key=client_keys(key, cohort.client)), state.prices

    return _aligner(choose, num_experts, max_slots, groups, fitness, load, probing=True)


def load_only(
    *, num_experts: int, max_slots: int, groups: int = 1, fitness: Fitness | None = None, load: LoadMonitor | None = None
) -> Aligner:
    """The least trained experts first, dealt out in turn, whoever they suit. Arguments as in `random`.

    Reads `.load` of the monitor's state, as `load.monitor()` keeps it.
    """

    def choose(key, state, cohort, score):
        even = jnp.full(num_experts, cohort.slots.sum() // num_experts)
        bounds = even, even + (cohort.slots.sum() % num_experts > 0), jnp.int32(0)
        return assign.round_robin(state.load.load, cohort.slots, key=key), state.prices, *bounds

    return _aligner(_by_number(choose), num_experts, max_slots, groups, fitness, load, probing=False)


def balanced(
    *,
    num_experts: int,
    max_slots: int,
    groups: int = 1,
    fitness: Fitness | None = None,
    load: LoadMonitor | None = None,
    objective: str = "fitness",
    deficit_weight: float = 1.0,
    download_price: float = 0.0,
    least_spread: float = 0.0,
) -> Aligner:
    """The paper's alignment: the most fitness within capacity and load bounds [1]. Arguments as in `random`, and:

    Args:
      objective: "fitness" keeps the load within the monitor's bounds. "fitness+deficit" has no bounds: each client takes
        the experts with the highest fitness + deficit_weight * deficit / (slots of the round / num_experts).
      deficit_weight: fitness that being behind by a mean round is worth, 0 or more.
      download_price: fitness that saving the download of an expert is worth, 0 or more. Clients then prefer experts whose
        current version they still have.
      least_spread: where the scores of the experts that a client tries in a round differ by less (`fitness.FitnessState`), experts are
        dealt out within the bounds of load whoever they suit, since following noise costs accuracy. 0 never does.

    Raises:
      ValueError: if an argument is out of its range.

    References:
      [1] "Efficient Training of Large-Scale AI Models Through Federated Mixture-of-Experts: A System-Level Approach",
        arXiv 2507.05685.
    """
    if objective not in ("fitness", "fitness+deficit"):
        raise ValueError(f'objective is {objective!r}, it must be "fitness" or "fitness+deficit"')
    for name, value in {"deficit_weight": deficit_weight, "download_price": download_price, "least_spread": least_spread}.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} is {value}, it must be 0 or more")
    monitor = load_stage.monitor() if load is None else load

    def within_bounds(key, state, cohort, score, wanted):
        lower, upper = monitor.bounds(state.load, cohort.slots, wanted)
        mask, info = assign.balanced(score, cohort.slots, lower, upper, key=key, prices=state.prices, return_info=True)
        least = assign.least_violation(cohort.slots, lower, upper)  # and not what the mask makes of it, where that can be told
        return mask, info.prices, lower, upper, jnp.where(jnp.isfinite(score).all(), least, info.violation)

    def with_deficits(key, state, cohort, score, wanted):
        behind = monitor.deficit(state.load) * num_experts / jnp.maximum(cohort.slots.sum(), 1)
        return assign.greedy(score + deficit_weight * behind, cohort.slots, key=client_keys(key, cohort.client)), state.prices

    def choose(key, state, cohort, score):
        wanted = load_stage.wanted(score, cohort.slots)
        if least_spread:
            if not isinstance(state.fitness, fitness_stage.FitnessState):
                raise ValueError(f"least_spread is {least_spread}, but the state of this fitness tells no spread: leave it at 0")
            score = jnp.where(state.fitness.differs(least_spread), score, 0.0)
        if download_price and cohort.cached is not None:
            score = score + download_price * cohort.cached
        return (within_bounds if objective == "fitness" else with_deficits)(key, state, cohort, score, wanted)

    return _aligner(_by_number(choose), num_experts, max_slots, groups, fitness, monitor, probing=True)


def full(*, num_experts: int, groups: int = 1, fitness: Fitness | None = None, load: LoadMonitor | None = None) -> Aligner:
    """Every present client holds every expert, whatever its slots: plain federated averaging of the whole model."""

    def choose(key, state, cohort, score):
        return jnp.broadcast_to(cohort.present[:, None], score.shape), state.prices

    return _aligner(choose, num_experts, num_experts, groups, fitness, load, probing=False, whole=True)


def held_slots(mask: Bool[Array, "client expert"], max_slots: int) -> Int[Array, "client slot"]:
    """The experts that each row of `mask` marks, in ascending order, then `NO_EXPERT`. Inverse of `experts.held_mask`."""
    num_experts = mask.shape[1]
    countdown = jnp.where(mask, num_experts - jnp.arange(num_experts), 0)
    places, _ = jax.lax.top_k(countdown, max_slots)
    return jnp.where(places > 0, num_experts - places, NO_EXPERT)


Choose = Callable[[Key[Array, ""], AlignerState, Cohort, Float[Array, "client expert"]], tuple[Array, ...]]


def grouped(aligner: Aligner, groups: int) -> Aligner:
    """An aligner of several groups of experts, each aligned alike and on its own, from one of a single group.

    A client holds as many experts of each group. What `aligner` keeps gets a leading axis of groups, and `fitness_mean` a
    last one; one group leaves `aligner` as it is.

    Raises:
      ValueError: if `groups` < 1, or `aligner` is one of several groups or does not say `num_experts`.
    """
    if groups < 1:
        raise ValueError(f"groups is {groups}, it must be at least 1")
    if groups == 1 or aligner.groups == groups:
        return aligner
    if aligner.groups != 1 or aligner.num_experts is None:
        raise ValueError(f"aligner must be for one group and say its num_experts, to be made one for {groups}")
    first = tuple(group * aligner.num_experts for group in range(groups))

    def init(num_clients: int) -> PyTree:
        return jax.vmap(lambda _: aligner.init(num_clients))(jnp.arange(groups))

    def renumbered(expert: Int[Array, "group client slot"], sign: int) -> Int[Array, "group client slot"]:
        return jnp.where(expert == NO_EXPERT, NO_EXPERT, expert + sign * jnp.array(first, expert.dtype)[:, None, None])

    def apart(rows: Array) -> Array:
        return jnp.moveaxis(by_group(rows, groups), 1, 0)  # [client, all] -> [group, client, each]

    def together(rows: Array) -> Array:
        return jnp.moveaxis(rows, 0, 1).reshape(rows.shape[1], -1)

    def align(key: Key[Array, ""], state: PyTree, cohort: Cohort) -> tuple[Alignment, PyTree]:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(groups))
        cached = None if cohort.cached is None else apart(cohort.cached)

        def one(key, state, cached):
            return aligner.align(key, state, dataclasses.replace(cohort, cached=cached))

        each, state = jax.vmap(one)(keys, state, cached)
        held, probed = renumbered(each.held, 1), renumbered(each.probed, 1)
        promised = each.promised
        if promised is not None:
            slots, bounds = promised.slots.T, (promised.lower, promised.upper)
            lower, upper = (None if bound is None else bound.reshape(-1) for bound in bounds)
            promised = dataclasses.replace(promised, slots=slots, lower=lower, upper=upper)
        return Alignment(together(held), together(probed), together(each.fitness), each.fitness_mean.T, promised), state

    def learn(state: PyTree, cohort: Cohort, alignment: Alignment, feedback: Feedback) -> PyTree:
        held, probed = renumbered(apart(alignment.held), -1), renumbered(apart(alignment.probed), -1)
        slots = alignment.held.shape[1]
        solo = [apart(feedback.solo_loss[:, :slots]), apart(feedback.solo_loss[:, slots:])]
        rows = tuple(map(apart, (feedback.tokens, feedback.correct, feedback.loss)))

        def one(state, held, probed, fitness, mean, rows, solo):
            return aligner.learn(state, cohort, Alignment(held, probed, fitness, mean), Feedback(feedback.examples, *rows, solo))

        each = (held, probed, apart(alignment.fitness), alignment.fitness_mean.T, rows, jnp.concatenate(solo, axis=2))
        return jax.vmap(one)(state, *each)

    return Aligner(init, align, learn, aligner.max_slots, aligner.probes, aligner.num_experts, groups)


def _by_number(choose: Choose) -> Choose:
    """The same, but it sees present clients first, each in the order of their numbers: so the order of the cohort changes nothing."""

    def ordered(key, state, cohort, score):
        order = jnp.lexsort((cohort.client, ~cohort.present))
        cohort, score = jax.tree.map(lambda rows: rows[order], (cohort, score))
        mask, *others = choose(key, state, cohort, score)
        return mask[sampling.inverse(order)], *others

    return ordered


def _aligner(
    choose: Choose, num_experts: int, max_slots: int, groups: int, fitness: Any, load: Any, *, probing: bool, whole: bool = False
) -> Aligner:
    """The Aligner of each group around `choose(key, state, cohort, score) -> (mask, prices)`.

    Where it keeps to bounds, they and the violation come behind. With `probing` it goes by fitness, and then gives nobody an expert whose
    score is not finite. `whole` fills slots that clients do not have.
    """
    if num_experts < 1:
        raise ValueError(f"num_experts is {num_experts}, it must be at least 1")
    if not 1 <= max_slots <= num_experts:
        raise ValueError(f"max_slots is {max_slots}, it must be 1 to num_experts, {num_experts}")
    fitness = fitness_stage.solo() if fitness is None else fitness
    load = load_stage.monitor() if load is None else load
    probes = fitness.probes if probing else 0

    def init(num_clients: int) -> AlignerState:
        return AlignerState(fitness.init(num_clients, num_experts), load.init(num_experts), jnp.zeros(num_experts, jnp.float32))

    def align(key: Key[Array, ""], state: AlignerState, cohort: Cohort) -> tuple[Alignment, AlignerState]:
        slots = jnp.where(cohort.present, jnp.minimum(cohort.slots, max_slots), 0)
        score = fitness.score(state.fitness, cohort.client)
        mask, prices, *bounds = choose(stage_key(key, "assign"), state, dataclasses.replace(cohort, slots=slots), score)
        held = held_slots(mask, max_slots)
        probed = _probes(client_keys(stage_key(key, "probe"), cohort.client), mask, probes)
        of_held = jnp.take_along_axis(score, jnp.maximum(held, 0), axis=1)
        alignment = Alignment(
            held=held,
            probed=probed,
            fitness=jnp.where(held == NO_EXPERT, 0.0, of_held),
            fitness_mean=jnp.where(cohort.present, score.mean(axis=1), 0.0),
        )
        allowed = jnp.isfinite(score).sum(axis=1) if probing else num_experts
        filled = jnp.where(cohort.present, num_experts, 0) if whole else jnp.minimum(slots, allowed)
        return dataclasses.replace(alignment, promised=Promise(filled, *bounds)), AlignerState(state.fitness, state.load, prices)

    def learn(state: AlignerState, cohort: Cohort, alignment: Alignment, feedback: Feedback) -> AlignerState:
        held = jnp.where(cohort.present[:, None], alignment.held, NO_EXPERT)
        slots = jnp.where(cohort.present, jnp.minimum(cohort.slots, max_slots), 0)
        wanted = load_stage.wanted(fitness.score(state.fitness, cohort.client), slots)
        return AlignerState(
            fitness.update(state.fitness, cohort, alignment, feedback),
            load.update(state.load, held, feedback.tokens, wanted),
            state.prices,
        )

    return grouped(Aligner(init, align, learn, max_slots, probes, num_experts), groups)


def _probes(key: Key[Array, " client"], mask: Bool[Array, "client expert"], probes: int) -> Int[Array, "client probe"]:
    """Distinct random experts that a client does not hold. Clients that hold none try none."""
    num_experts = mask.shape[1]
    noise = jax.vmap(lambda k: jax.random.uniform(k, (num_experts,)))(key)
    noise = jnp.where(mask | ~mask.any(axis=1, keepdims=True), -1.0, noise)
    best, expert = jax.lax.top_k(noise, min(probes, num_experts))
    probed = jnp.where(best >= 0, expert, NO_EXPERT)
    return jnp.pad(probed, ((0, 0), (0, probes - probed.shape[1])), constant_values=NO_EXPERT)
