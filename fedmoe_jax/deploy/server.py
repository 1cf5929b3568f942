"""The server of real clients: the round of the simulation, with tasks sent and updates collected in place of its local training.

server = Server(config, folder)            also continues what was there
server.enter(node, hello)                  as often as clients come
tasks = server.open(connected)             who is sent what
server.accept(node, update)                as updates come, any that are not what they must be are refused
record = server.close()                    the round's metrics; what did not come is lost
"""

import dataclasses
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedmoe_jax import sampling
from fedmoe_jax.base import NO_EXPERT
from fedmoe_jax.data import sources
from fedmoe_jax.deploy import layout as layouts
from fedmoe_jax.deploy import messages
from fedmoe_jax.deploy.aggregate import Collected, closing, most_tokens
from fedmoe_jax.deploy.messages import RefusedError
from fedmoe_jax.deploy.roster import Roster
from fedmoe_jax.deploy.terms import Terms, deployable
from fedmoe_jax.round import Opening, State
from fedmoe_jax.training import metrics
from fedmoe_jax.training.checkpoint import Checkpoints
from fedmoe_jax.training.config import TrainConfig, located, to_toml, validate
from fedmoe_jax.training.evaluate import global_evaluation
from fedmoe_jax.training.setup import Setup, assemble
from fedmoe_jax.training.trainer import claim
from fedmoe_jax.training.weights import save_weights


class _Open(NamedTuple):
    """A round in flight: when it began, on the host what was settled, for each client its row, what came, and whose was refused."""

    began: float
    opening: Opening
    held: np.ndarray
    rows: dict[int, int]
    collected: Collected
    refused: set[int]


class StaleError(RefusedError):
    """An update of an earlier round: that of the round that is open may still come."""


