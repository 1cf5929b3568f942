"""Plans local training: which engine trains each kernel, and how many clients are trained side by side."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array

from fedmoe_jax.base import Aggregator, Batch, LossFn, RoundCost
from fedmoe_jax.experts import Partition, RouterParam, groups
from fedmoe_jax.local.dual import MOST_PLACES, UNROLLED, Use
from fedmoe_jax.local.primal import objective
from fedmoe_jax.probe import Probe

MEMORY_SHARE = 0.5
"""Share of a device's total memory that the weights of a chunk may take; the rest is for data, state and temporaries."""


CACHE_BYTES = 16e6
"""Memory of which clients side by side on a CPU may take `MEMORY_SHARE`: those that its cache holds train quicker than more. A setting."""


def room(memory_bytes: float) -> float:
    """The memory to fill with clients side by side: that of the device, or the cache of a CPU."""
    return min(memory_bytes, CACHE_BYTES) if jax.default_backend() == "cpu" else memory_bytes


def chunk_size(cost: RoundCost, *, cohort_size: int, max_slots: int, probes: int, memory_bytes: float, saved: float = 0.0) -> int:
    """Clients whose weights, gradients, optimizer state and activations fit into the device at once.

    Args:
      cost: of one client's round, see `fedmoe_jax.local.cost.round_cost`.
      memory_bytes: TOTAL memory of the device, so that the same device always gives the same chunk.
      saved: bytes that a client takes less than with the primal engine, see `Choice`.

    Returns:
      1 to cohort_size; chunks are made about equal, so that the last one is not nearly empty.
    """
    client = max(float(cost.shared_memory) + (max_slots + probes) * float(cost.expert_memory) - saved, 1.0)
    fitting = max(1, int(min(cohort_size, MEMORY_SHARE * memory_bytes / client)))
    chunks = -(-cohort_size // fitting)
    return -(-cohort_size // chunks)


def side_by_side(
    asked: int | None, cost: RoundCost, choices: tuple["Choice", ...], *, cohort_size: int, max_slots: int, probes: int
) -> int:
    """Clients that a device trains at once: as many as asked for, else all of them, or those that the cache of a CPU holds."""
    if asked is not None:
        return min(asked, cohort_size)
    sizes = dict(cohort_size=cohort_size, max_slots=max_slots, probes=probes)
    return chunk_size(cost, **sizes, memory_bytes=room(math.inf), saved=sum((choice.saved for choice in choices), 0.0))


def chosen(
    engine: str, client_optimizer: Any, aggregator: Aggregator, parts: Any, control_variates: bool, reject_above: float | None = None
) -> tuple[str, str | None]:
    """The engine to use, primal where the dual one cannot serve the optimizer or the aggregator, and then why it cannot."""
    if engine not in ("auto", "primal", "dual"):
        raise ValueError(f"engine is {engine!r}, it must be 'auto', 'primal' or 'dual'")
    reason = None
    if engine != "primal" and control_variates:
        reason = "control_variates are added to each client's gradients"
    elif engine != "primal" and aggregator.needs not in ("sum", "norms"):
        reason = f"the aggregator needs {aggregator.needs} of each client"
    elif engine != "primal" and reject_above is not None:
        reason = "reject_above looks at the norm of each client's update"
    elif engine != "primal" and not is_linear(client_optimizer, (parts.experts, parts.shared)):
        reason = "client_optimizer is not linear in the gradient of each weight"
    if engine == "dual" and reason:
        raise ValueError(f"engine: 'dual' cannot serve, since {reason}; use 'auto' or 'primal'")
    return ("primal" if reason else engine), reason


class Choice(NamedTuple):
    """Why a weight is trained as it is: predicted cost of a client's local training in both engines, in FLOPs, bytes of
    traffic counted as so many FLOPs each. `use` is None where it stays primal; costs are 0 where nothing was predicted.
    `saved`: bytes that a client takes less as it is than with the primal engine."""

    name: str
    use: Use | None
    primal: float
    dual: float
    reason: str
    saved: float = 0.0


_TRIALS = 16  # steps in which an optimizer must act linearly; some begin to adapt after a few

BALANCE = {"cpu": 8.0, "gpu": 100.0, "tpu": 100.0}
"""FLOPs that take about as long as a byte of memory traffic; a setting, not a measurement."""


def engines(
    parts: Partition,
    loss_fn: LossFn,
    batch: Batch,
    *,
    slots: int,
    probes: int,
    steps: int,
    engine: str,
    balance: float,
    norms: bool = False,
) -> tuple[Choice, ...]:
    """The engine of each leaf of (experts, shared): the dual one for what is a factor of one product or looked up once, if it costs less.

    Args:
      batch: shapes of a batch.
      slots, probes: experts that a client trains and only evaluates, of each group.
      steps: local steps of the largest client.
      engine: "auto", "primal", or "dual" for all that can be.
      balance: FLOPs that take as long as a byte of memory traffic.
      norms: whether norms of updates are asked for.
    """
    names, leaves = _leaves(parts)
    found = [use and use._replace(known=use.known and _worth_it(use, steps)) for use in _uses(parts, loss_fn, batch, slots, leaves)]
    choices = []
    for name, leaf, use in zip(names, leaves, found, strict=True):
        if use is None:
            choices.append(Choice(name, None, 0.0, 0.0, "not a factor of one product or looked up once, or only in a transformation"))
            continue
        primal, dual = _cost(use, leaf.shape[-2:], slots if leaf.ndim == 3 else 1, steps, balance, norms)
        better = engine == "dual" or (engine == "auto" and dual < primal and steps <= UNROLLED)
        reason = "asked for" if engine != "auto" else "costs less" if better else "would cost more in the dual engine"
        reason = f"more than {UNROLLED} steps" if engine == "auto" and dual < primal and not better else reason
        saved = _saved(use, leaf, slots + probes if leaf.ndim == 3 else 1, steps, norms) if better else 0.0
        choices.append(Choice(name, use if better else None, primal, dual, reason, saved))
    return tuple(choices)


def without_dual_experts(choices: tuple[Choice, ...], experts: int) -> tuple[Choice, ...]:
    """The same, the first `experts` leaves trained by the primal engine: slots are copied anyway where experts are spread over devices."""
    reason = "experts are spread over devices"
    of_experts = (choice._replace(use=None, reason=reason, saved=0.0) if choice.use else choice for choice in choices[:experts])
    return (*of_experts, *choices[experts:])


def is_linear(optimizer: optax.GradientTransformation | Callable[[Array], optax.GradientTransformation], weights: Any) -> bool:
    """Whether an optimizer acts on each entry alone and linearly, so that the dual engine can run it on coefficients.

    Tried on small arrays in the structure of `weights`: steps from gradients of several sizes, and the same from their
    coefficients. An optimizer that is a function of the round is tried in some rounds; what never moves is not taken for linear.
    A mask may look at the paths and numbers of axes of weights, but not at their sizes, which here are others.
    """
    leaves, treedef = jax.tree.flatten(weights)
    try:
        return _is_linear(optimizer, treedef, tuple(leaf.ndim for leaf in leaves))
    except Exception:  # an optimizer that cannot be tried is left to the primal engine
        return False


@functools.lru_cache(maxsize=8)
def _is_linear(optimizer, treedef, axes: tuple[int, ...]) -> bool:
    def trial(round, size):
        made = optimizer if isinstance(optimizer, optax.GradientTransformation) else optimizer(round)
        return _trial(made, treedef, axes, size)

    trials = jax.jit(jax.vmap(jax.vmap(trial, (None, 0)), (0, None)))
    most, off = trials(jnp.arange(0, 101, 50), jnp.array([1e-2, 1.0, 1e4]))
    moves = (most > 0) | (off > 0)
    return bool(moves.any() & ((off <= 1e-3 * most + 2e-6) | ~moves).all())


def _trial(optimizer: optax.GradientTransformation, treedef: Any, axes: tuple[int, ...], size: Array) -> tuple[Array, Array]:
    """The largest change of a weight in some steps from gradients of a size, and how far off the prediction is."""
    shapes = [(_TRIALS + 1, *(2,) * number) for number in axes]
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    numbers = np.sqrt(2) * np.cos(np.sqrt(2) * np.arange(ends[-1]) ** 2)  # as good as random, and a constant of the program
    drawn = [rows.reshape(shape) for rows, shape in zip(np.split(np.float32(numbers), ends[:-1]), shapes, strict=True)]
    basis = [jnp.concatenate([rows[:1], size * rows[1:]]) for rows in drawn]  # W_0, then gradients
    units = [jnp.eye(_TRIALS + 1).reshape(_TRIALS + 1, -1, *(1,) * max(number - 1, 0)) for number in axes]

    def step(carry, gradients):
        current, state = carry
        updates, state = optimizer.update(jax.tree.unflatten(treedef, gradients), state, current)
        return (optax.apply_updates(current, updates), state), None

    def run(rows):
        start = jax.tree.unflatten(treedef, [row[0] for row in rows])
        (current, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), [row[1:] for row in rows])
        return jax.tree.leaves(jax.tree.map(jnp.subtract, current, start))

    changes = run(basis)
    predicted = [
        jnp.tensordot(change.reshape(-1), row, 1, precision=jax.lax.Precision.HIGHEST)
        for change, row in zip(run(units), basis, strict=True)
    ]
    most = jnp.stack([jnp.abs(change).max() for change in changes]).max()
    return most, jnp.stack([jnp.abs(a - b).max() for a, b in zip(changes, predicted, strict=True)]).max()


def _leaves(parts: Partition) -> tuple[list[str], list[jax.Array]]:
    flat, _ = jax.tree_util.tree_flatten_with_path((parts.experts, parts.shared))
    return [jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value") for path, _ in flat], [leaf for _, leaf in flat]


def _uses(parts: Partition, loss_fn: LossFn, batch: Batch, slots: int, leaves: list[jax.Array]) -> list[Use | None]:
    """How each weight is used, seen by running the model on shapes with notes for weights."""
    number = len(groups(parts.experts))
    routers = {id(leaf) for leaf in jax.tree.leaves(nnx.split_state(parts.experts, RouterParam, ...)[0])}
    _, treedef = jax.tree.flatten((parts.experts, parts.shared))
    own = len(jax.tree.leaves(parts.experts))
    fits = [leaf.ndim == (3 if place < own else 2) and id(leaf) not in routers for place, leaf in enumerate(leaves)]

    def trace(wanted: list[bool]) -> list[tuple[Probe, bool] | None]:
        probes: list[Probe | None] = []

        def forward(trained, batch):
            leaves, key = trained
            leaves = [leaf[:1].repeat(slots, 0) if place < own else leaf for place, leaf in enumerate(leaves)]
            probes[:] = [Probe(leaf) if want else None for leaf, want in zip(leaves, wanted, strict=True)]
            weights = [leaf if probe is None else probe for leaf, probe in zip(leaves, probes, strict=True)]
            state = jnp.ones(number * slots, bool), jnp.zeros(number * slots)
            objective(parts, loss_fn, *jax.tree.unflatten(treedef, weights), batch, *state, key)
            return [jnp.zeros(()) if probe is None or probe.inputs is None else probe.inputs for probe in probes]

        free = _free(forward, (leaves, jax.random.key(0)), batch)
        return [None if probe is None else (probe, known) for probe, known in zip(probes, free, strict=True)]

    try:
        probes = trace(fits)
    except Exception:  # a model that does with weights what a probe cannot: one weight after the other
        probes = [_alone(trace, place, len(leaves)) if fit else None for place, fit in enumerate(fits)]
    return [_use(probe) for probe in probes]


def _free(function: Any, trained: Any, batch: Any) -> list[bool]:
    """Which outputs of function(trained, batch) do not depend on the first argument, as far as a look at its operations can tell."""
    program = jax.make_jaxpr(function)(trained, batch).jaxpr
    bound = {id(variable) for variable in program.invars[: len(jax.tree.leaves(trained))]}
    for operation in program.eqns:
        if any(id(variable) in bound for variable in operation.invars):
            bound.update(map(id, operation.outvars))
    return [id(variable) not in bound for variable in program.outvars]


def _alone(trace: Any, place: int, number: int) -> tuple[Probe, bool] | None:
    try:
        return trace([place == other for other in range(number)])[place]
    except Exception:
        return None


def _worth_it(use: Use, steps: int) -> bool:
    """Whether known inputs of all steps are best multiplied at once, with all others: on a GPU, where rows are few."""
    return jax.default_backend() == "gpu" and steps <= UNROLLED and steps * use.inputs.shape[1] <= 2 * use.outputs.shape[-1]


def _use(found: tuple[Probe, bool] | None) -> Use | None:
    if found is None or found[0].other or len(found[0].products) != 1:
        return None
    probe, known = found
    ((x, tiled),) = probe.products
    if jnp.issubdtype(x.dtype, jnp.integer):
        if len(probe.value.shape) != 2 or probe.value.shape[0] > MOST_PLACES:
            return None
        return Use(
            jax.ShapeDtypeStruct((1, x.size), jnp.float32),
            jax.ShapeDtypeStruct((1, x.size, probe.value.shape[1]), probe.value.dtype),
            False,
        )
    shape = x.shape if len(probe.value.shape) == 3 else (1, x.size // x.shape[-1], x.shape[-1])
    out = (*shape[:-1], probe.value.shape[-1])
    known = known and not tiled and len(probe.value.shape) == 2
    return Use(jax.ShapeDtypeStruct(shape, x.dtype), jax.ShapeDtypeStruct(out, x.dtype), tiled, known)


def _cost(use: Use, width: tuple[int, ...], slots: int, steps: int, balance: float, norms: bool = False) -> tuple[float, float]:
    """Predicted cost of a client's local training by the primal and the dual engine.

    Both do three products of all rows with the kernel. Primal reads the client's kernel twice a step and updates it, and in the
    end takes what it received from it, looks whether that is finite, and adds it to the sum; dual multiplies rows by the rows
    before them, forwards and backwards, and reads those, and lays them out for the sum. For norms primal reads what it added, and dual
    multiplies all rows by all.
    """
    fan_in, fan_out = use.features, width[1]
    groups, rows = use.inputs.shape[:2]
    total = groups * rows * steps
    lanes = 1 if use.tiled else groups
    before = total / lanes * ((steps - 1) / (2 * steps) if steps <= UNROLLED else 1.0)
    itemsize = use.inputs.dtype.itemsize
    products = 6.0 * total * fan_in * fan_out
    primal = products + balance * (6 * steps + 5 + norms) * 4 * slots * width[0] * width[1]
    dual = (
        products
        + 4.0 * total * before * (fan_in + fan_out)
        + balance * itemsize * (fan_in + fan_out) * (2 * steps * lanes * before + 4 * total)
        + norms * total * total / lanes * (2.0 * (fan_in + fan_out) + balance * 4 * 4)
    )
    return primal, dual


def _saved(use: Use, weight: Array, received: int, steps: int, norms: bool = False) -> float:
    """Bytes of a client's own weights, gradients and deltas, less those of the rows and products that take their place."""
    groups, rows = use.inputs.shape[:2]
    total, lanes = groups * rows, 1 if use.tiled else groups
    beside = use.outputs.shape[-1] + steps * total if use.known else 0  # products made before training
    history = use.inputs.dtype.itemsize * steps * total * (use.features + weight.shape[-1] + total // lanes + beside)
    history += norms * 2 * 4 * (steps * total) ** 2 // lanes  # the products of all rows with all, of inputs and of gradients
    return 3.0 * weight.dtype.itemsize * received * weight.shape[-2] * weight.shape[-1] - history
