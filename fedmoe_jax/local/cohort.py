"""Local training of a whole cohort: clients vmapped, in chunks that fit into memory, summed as they come."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from fedmoe_jax import mass, posterior, sampling, scaffold
from fedmoe_jax.base import (
    NO_EXPERT,
    Aggregator,
    Alignment,
    ClientUpdate,
    Cohort,
    Feedback,
    LossFn,
    Population,
    RoundCost,
    client_keys,
    stage_key,
)
from fedmoe_jax.conditional import replaced_if
from fedmoe_jax.experts import Partition, RouterParam, by_group, groups, num_experts, squared_norm
from fedmoe_jax.kernels import is_dual
from fedmoe_jax.local import dual, plan, primal, spread
from fedmoe_jax.local.cost import expert_bytes, plain_bytes, round_cost
from fedmoe_jax.local.routers import own_routers
from fedmoe_jax.local.slots import receive, received_of, with_bases
from fedmoe_jax.local.soundness import all_finite, bytes_of, only, without


class Received(NamedTuple):
    """What a client has of a round's state: `round.State` serves as well. `personal` are router rows as in `own_routers`, or None."""

    round: Any
    experts: Any
    shared: Any
    personal: Any = None


class Trainer(NamedTuple):
    """The hyper-parameters of local training, fixed for a run; see `round.federated_moe`."""

    parts: Partition
    loss_fn: LossFn
    client_optimizer: Any
    batch_size: int
    local_epochs: int | None
    local_steps: int | None
    prox: tuple[float, ...]
    personal: bool
    solo_examples: int
    chunk_size: int | None
    aggregator: Aggregator
    max_slots: int
    probes: int
    engine: str
    control_variates: bool
    statistics_examples: int
    broadcast: Any = None
    reject_above: float | None = None
    mesh: Any = None
    check: bool = False

    def optimizer(self, round: Any) -> optax.GradientTransformation:
        """The client optimizer of a round."""
        made = self.client_optimizer
        return made if isinstance(made, optax.GradientTransformation) else made(round)

    def cost(self, population: Population, round: Any) -> RoundCost:
        """What a round costs a client, from the traced model."""
        optimizer = self.optimizer(round)
        solo, seen = (batch_shape(population, n) if n else None for n in (self.solo_examples, self.statistics_examples))
        options: dict[str, Any] = self._traffic() | dict(solo_batch=solo, max_slots=self.max_slots, statistics_batch=seen)
        down, up = self._links()
        return round_cost(self.parts, self.loss_fn, optimizer, batch_shape(population, self.batch_size), down=down, up=up, **options)

    def _traffic(self) -> dict[str, Any]:
        return dict(personal_router=self.personal, control_variates=self.control_variates)

    def _links(self) -> tuple[Callable[[int, int], int], Callable[[int, int], int]]:
        """Bytes of a tensor on the way down and up."""
        return tuple(plain_bytes if way is None else way.num_bytes for way in (self.broadcast, self.aggregator.encoder))  # type: ignore

    def expert_bytes(self) -> tuple[Float[Array, " group"], Float[Array, " group"]]:
        """What one expert of each group takes on the link, down and up."""
        both = (expert_bytes(self.parts.experts, **self._traffic(), num_bytes=way) for way in self._links())
        down, up = (jnp.array(each, jnp.float32) for each in both)
        return down, up

    def report_bytes(self, population: Population) -> Float[Array, " group"]:
        """What a client returns of an expert of each group beside its weights."""
        number = len(groups(self.parts.experts))
        if not self.statistics_examples:
            return jnp.zeros(number)
        return jnp.array(posterior.report_bytes(posterior.start(self.parts, batch_shape(population, 1)), number), jnp.float32)

    def examples(self, owned: Any) -> Any:
        """Examples that a client with `owned` examples processes in a round."""
        return primal.num_processed(owned, batch_size=self.batch_size, local_epochs=self.local_epochs, local_steps=self.local_steps)

    def train(self, key, state, population, cohort: Cohort, alignment: Alignment, prior, cost: RoundCost) -> Any:
        """Trains the cohort, a client's `cost` telling how many at once where that is not set; it must be known while this is traced.

        Returns:
          (expert deltas, shared deltas), what each client added to its own router rows [client, slot, ...] (None when they are
          shared), the new control variates, sums of statistics, residuals and what a private aggregator keeps (None without),
          Feedback, (mean training loss, rejected updates), with `check` the `mass.Mass` of what each client sent.
        """
        size, devices = cohort.client.shape[0], 1 if self.mesh is None else self.mesh.size
        choices = () if self.engine == "primal" else self.plan(population)
        uses = tuple(choice.use for choice in choices) or self._untouched()
        sizes = dict(cohort_size=-(-size // devices), max_slots=self.max_slots, probes=self.probes)
        chunk = devices * plan.side_by_side(self.chunk_size, cost, choices, **sizes)
        chunks = -(-size // chunk)
        order, back = jnp.arange(size), None
        if chunks > 1:  # clients of like size side by side wait less for each other
            order = jnp.argsort(jnp.where(cohort.present, jax.vmap(population.num_examples)(cohort.client), 0))
            back = sampling.inverse(order)
        keys = client_keys(key, cohort.client)
        rows = (keys, cohort.client, cohort.client, cohort.present, alignment.held, alignment.probed, prior)
        rows = jax.tree.map(lambda row: _chunked(row[order], chunks, chunk), rows)
        rows = jax.lax.optimization_barrier(rows)  # else XLA puts sums over examples into those over clients, one block of a GPU
        kept, private = (state.controls, posterior.decayed(state.statistics), state.residuals), state.private
        room: tuple[Any, ...] = () if private is None else (private.norm,)
        noise = None if private is None else jax.random.fold_in(private.key, state.round)
        if self.aggregator.collects:
            room = chunks * chunk, alignment.held.shape[1] // len(groups(state.experts))
        scan = functools.partial(self.scan, key=noise) if self.mesh is None else functools.partial(spread.train, self)
        delta, kept, out = scan(state, population, rows, kept, room, uses)
        out = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:size], out)
        out = jax.lax.optimization_barrier(out)  # for the same reason
        feedback, routers, loss, rejected, masses = out if back is None else jax.tree.map(lambda a: a[back], out)
        feedback = Feedback(*feedback)
        examples = feedback.examples
        train_loss = jnp.where(examples.sum() > 0, (loss * examples).sum() / jnp.maximum(examples.sum(), 1), jnp.nan)
        if private is not None:
            delta, norm = delta
            private = dataclasses.replace(private, norm=norm)
        return delta, routers, (*kept, private), feedback, (train_loss, rejected.sum()), masses

    def train_one(self, key, received: Received, population, client, held, probed, prior) -> tuple[Any, dict[str, Any], Any, Any]:
        """Trains one client apart from any cohort, with its own copy of the weights.

        Args:
          key: the client's, as `base.client_keys` makes it of that of local training.
          received: what it has of the model, whose experts `held` and `probed` count.
          population, client: where its examples are.

        Returns:
          Deltas of (experts, shared), feedback by the names of `base.Feedback`, mean training loss, rejected; none has a client axis.
          Deltas that are rejected are zero.
        """
        every = received_of(held[None], probed[None], len(groups(self.parts.experts)))[0]
        row = key, client, client, jnp.bool_(True), held, every, every, prior
        sent, told, loss = self._client(received, population, self._untouched(), None, *row)
        sound = told & all_finite(sent[0][:2])
        (shared, experts, *_), feedback, *_ = without(sent, sound)
        names = (field.name for field in dataclasses.fields(Feedback))
        return (experts, shared), dict(zip(names, feedback, strict=True)), loss, ~sound

    def scan(self, state, population, rows, kept, room, uses, key=None) -> Any:
        """Trains the clients of `rows` [chunk, client, ...], chunk after chunk: what `train` returns, but for clients in that order.

        The rows are each client's key, its number in the population and in what clients keep, whether it is present, the experts that it
        holds and tries, and its prior. `room` is what an aggregator needs that collects or is private, `key` what the latter does.
        """
        links = spread.Links(self.mesh)
        start = self.aggregator.init(state.experts, state.shared, *room)
        (total, kept), out = jax.lax.scan(self._chunk_function(state, population, uses, links, start), (start, kept), rows)
        noise = () if self.aggregator.private is None else (stage_key(key, "noise"),)
        return self.aggregator.finish(links.together(self.aggregator, total), *noise), kept, out

    def plan(self, population: Population) -> tuple[plan.Choice, ...]:
        """The engine of each weight, and why."""
        sizes: dict[str, Any] = dict(batch_size=self.batch_size, local_epochs=self.local_epochs, local_steps=self.local_steps)
        steps = primal.num_steps(population.max_examples, **sizes)
        balance = plan.BALANCE.get(jax.default_backend(), plan.BALANCE["gpu"])
        options: dict[str, Any] = dict(slots=self.max_slots, probes=self.probes, steps=steps, engine=self.engine, balance=balance)
        options["norms"] = self.aggregator.needs == "norms"
        choices = plan.engines(self.parts, self.loss_fn, batch_shape(population, self.batch_size), **options)
        if self.engine == "auto" and spread.Links(self.mesh).shards > 1:
            choices = plan.without_dual_experts(choices, len(jax.tree.leaves(self.parts.experts)))
        return choices

    def _untouched(self) -> tuple[None, ...]:
        return (None,) * len(jax.tree.leaves((self.parts.experts, self.parts.shared)))

    def _chunk_function(self, state, population, uses, links: spread.Links, start) -> Callable[[Any, Any], Any]:
        encoder, names = self.aggregator.encoder, groups(self.parts.experts)

        def train_chunk(carry, rows):
            total, (controls, statistics, residuals) = carry
            keys, client, number, present, held, probed, prior = rows
            received = received_of(held, probed, len(names))
            local, client = links.population(population, client)
            experts, place = links.experts(state.experts, received, names)
            weights = dataclasses.replace(state, experts=experts)
            bases = jax.tree.leaves((experts, state.shared))
            one = jax.vmap(lambda *row: self._client(weights, local, uses, controls, *row))
            sent, told, loss = one(keys, client, number, present, held, received, place, prior)

            def take(sent, sound):
                (update, feedback, gradient, seen), good, kept = sent, present & sound, (controls, statistics, residuals)
                update, routers = links.formed(with_bases(ClientUpdate(*update), bases), place, len(names)), None
                if self.personal:  # router rows stay where they are
                    routers, experts = nnx.split_state(update.experts, RouterParam, ...)
                    routers, update = only(good, routers), dataclasses.replace(update, experts=experts)
                if encoder is not None:
                    update, left = encoder.apply(residuals, keys, number, good, update, names)
                    kept = *kept[:2], left
                if routers is not None:
                    nothing = jax.tree.map(jnp.zeros_like, routers)
                    update = dataclasses.replace(update, experts=nnx.merge_state(nothing, update.experts))
                if controls is not None:
                    kept = scaffold.learn(controls, number, good, update.held, gradient, update.tokens, update.examples), *kept[1:]
                if seen is not None:
                    kept = kept[0], jax.tree.map(jnp.add, statistics, posterior.together(self.parts, seen, update.held)), kept[2]
                masses = mass.of_update(update, state.round) if self.check else None
                new = links.add(self.aggregator, total, update, start, num_experts(self.parts.experts))
                return (new, kept), (feedback, routers, loss, present & ~sound, masses)

            def take_sound(wrong, sent):
                looked = jax.tree.map(lambda leaf: jnp.where(wrong, leaf, 0), sent[0][:2])
                sound = told & jax.vmap(all_finite)(looked)
                return take(without(sent, sound), sound)

            if self._sum_tells(sent[0][:2], total):
                taken = take(sent, told)
                fine = links.agreed(told.all() & all_finite(taken[0][0]))
                return replaced_if(~fine, take_sound, taken, sent)
            sound = told & jax.vmap(all_finite)(sent[0][:2])
            if any(uses):  # rows are large: take a copy only if that is needed
                return take(jax.lax.cond(sound.all(), lambda: sent, lambda: without(sent, sound)), sound)
            return take(without(sent, present & sound), sound)

        return train_chunk

    def _sum_tells(self, deltas, total) -> bool:
        """Whether to look at the sum alone, not finite where a delta is not: it is smaller, and deltas are only multiplied and added."""
        alone = self.aggregator.needs == ("sum" if self.aggregator.encoder is None else "norms")
        alone &= not self.control_variates and self.reject_above is None
        return alone and bytes_of(deltas) > 10 * bytes_of(total)  # to write it, read it and read it again must cost next to nothing

    def _client(self, state, population, uses, controls, key, client, number, present, held, received, place, prior):
        """One client: solo evaluation of what it received, and training.

        `client` is its number in the population, `number` that in what clients keep, `place` where each expert that it receives is.
        Also returned: whether what it tells of its update and the router rows that it keeps are finite, and the update not absurd.
        """
        names = groups(self.parts.experts)
        slots = held.shape[0] // len(names)
        candidates = receive(state.experts, place, uses)
        if self.personal:
            candidates = own_routers(candidates, state.personal, number, received)
        received = by_group(received, len(names))  # [group, candidate]
        filled, solo = held != NO_EXPERT, jnp.full(received.shape, jnp.nan)
        if self.solo_examples:
            solo_key = jax.random.fold_in(key, 1)
            batch = primal.local_batch(solo_key, population, client, 0, self.solo_examples)
            weights = (candidates, state.shared, filled, prior)
            solo = primal.solo_losses(solo_key, batch, *weights, parts=self.parts, loss_fn=self.loss_fn)
        sizes: dict[str, Any] = dict(batch_size=self.batch_size, local_epochs=self.local_epochs, local_steps=self.local_steps)
        options = sizes | dict(parts=self.parts, loss_fn=self.loss_fn, optimizer=self.optimizer(state.round), prox=self.prox)
        own = jax.tree.map(lambda weight: weight[:slots], candidates, is_leaf=is_dual)
        args = jax.random.fold_in(key, 0), population, client, own, state.shared, filled, prior
        if controls is not None:
            options["correction"] = self._correction(scaffold.correction(controls, state.controls.sums, number, held), own)
        result = primal.train(*args, **options) if not any(uses) else dual.train(*args, uses=uses, **options)
        weights = result.experts, result.shared
        routers = nnx.split_state(result.experts, RouterParam, ...)[0] if self.personal else None
        result = dataclasses.replace(result, experts=routers, shared=None)
        told = all_finite(result)
        if self.reject_above is not None:
            sent = filled & (result.tokens > 0)
            change, before = (squared_norm(*weights, sent, names) for weights in (weights, (own, state.shared)))
            told &= change <= self.reject_above**2 * jnp.maximum(before, 1)
        result = only(present & told, result)
        tokens = jnp.where(filled, result.tokens, 0)
        examples = jnp.where(present & told, population.num_examples(client), 0)
        count = jnp.maximum(tokens, 1)
        solo = jnp.where(present & (received != NO_EXPERT), solo, 0)
        solo = jnp.concatenate([solo[:, :slots].reshape(-1), solo[:, slots:].reshape(-1)])  # as held, then as probed
        tokens = tokens.astype(jnp.int32)
        feedback = (examples, tokens, result.correct / count, result.loss / count, solo)
        update = (weights[1], weights[0], held, examples, tokens)
        gradient = result.gradient and (scaffold.travelling(result.gradient[0], self.personal), result.gradient[1])
        seen = None
        if self.statistics_examples:
            batch = primal.local_batch(jax.random.fold_in(key, 2), population, client, 0, self.statistics_examples)
            seen = posterior.observe(self.parts, own, state.shared, batch, filled, prior)
            seen = only(present & all_finite(seen), seen)
        return (update, feedback, gradient, seen), told, result.train_loss / jnp.maximum(result.trained, 1)

    def _correction(self, correction, experts):
        """The correction of all weights: router rows that stay on the client have no control variate."""
        if not self.personal:
            return correction
        routers = jax.tree.map(jnp.zeros_like, nnx.split_state(experts, RouterParam, ...)[0])
        return nnx.merge_state(routers, correction[0]), correction[1]


def batch_shape(population: Population, size: int) -> Any:
    """Shapes of a batch of `size` examples."""
    return jax.eval_shape(lambda: population.batch(jnp.int32(0), jnp.arange(size)))


def _chunked(rows, chunks, size):
    """[client, ...] -> [chunk, client, ...]; padding rows repeat the first client and are False in masks."""
    missing = chunks * size - rows.shape[0]
    fill = jnp.zeros_like(rows[:1]) if rows.dtype == bool else rows[:1]
    padded = jnp.concatenate([rows, jnp.repeat(fill, missing, 0)]) if missing else rows
    return padded.reshape(chunks, size, *rows.shape[1:])
