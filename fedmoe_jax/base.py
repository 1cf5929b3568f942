"""The pytrees that pass between the stages of a round, the strategies that make them, and the axis legend.

Axis legend, used in every annotation, docstring and einsum of the package:

  population  N  all clients                      client   C  the clients of one round's cohort
  expert      E  experts of the global model      slot     K  places for experts on one client
  group       G  layers with one assignment       example  B  examples of a batch
  probe       P  unheld experts tried in a round
  token       T  positions of an example          feature  D  width of a layer
  hidden      H  width inside an expert           class       outputs of a classifier

The client or expert axis always leads. Absence is a mask or `NO_EXPERT`, never a shorter array. With several groups an
axis of experts, slots or probes goes group after group, except that of weights, which belong to one group: see `experts`.
Where both meet, it is called all_experts or all_slots.
"""

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar, dataclass_transform, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from fedmoe_jax import devices

NO_EXPERT = -1
"""What `Alignment.held` and `Alignment.probed` contain in an empty slot."""

Number = Float[Array, ""] | np.float32 | float  # NumPy's where it is known while a program is traced
_T = TypeVar("_T")


def static(**kwargs: Any) -> Any:
    """A dataclass field that belongs to the pytree's structure: hashable, and a new value compiles again."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


@dataclass_transform(frozen_default=True, field_specifiers=(static,))
def pytree(cls: type[_T]) -> type[_T]:
    """Makes `cls` a frozen dataclass and a pytree; fields marked with `static()` are part of its structure.

    Unflattening does not call `__init__`, so transformations may put tracers, axes or sentinels into the fields.
    """
    cls = dataclasses.dataclass(frozen=True)(cls)  # type: ignore[assignment]
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    data = [f.name for f in fields if not f.metadata.get("static")]
    meta = [f.name for f in fields if f.metadata.get("static")]

    def flatten_with_keys(value):
        children = [(jax.tree_util.GetAttrKey(name), getattr(value, name)) for name in data]
        return children, tuple(getattr(value, name) for name in meta)

    def unflatten(aux, children):
        value = object.__new__(cls)
        for name, child in (*zip(data, children, strict=True), *zip(meta, aux, strict=True)):
            object.__setattr__(value, name, child)
        return value

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten)
    return cls


def stage_key(key: Key[Array, ""], stage: str) -> Key[Array, ""]:
    """The key of a named stage of a round, derived from the round's key."""
    return jax.random.fold_in(key, zlib.crc32(stage.encode()))