class Server:
    """A run with real clients, of which this process has no data but a test set.

    Args:
      config: a valid configuration; `population` is how many clients there may be, `data` gives the test set.
      folder: absent, empty, or the run to continue.
      note: told of each client that comes and each message that is refused, in one line.

    Raises:
      UsageError: if the folder cannot be used.
      ValueError: naming the field that cannot be.
    """

    def __init__(self, config: TrainConfig, folder: str | Path, *, note: Callable[[str], Any] = print):
        validate(config)
        self.config, self.folder, self.note = located(config), Path(folder), note
        resume = (self.folder / "config.toml").exists()
        claim(self.folder, self.config, resume)
        self._run = deployable(self.config)
        if self.config.population is None:
            raise ValueError("population: must be given with real clients, as many as there may be")
        self._data = sources.load(self.config.data)
        self.roster = Roster.at(self.folder / "roster.json", self.config.population)
        metrics.write_text(self.folder / "config.toml", to_toml(self.config))
        self.roster.save()
        self.log, self.checkpoints = metrics.MetricsLog(self.folder / "metrics.jsonl"), Checkpoints(self.folder / "checkpoints")
        self.started = False
        self._open: _Open | None = None
        self._rejected = 0  # since the last round ended

    @property
    def done(self) -> int:
        """Rounds done."""
        return int(self.state.round) if self.started else 0

    def enter(self, node: str, hello: bytes) -> int | None:
        """Takes in a client that has come, or come again: its number, or None if it is refused."""
        try:
            number = self.roster.enter(node, hello, **self._shapes(), num_classes=self._data.num_classes)
        except RefusedError as error:
            self.note(f"node {node} is refused: {error}")
            return None
        self.note(f"node {node} is client {number}")
        return number

    def start(self) -> None:
        """Begins, with the clients that are there, or goes on where the last checkpoint was written."""
        if self.roster.solo is None:
            self.roster.solo = self._setup(known=True).solo_examples
            self.roster.save()
        self.setup = setup = self._setup()
        algorithm = setup.algorithm(self.config.cohort)
        assert algorithm.parts is not None
        self.state = first(setup)
        if self.checkpoints.latest() is not None:
            _, self.state, _ = self.checkpoints.restore(self.state, most=self.log.whole(), note=self.note)
        self.started = True
        self.log.truncate(self.done)
        self.terms = Terms(self.roster.run, self._run, self._shapes()["input_shape"], setup.num_classes, setup.solo_examples)
        self.layout = layouts.of_model(setup.parts, personal=self._run.router == "personal")
        self._begin, self._close = jax.jit(algorithm.parts.begin), closing(algorithm.parts, self._run.reject_above)
        self._evaluate = None if self._run.router == "personal" else global_evaluation(setup)
        self._most_tokens = most_tokens(setup)

    def open(self, connected: Iterable[str]) -> dict[str, bytes]:
        """Begins a round with the nodes that can be reached, of which its cohort is drawn: the task of each node that takes part."""
        nodes = {number: node for node in connected if (number := self.roster.number(node)) is not None}
        here = jnp.asarray(np.isin(np.arange(self.roster.places), list(nodes)))
        sampled = sampling.of_those_here(self.state.key, self.state.round, here, self.config.cohort)
        opening = self._begin(self.state, self._population(), here[sampled], sampled)
        cohort, alignment, prior = jax.device_get((opening.cohort, opening.alignment, opening.prior))
        rows = {int(client): row for row, client in enumerate(cohort.client) if cohort.present[row]}
        experts, shared = layouts.host(self.state.experts), layouts.host(self.state.shared)
        last = np.asarray(self.state.last_trained)
        common, tasks = {f"shared.{path}": value for path, value in shared.items()}, {}
        for client, row in rows.items():
            held, probed = alignment.held[row], alignment.probed[row]
            wanted = sorted({int(e) for e in (*held, *probed) if e != NO_EXPERT})
            about = {"terms": self.terms.told(), "round": self.done, "client": client, "held": held.tolist(), "probed": probed.tolist()}
            about["experts"] = [[e, int(last[e]) + 1, int(cohort.cached[row, e])] for e in wanted]
            sent = layouts.cut(self.layout, experts, [e for e in wanted if not cohort.cached[row, e]])
            tasks[nodes[client]] = messages.encode("task", about, common | sent | {"prior": prior[row]})
        collected = Collected.empty(self.setup, len(sampled), alignment.held.shape[1], alignment.probed.shape[1])
        self._open = _Open(time.monotonic(), opening, alignment.held, rows, collected, set())
        return tasks

    def accept(self, node: str, update: bytes, *, stale: bool = False) -> bool:
        """Takes in an update of the round that is open; one that is not what it must be is refused, told and counted.

        Args:
          stale: it answers an earlier task than the node's last. One whose header is of an earlier round is stale as well.
        """
        try:
            if stale:
                raise StaleError("it is late, the node has been asked again since")
            self._take(node, update)
        except RefusedError as error:
            self.refuse(node, str(error), stale=isinstance(error, StaleError))
            return False
        return True

    def refuse(self, node: str, reason: str, *, stale: bool = False) -> None:
        """Tells and counts what a node sent instead of an update, which then is not waited for unless this is `stale`.

        What comes between two rounds counts in the second.
        """
        self.note(f"round {self.done}: what node {node} sent is refused: {messages.line(reason)}")
        self._rejected += 1
        client = self.roster.number(node)
        if self._open is not None and client is not None and not stale:
            self._open.refused.add(client)

    @property
    def waiting(self) -> set[int]:
        """Clients of the open round from which nothing came."""
        assert self._open is not None
        return {client for client, row in self._open.rows.items() if not self._open.collected.came[row]} - self._open.refused

    def close(self) -> metrics.Record:
        """Ends the round with what came, and writes a checkpoint and its metrics."""
        assert self._open is not None
        began, opening, _, _, collected, _ = self._open
        if self.waiting:
            self.note(f"round {self.done}: nothing came from clients {sorted(self.waiting)}")
        arrays = collected.arrays(time.monotonic() - began)
        self.state, info = jax.block_until_ready(self._close(self.state, opening, *arrays, self._rejected))
        self._open, self._rejected, done = None, 0, self.done
        values = {name: getattr(info, name) for name in metrics.METRIC_FIELDS if hasattr(info, name)}
        if self._evaluate is not None and (done % self.config.eval_every == 0 or done >= self.config.rounds):
            values |= self._evaluate(self.state)
        seconds = time.monotonic() - began
        record = metrics.record(done - 1, **values, wall_seconds=seconds, clients_per_second=float(info.clients) / seconds)
        self.checkpoints.save(done, self.state, {"run": self.roster.run})
        self.log.append(record)
        return record

    def finish(self) -> dict[str, Any]:
        """Writes weights.npz and summary.json; returns the latter's content."""
        save_weights(self.folder / "weights.npz", self.state.experts, self.state.shared)
        summary = metrics.summarise(metrics.read(self.log.path), self.config.target, seed=self.config.seed)
        metrics.write_json(self.folder / "summary.json", summary)
        return summary

    def _take(self, node, update):
        client, opened = self.roster.number(node), self._open
        if opened is None or client not in opened.rows:
            raise RefusedError("nothing is asked of it")
        row = opened.rows[client]
        if opened.collected.came[row]:
            raise RefusedError("it has sent its update before")
        held = opened.held[row]
        filled = [int(e) for e in held if e != NO_EXPERT]
        wanted = self.layout.arrays(filled) | layouts.feedback(len(held), opened.collected.probes, self.terms.solo)
        found = messages.decode(update, "update", most_bytes=messages.most_bytes(wanted))
        messages.check_header(found.header, dict(run=str, round=int, client=int, examples=int, rejected=bool, train_loss=float))
        sent = found.header["run"], found.header["round"], found.header["client"]
        if sent != (self.roster.run, self.done, client):
            kind = StaleError if sent[1] < self.done else RefusedError
            raise kind(f"it is of run, round and client {sent}, not {(self.roster.run, self.done, client)}")
        if found.header["examples"] != self.roster.examples(client):
            raise RefusedError(f"it is of {found.header['examples']} examples, not {self.roster.examples(client)}")
        if found.header["rejected"]:
            raise RefusedError("the client says that its own training is not finite or absurd")
        messages.check_arrays(found.arrays, wanted)
        self._check_feedback(client, held, found.arrays)
        opened.collected.put(row, self.layout, held, found, time.monotonic() - opened.began)

    def _check_feedback(self, client, held, arrays):
        """Refuses what no training tells: these numbers weigh an update, and decide who trains what."""
        tokens, most = arrays["tokens"], self._most_tokens(self.roster.examples(client))
        if tokens[held == NO_EXPERT].any() or tokens.sum(dtype=np.int64) > most:
            raise RefusedError(f"it tells of {tokens.tolist()} tokens, at most {most} in all can be, none where nothing is held")
        if not ((arrays["correct"] >= 0) & (arrays["correct"] <= 1)).all():
            raise RefusedError("it tells of shares that are right which are none")
        if any((arrays[name] < 0).any() for name in arrays.keys() & {"loss", "solo_loss"}):
            raise RefusedError("it tells of losses below 0")

    def _shapes(self):
        return shapes(self._data)

    def _population(self):
        return self.roster.population(**self._shapes(), dtype=self._data.x.dtype)

    def _setup(self, known=False) -> Setup:
        return made(self._run, self.roster, self._data, known=known)


