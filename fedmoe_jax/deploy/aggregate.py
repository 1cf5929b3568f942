"""What came from the clients of a round, as the arrays of the simulation, and the end of the round by its functions."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedmoe_jax.base import NO_EXPERT, ClientUpdate, Feedback, client_keys
from fedmoe_jax.deploy import layout as layouts
from fedmoe_jax.deploy.layout import Layout
from fedmoe_jax.deploy.messages import Message
from fedmoe_jax.experts import Slots, bind, gather, groups, num_experts, report, squared_norm
from fedmoe_jax.local.cohort import batch_shape
from fedmoe_jax.local.primal import num_processed
from fedmoe_jax.round import Opening, Parts, State
from fedmoe_jax.training.setup import Setup


@dataclasses.dataclass
class Collected:
    """Room for the update of each client of a cohort, zero where none came."""

    experts: Any
    shared: Any
    feedback: dict[str, np.ndarray]
    loss: np.ndarray
    came: np.ndarray
    seconds: np.ndarray
    probes: int

    @classmethod
    def empty(cls, setup: Setup, clients: int, slots: int, probes: int) -> "Collected":
        """For so many clients of so many slots and probes, in all groups."""
        parts = setup.parts
        each = slots // len(groups(parts.experts))
        experts = {path: np.zeros((clients, each, *value.shape[1:]), value.dtype) for path, value in layouts.host(parts.experts).items()}
        shared = {path: np.zeros((clients, *value.shape), value.dtype) for path, value in layouts.host(parts.shared).items()}
        told = {name: np.zeros((clients, *array.shape), array.dtype) for name, array in layouts.feedback(slots, probes, 1).items()}
        told["examples"] = np.zeros(clients, np.int32)
        nothing = np.zeros(clients, np.float32)
        states = layouts.filled(parts.experts, experts), layouts.filled(parts.shared, shared)
        return cls(*states, told, nothing, np.zeros(clients, bool), nothing.copy(), probes)

    def put(self, row: int, layout: Layout, held: np.ndarray, update: Message, seconds: float) -> None:
        """Takes in the update of the client in a row, which must have been checked."""
        experts, shared = layouts.host(self.experts), layouts.host(self.shared)
        for path, value in shared.items():
            value[row] = update.arrays[f"shared.{path}"]
        for group, numbers in zip(layout.expert, layouts.grouped(held, len(layout.expert)), strict=True):
            for slot, expert in enumerate(numbers):
                for path in group if expert != NO_EXPERT else ():
                    experts[path][row, slot] = update.arrays[f"expert.{expert}.{path}"]
        for name in self.feedback.keys() & update.arrays.keys():
            self.feedback[name][row] = update.arrays[name]
        self.feedback["examples"][row] = update.header["examples"]
        self.loss[row], self.came[row], self.seconds[row] = update.header["train_loss"], True, seconds

    def arrays(self, elapsed: float) -> tuple[Any, ...]:
        """As `closing` takes them; who did not come takes at least as long as has elapsed."""
        feedback = Feedback(**{name: jnp.asarray(value) for name, value in self.feedback.items()})
        return (self.experts, self.shared), feedback, self.loss, self.came, np.where(self.came, self.seconds, np.float32(elapsed))


def closing(parts: Parts, reject_above: float | None) -> Callable[..., Any]:
    """close(state, opening, (experts, shared), feedback, loss, came, seconds, refused) -> (State, Info), compiled.

    Updates are aggregated as in the simulation, after the server's own look at their norms, which must be finite. Losses, seconds and
    `came` have an entry a client; a client that did not come has taken no part, and may or may not have received what it was sent.
    """
    trainer, names = parts.trainer, groups(parts.trainer.parts.experts)
    aggregator = trainer.aggregator

    @jax.jit
    def close(state: State, opening: Opening, deltas: Any, feedback: Any, loss: Any, came: Any, seconds: Any, refused: Any) -> Any:
        held = opening.alignment.held
        sent = (held != NO_EXPERT) & (feedback.tokens > 0)
        change = jax.vmap(lambda experts, shared, sent: squared_norm(experts, shared, sent, names))(deltas[0], deltas[1], sent)
        sound = came & jnp.isfinite(change)  # numbers whose squares are too large for floats are in no sum
        if reject_above is not None:
            own = jax.vmap(lambda held: gather(state.experts, held))(held)
            before = jax.vmap(lambda experts, sent: squared_norm(experts, state.shared, sent, names))
            sound &= change <= reject_above**2 * jnp.maximum(before(own, sent), 1)

        def only_sound(leaf):
            return jnp.where(sound.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, 0)

        deltas, feedback = jax.tree.map(only_sound, (deltas, feedback))
        update = ClientUpdate(deltas[1], deltas[0], held, feedback.examples, feedback.tokens)
        trainees = dataclasses.replace(opening.cohort, present=opening.cohort.present & sound)
        if aggregator.encoder is not None:  # what bounds an update; those that compress are not deployed
            keys = client_keys(opening.key, opening.cohort.client)
            update, _ = aggregator.encoder.apply(None, keys, opening.cohort.client, trainees.present, update, names)
        room = (held.shape[0], held.shape[1] // len(names)) if aggregator.collects else ()
        total = aggregator.add(aggregator.init(state.experts, state.shared, *room), update)
        examples = feedback.examples
        mean = jnp.where(examples.sum() > 0, (loss * examples).sum() / jnp.maximum(examples.sum(), 1), jnp.nan)
        summary = mean, refused + (came & ~sound).sum()
        outcome = aggregator.finish(total), None, (None,) * 4, feedback, summary, None
        return parts.finish(state, opening, trainees, seconds, came, outcome)

    return close


def most_tokens(setup: Setup) -> Callable[[int], int]:
    """most(examples): tokens that the slots of a client with so many examples can have been sent in a round.

    Twice those of one example, since layers with a token capacity drop more of the tokens of few examples.
    """
    config, parts = setup.config, setup.parts
    shape = batch_shape(setup.population, 1)
    number = len(groups(parts.experts)) * num_experts(parts.experts)

    @jax.jit
    def of_one():
        model = bind(parts, parts.experts, parts.shared, Slots(jnp.ones(number, bool), jnp.zeros(number), jnp.ones(1, bool)))
        model(jnp.zeros(shape.x.shape, shape.x.dtype))
        return report(model)[0].sum()

    each = float(of_one())

    def most(examples: int) -> int:
        sizes: dict[str, Any] = dict(batch_size=config.batch_size, local_epochs=config.local_epochs, local_steps=config.local_steps)
        return int(2 * each * int(num_processed(examples, **sizes)))

    return most