def client_keys(key: Key[Array, ""], client: Int[Array, " client"]) -> Key[Array, " client"]:
    """One key a client, by its ID in the population and never by its place in the cohort."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, client)


@pytree
class ClientProfile:
    """What each client can afford. Positive numbers; `inf` means that it does not limit."""

    flops_per_second: Float[Array, " client"]
    memory_bytes: Float[Array, " client"]
    downlink_bytes_per_second: Float[Array, " client"]
    uplink_bytes_per_second: Float[Array, " client"]

    @classmethod
    def sample(cls, key: Key[Array, ""], n: int, source: "str | ClientProfile" = "phones") -> "ClientProfile":
        """Draws the profiles of `n` clients, independently of each other: a function of `key` and of nothing hidden.

        Args:
          key: of the draw.
          n: number of clients, at least 1; static under jit.
          source: "phones", real phones and networks from the data of FLASH [1], with the assumptions that `fedmoe_jax.devices` states;
            "tiers", three made-up kinds of phone with equal chances; "uniform", the same plain phone for all, whatever the key; or a
            profile, whose rows are drawn with equal chances and whole.

        Returns:
          One entry a client: float32 FLOP/s, bytes of memory, downlink and uplink bytes/s.

        Raises:
          ValueError: if `n` < 1, or `source` is unknown or a profile without rows or with columns of unequal length.

        References:
          [1] C. Yang et al., "Characterizing Impacts of Heterogeneity in Federated Learning upon Large-Scale Smartphone Data", WWW 2021.
        """
        if n < 1:
            raise ValueError(f"n is {n}, it must be at least 1")
        if isinstance(source, ClientProfile):
            shapes = {column.shape for column in jax.tree.leaves(source)}
            rows = next(iter(shapes))
            if len(shapes) > 1 or len(rows) != 1 or rows == (0,):
                raise ValueError(f"source has columns of shape {sorted(shapes)}, they must be of one length, at least 1")
            row = jax.random.randint(key, (n,), 0, rows[0])
            return jax.tree.map(lambda column: column[row], source)
        if source not in devices.SOURCES:
            raise ValueError(f"source is {source!r}, it must be {', '.join(devices.SOURCES)} or a ClientProfile")
        return cls(*devices.SOURCES[source](key, n))


@pytree
class RoundCost:
    """What one round costs a client: a part for the shared parameters and a part for each expert, one of every group.

    Bytes are what comes down the link, and goes up where that is not told apart; memory is of parameters, gradients, optimizer state and
    activations; FLOPs are one example's, forward and backward, for solo evaluation a round's forward passes of each expert tried alone.
    A report, with router "statistics", travels up beside each expert; its FLOPs are a round's, of a client with all experts it may hold.
    """

    shared_bytes: Number
    expert_bytes: Number
    shared_memory: Number
    expert_memory: Number
    shared_flops: Number
    expert_flops: Number
    solo_shared_flops: Number
    solo_expert_flops: Number
    report_bytes: Number = 0.0
    report_flops: Number = 0.0
    shared_bytes_up: Number | None = None
    expert_bytes_up: Number | None = None

    @property
    def up(self) -> tuple[Any, Any]:
        """Bytes up of the shared part and of an expert, without its report."""
        both = (self.shared_bytes_up, self.shared_bytes), (self.expert_bytes_up, self.expert_bytes)
        return tuple(down if up is None else up for up, down in both)  # type: ignore[return-value]


@pytree
class Batch:
    """Examples as a loss function sees them. `mask` is False for padding, whose `x` and `y` are arbitrary.

    `label_prior` is the log of how much more frequent each class is with the client than with all, where the population knows it.
    """

    x: Array
    y: Array
    mask: Bool[Array, " example"]
    label_prior: Float[Array, " class"] | None = None


@runtime_checkable
class Population(Protocol):
    """What the stages ask of client data; `fedmoe_jax.data.population.Population` is the implementation."""

    @property
    def profile(self) -> ClientProfile: ...

    @property
    def num_clients(self) -> int: ...

    @property
    def max_examples(self) -> int:
        """Examples of the largest client."""

    def num_examples(self, client: Int[Array, ""]) -> Int[Array, ""]:
        """Examples of one client."""

    def batch(self, client: Int[Array, ""], position: Int[Array, " example"]) -> Batch:
        """One client's examples at `position`, 0 to num_examples - 1; other positions are masked."""
        ...


@pytree
class Cohort:
    """The clients of one round. Rows that are not `present` are padding and are masked everywhere.

    `cached` marks the experts whose current version a client still has; None if nobody knows.
    """

    client: Int[Array, " client"]
    present: Bool[Array, " client"]
    slots: Int[Array, " client"]
    cached: Bool[Array, "client all_experts"] | None = None


