"""A real client: what it says of itself, and one round of local training by the very functions of the simulation."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fedmoe_jax import models
from fedmoe_jax.base import NO_EXPERT, client_keys, stage_key
from fedmoe_jax.data.npz import read_npz
from fedmoe_jax.data.population import Population
from fedmoe_jax.deploy import layout as layouts
from fedmoe_jax.deploy import messages, terms
from fedmoe_jax.deploy.layout import Layout
from fedmoe_jax.deploy.messages import Array, Message, RefusedError
from fedmoe_jax.deploy.shelf import MOST_BYTES, Shelf
from fedmoe_jax.experts import RouterParam, groups, partition
from fedmoe_jax.local.cohort import Received, Trainer
from fedmoe_jax.training.machine import measure
from fedmoe_jax.training.metrics import write_text
from fedmoe_jax.training.setup import architecture

PROFILE = ("flops_per_second", "memory_bytes", "downlink_bytes_per_second", "uplink_bytes_per_second")
"""The numbers of a profile in the order in which they travel."""
UNLIMITED = float(np.finfo(np.float32).max)
"""What stands for a speed that nobody knows."""


class _Program(NamedTuple):
    """Local training by some terms for so many slots and probes, compiled when it is first called."""

    trainer: Trainer
    layout: Layout
    run: Callable[..., Any]


class Client:
    """One client with its own data, and a folder in which it keeps what it has of the model between rounds.

    Args:
      data: an .npz file with `x` and `y`, or a folder with one of the name data.npz.
      folder: made if absent.
      number: which client of the population it is, from 0; None lets the server choose.
      downlink, uplink: bytes per second of its link; None where that is not known and shall not limit.
      trusted: see `terms.read`.

    Raises:
      ValueError: in one line, if the data cannot be read.
    """

    def __init__(
        self,
        data: str | Path,
        folder: str | Path,
        *,
        number: int | None = None,
        downlink: float | None = None,
        uplink: float | None = None,
        trusted: str | None = None,
    ):
        path = Path(data) / "data.npz" if Path(data).is_dir() else Path(data)
        try:
            arrays = read_npz(path)
            self.population = Population.from_arrays(arrays["x"], arrays["y"], [np.arange(len(arrays["x"]))])
        except (ValueError, KeyError) as error:
            raise ValueError(f"data: {path} holds no examples x and labels y ({error})") from None
        self.shelf, self.number, self.trusted = Shelf(folder), number, trusted
        self.links = {"downlink_bytes_per_second": downlink, "uplink_bytes_per_second": uplink}

    def hello(self) -> bytes:
        """What it says of itself: its number, its examples and labels, and what it can afford, measured once and kept."""
        path = self.shelf.folder / "profile.json"
        if not path.exists():
            write_text(path, json.dumps(measure()))
        known = json.loads(path.read_text()) | {name: speed for name, speed in self.links.items() if speed is not None}
        x, y = self.population.x, self.population.y
        header: dict[str, Any] = {"number": -1 if self.number is None else self.number, "examples": len(x), "classes": int(y.max()) + 1}
        header |= {"shape": list(x.shape[1:]), "label_shape": list(y.shape[1:])}
        profile = [UNLIMITED if known[name] is None else known[name] for name in PROFILE]
        return messages.encode("hello", header, {"profile": np.array(profile, np.float32)})

    def train(self, data: bytes) -> bytes:
        """One round: a task in, an update out. What it received stays in its folder, as the server then counts on.

        Raises:
          RefusedError: if the task cannot be read, does not fit its data, or counts on experts that it does not have.
        """
        task = messages.decode(data, "task", most_bytes=MOST_BYTES)
        messages.check_header(task.header, dict(terms=dict, round=int, client=int, held=list, probed=list, experts=list))
        agreed = terms.read(task.header["terms"], trusted=self.trusted)
        self._check_data(agreed)
        held, probed = (_numbers(task.header[name], -1) for name in ("held", "probed"))
        program = _program(json.dumps(agreed.told(), sort_keys=True), self.trusted, len(held), len(probed))
        parts, num_groups = program.trainer.parts, len(program.layout.expert)
        arrays = self._received(agreed.run, program.layout, task, held, probed)
        candidates, own, tried = layouts.renumbered(held, probed, num_groups)
        weights = layouts.stacked(program.layout, candidates, arrays)
        if agreed.config.router == "personal":
            weights |= self._own_routers(agreed, parts, candidates, task.header["round"])
        shared = {name.removeprefix("shared."): value for name, value in arrays.items() if name.startswith("shared.")}
        state = layouts.filled(parts.experts, weights), layouts.filled(parts.shared, shared)
        key = stage_key(jax.random.fold_in(jax.random.key(agreed.config.seed), task.header["round"]), "local")
        key = client_keys(key, jnp.array([task.header["client"]]))[0]
        made = program.run(key, jnp.int32(task.header["round"]), *state, self.population, own, tried, arrays["prior"])
        (experts, delta), feedback, loss, rejected = jax.device_get(made)
        about = {"run": agreed.run, "round": task.header["round"], "client": task.header["client"]}
        about |= {"examples": len(self.population.x), "rejected": bool(rejected)}
        if rejected:
            return messages.encode("update", about | {"train_loss": 0.0}, {})
        deltas = layouts.host(experts)
        if agreed.config.router == "personal":
            self._learn(agreed, parts, held, deltas, task.header["round"])
        sent = {f"shared.{path}": value for path, value in layouts.host(delta).items()}
        sent |= layouts.of_slots(program.layout, held, deltas)
        sent |= {name: feedback[name] for name in layouts.feedback(len(held), len(probed), agreed.solo)}
        return messages.encode("update", about | {"train_loss": float(loss)}, sent)

    def _check_data(self, agreed):
        shape, classes = self.population.x.shape[1:], int(self.population.y.max()) + 1
        if shape != agreed.input_shape or classes > agreed.num_classes:
            wanted = f"{list(agreed.input_shape)} and {agreed.num_classes}"
            raise RefusedError(f"this client has examples of shape {list(shape)} and {classes} classes, the run is for {wanted}")

    def _received(self, run, layout, task: Message, held, probed) -> dict[str, np.ndarray]:
        """The arrays of a task with those of experts that the client has; of all these it keeps the experts instead of what it had."""
        wanted = {int(e) for e in (*held, *probed) if e != NO_EXPERT}
        rows = [_numbers(row, 0).tolist() for row in task.header["experts"]]
        if any(len(row) != 3 for row in rows) or {row[0] for row in rows} != wanted or len(rows) != len(wanted):
            raise RefusedError("its experts are not those that are held and tried")
        if max(wanted, default=0) >= layout.num_experts * len(layout.expert):
            raise RefusedError("its experts are none of the model")
        versions, here = {e: version for e, version, _ in rows}, {e for e, _, there in rows if there}
        messages.check_arrays(task.arrays, layout.arrays(sorted(wanted - here)) | {"prior": Array((len(held),))})
        arrays, kept = dict(task.arrays), self.shelf.experts(run)
        for expert in sorted(here):
            version, found = kept.get(expert, (None, {}))
            if version != versions[expert]:
                raise RefusedError(f"it counts on version {versions[expert]} of expert {expert}, this client has {version}")
            arrays |= found
        self.shelf.keep(run, versions, {name: value for name, value in arrays.items() if name.startswith("expert.")})
        return arrays

    def _own_routers(self, agreed, parts, candidates, round) -> dict[str, np.ndarray]:
        """Its own router rows [candidate, ...] by path."""
        rows = self._all_routers(agreed, round)
        return {path: rows[path][np.maximum(candidates[place], 0) % len(rows[path])] for path, place in _routers(parts)}

    def _all_routers(self, agreed, round) -> dict[str, np.ndarray]:
        """Its own router rows [expert, ...] by path: the model's initial ones until it has trained them."""
        kept = self.shelf.routers(agreed.run, round)
        if kept is not None:
            return kept
        arguments = architecture(agreed.config, agreed.input_shape, agreed.num_classes)
        drawn = jax.jit(lambda: nnx.split_state(partition(models.create(**arguments)).experts, RouterParam, ...)[0])()
        return layouts.host(drawn)

    def _learn(self, agreed, parts, held, deltas, round) -> None:
        """Adds what it learnt to its own router rows."""
        before = self._all_routers(agreed, round)
        rows = {path: np.array(value) for path, value in before.items()}
        for path, place in _routers(parts):
            own = layouts.grouped(held, len(groups(parts.experts)))[place]
            filled = own != NO_EXPERT
            rows[path][own[filled] % len(rows[path])] += deltas[path][filled]
        self.shelf.keep_routers(agreed.run, round, before, rows)