def shapes(data: sources.Dataset) -> dict[str, tuple[int, ...]]:
    """Those of an example and of its label."""
    return {"input_shape": tuple(data.x.shape[1:]), "label_shape": tuple(data.y.shape[1:])}


def made(config: TrainConfig, roster: Roster, data: sources.Dataset, *, known: bool = False) -> Setup:
    """What a run with real clients is made of; of those that are `known` alone, or as settled when it began."""
    population, classes = roster.population(**shapes(data), dtype=data.x.dtype, known=known), data.num_classes
    labels = dict(num_classes=classes, label_prior=jnp.zeros((0, classes)))
    setup = assemble(config, population, population, (jnp.asarray(data.test_x), jnp.asarray(data.test_y)), labels)
    return setup if known else dataclasses.replace(setup, solo=roster.solo)


def first(setup: Setup) -> State:
    """The state before the first round. Router rows that are personal are with the clients."""
    state = setup.algorithm(setup.config.cohort).init(jax.random.key(setup.config.seed), setup.population)
    return dataclasses.replace(state, personal=None)


def restored(folder: Path, config: TrainConfig) -> tuple[int, Setup, State]:
    """As `evaluate.restored`, of a run with real clients."""
    assert config.population is not None
    setup = made(deployable(config), Roster.at(folder / "roster.json", config.population), sources.load(config.data))
    with Checkpoints(folder / "checkpoints") as checkpoints:
        done, state, _ = checkpoints.restore(first(setup))
    return done, setup, state