@pytree
class Alignment:
    """Which experts each client trains (`held`) and merely tries (`probed`); empty places are `NO_EXPERT`.

    `fitness` is the score of each held pair (0 in empty slots), `fitness_mean` each client's mean over all experts, with several groups
    over those of each group. `promised` is what an aligner promises of `held`, an `alignment.Promise`, or None.
    """

    held: Int[Array, "client slot"]
    probed: Int[Array, "client probe"]
    fitness: Float[Array, "client slot"]
    fitness_mean: Float[Array, "client *group"]
    promised: Any = None

    @property
    def centred(self) -> Float[Array, "client slot"]:
        """Fitness of each held pair above the client's mean over all experts of the group; 0 in empty slots."""
        mean = self.fitness_mean.reshape(self.held.shape[0], -1, 1)
        above = self.fitness.reshape(*mean.shape[:2], self.held.shape[1] // mean.shape[1]) - mean
        return jnp.where(self.held == NO_EXPERT, 0, above.reshape(self.held.shape))


@pytree
class Feedback:
    """What training told about each client and slot; empty slots and absent clients hold 0.

    `examples` counts the client's own examples, `tokens` those routed to a slot in all local steps. `correct` and
    `loss` are means over a slot's tokens; `solo_loss` is the loss of each held, then each probed expert used alone.
    """

    examples: Int[Array, " client"]
    tokens: Int[Array, "client slot"]
    correct: Float[Array, "client slot"]
    loss: Float[Array, "client slot"]
    solo_loss: Float[Array, "client slot_and_probe"]


@pytree
class ClientUpdate:
    """What clients return: delta = local - global of the shared part and of each slot, and what weighs it.

    Absent clients have `examples` 0 and `tokens` 0; their deltas may hold anything finite. A delta is an array, [client, ...]
    or [client, slot, ...], or where an aggregator needs no more than sums and norms a `kernels.DualDelta`, see `kernels.shared_sum`,
    `experts.combine` and `norms`.
    """

    shared: PyTree
    experts: PyTree
    held: Int[Array, "client all_slots"]
    examples: Int[Array, " client"]
    tokens: Int[Array, "client all_slots"]


class Fitness(NamedTuple):
    """How well each expert of a group suits each client, learnt from feedback.

    init(num_clients, num_experts) -> state; score(state, client) -> Float[client expert], higher is better;
    update(state, cohort, alignment, feedback) -> state. `probes` unheld experts are tried by each client a round.
    """

    init: Callable[[int, int], PyTree]
    score: Callable[[PyTree, Int[Array, " client"]], Float[Array, "client expert"]]
    update: Callable[[PyTree, Cohort, Alignment, Feedback], PyTree]
    probes: int = 0


class LoadMonitor(NamedTuple):
    """How much each expert of a group has been trained, and how many clients it should get.

    init(num_experts) -> state; bounds(state, slots, wanted) -> (lower, upper), Int[expert] each, `wanted` being the slots that ask for
    each expert; update(state, held, tokens, wanted) -> state; deficit(state) -> Float[expert], the clients that each is behind.
    """

    init: Callable[[int], PyTree]
    bounds: Callable[[PyTree, Int[Array, " client"], Float[Array, " expert"]], tuple[Int[Array, " expert"], Int[Array, " expert"]]]
    update: Callable[[PyTree, Int[Array, "client slot"], Int[Array, "client slot"], Float[Array, " expert"]], PyTree]
    deficit: Callable[[PyTree], Float[Array, " expert"]]


class Aligner(NamedTuple):
    """Decides each round which client trains which experts, and learns from what came of it.

    init(num_clients) -> state; align(key, state, cohort) -> (Alignment, state);
    learn(state, cohort, alignment, feedback) -> state. No client gets more than `max_slots` experts of a group, nor tries
    more than `probes` others. `num_experts` of a group, where given, and `groups` must be those of the model.
    """

    init: Callable[[int], PyTree]
    align: Callable[[Key[Array, ""], PyTree, Cohort], tuple[Alignment, PyTree]]
    learn: Callable[[PyTree, Cohort, Alignment, Feedback], PyTree]
    max_slots: int
    probes: int = 0
    num_experts: int | None = None
    groups: int = 1


class Aggregator(NamedTuple):
    """Turns client updates, seen in chunks, into one server update.

    init(experts, shared) -> total; add(total, update) -> total; finish(total) -> (expert deltas, shared deltas). A total is sums over
    clients that start at 0, which devices add up. `needs` says what it reads of each client: "deltas", "norms", or "sum": then it only adds
    deltas times tokens or examples, so that the total is not finite where one is not. One that `collects` keeps all of a cohort in
    init(experts, shared, clients, slots of a group). One that is `private` (see `privacy`) is init(experts, shared, kept) and
    finish(total, key) -> (deltas, kept), dividing by `fixed`. `encoder`: what updates become on their way. `law`: see `mass.Law`.
    """

    init: Callable[..., PyTree]
    add: Callable[[PyTree, ClientUpdate], PyTree]
    finish: Callable[..., tuple[PyTree, PyTree]]
    needs: str
    encoder: Any = None
    collects: bool = False
    private: Any = None
    fixed: Any = None
    law: Any = None


@runtime_checkable
class LossFn(Protocol):
    """loss_fn(model, batch, key) -> (loss[example], aux), where aux maps names to per-example metrics.

    aux["correct"], the share of an example's predictions that are right, is what accuracies are made of.
    """

    def __call__(self, model: Any, batch: Batch, key: Key[Array, ""], /) -> tuple[Float[Array, " example"], dict[str, Array]]: ...