@functools.lru_cache(maxsize=4)  # the next round is by the same terms
def _program(told: str, trusted: str | None, slots: int, probes: int) -> _Program:
    agreed = terms.read(json.loads(told), trusted=trusted)
    trainer = agreed.trainer(slots, probes)
    num_groups = len(groups(trainer.parts.experts))
    if not slots or slots % num_groups or probes % num_groups:
        raise RefusedError(f"its {slots} slots and {probes} probes do not fit {num_groups} groups of experts")
    layout = layouts.of_model(trainer.parts, personal=agreed.config.router == "personal")

    def run(key, round, experts, shared, population, held, probed, prior):
        return trainer.train_one(key, Received(round, experts, shared), population, jnp.int32(0), held, probed, prior)

    return _Program(trainer, layout, jax.jit(run))


def _routers(parts) -> list[tuple[str, int]]:
    """The path of each router, and the place of its group."""
    names, flat = groups(parts.experts), nnx.to_flat_state(nnx.split_state(parts.experts, RouterParam, ...)[0])
    return [(layouts.dotted(path), names.index(variable.get_metadata().get("group"))) for path, variable in flat]


def _numbers(value: Any, least: int) -> np.ndarray:
    """A list of whole numbers of a header, none of them below `least`."""
    if not isinstance(value, list) or not all(type(number) is int and least <= number < 2**31 for number in value):
        raise RefusedError("its header has no numbers where they must be")
    return np.array(value, np.int32)
