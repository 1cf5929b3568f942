"""Robust aggregation: rules that a minority of bad clients cannot bend, for each expert and for the shared part alone.

Each client is one voter for what it sent, whatever its tokens or examples: for an expert the clients that hold it and sent it
tokens, for the shared part those with examples. Absent and rejected clients are none.

Where there are fewer voters than a rule needs, the outcome is the mean of their deltas, each scaled down to the smallest norm
among them, and one voter alone changes nothing.

The deltas of the whole cohort are kept, as float32 rows of [client, value] for the shared part and [client, slot, value] for experts:
cohort x (shared + K experts). Experts are aggregated one after the other, which takes some arrays of cohort x one expert more, and
time of experts x cohort even where few clients hold each.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from fedmoe_jax.base import NO_EXPERT, Aggregator, ClientUpdate, pytree
from fedmoe_jax.experts import by_group, group_places, groups, num_experts
from fedmoe_jax.mass import Law

_TINY = float(jnp.finfo(jnp.float32).tiny)

Rule = Callable[[Float[Array, "client value"], Bool[Array, " client"]], Float[Array, " value"]]
"""rule(deltas, who votes) -> delta. Deltas of others are 0, and what it returns for fewer voters than it needs is not used."""


@pytree
class Collected:
    """What a cohort sent so far, in `filled` rows: `experts` flat for each group, `held` without the slots that sent nothing.

    `weights` are zeros of the shapes of (experts, shared).
    """

    weights: tuple[PyTree, PyTree]
    experts: tuple[Float[Array, "client slot _value"], ...]
    shared: Float[Array, "client _value"]
    held: Int[Array, "client all_slots"]
    votes: Bool[Array, " client"]
    filled: Int[Array, ""]


def median() -> Aggregator:
    """The median of each coordinate [1], the mean of the two in the middle of an even number. It needs 3 voters.

    Stands any values of fewer than half of the voters: it stays between the least and the greatest value of the others.

    References:
      [1] Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018.
    """
    return _collecting(_median)


def trimmed_mean(*, share: float = 0.1) -> Aggregator:
    """The mean of each coordinate without its ceil(share x voters) least and as many greatest values [1]. It needs 3 voters.

    At least one value is left, or two of an even number. Stands any values of as many voters as are cut at one end.

    Args:
      share: of the voters, cut at each end, 0 to below 0.5; 0 is the mean of all, and stands nothing.

    Raises:
      ValueError: if `share` is out of its range.

    References:
      [1] as `median`.
    """
    if not 0 <= share < 0.5:
        raise ValueError(f"share is {share}, it must be at least 0 and below 0.5")
    share = float(share)

    def rule(rows: Float[Array, "client value"], voters: Bool[Array, " client"]) -> Float[Array, " value"]:
        number = voters.sum()
        cut = jnp.minimum(jnp.array(_counts(share, len(rows)))[number], jnp.maximum(number - 1, 0) // 2)
        place = jnp.arange(len(rows))[:, None]
        inside = (place >= cut) & (place < number - cut)
        return jnp.where(inside, _ordered(rows, voters), 0).sum(0) / jnp.maximum(number - 2 * cut, 1)

    return _collecting(rule)


def krum(*, byzantine: int | float, keep: int | None = 1) -> Aggregator:
    """The delta that is nearest to its neighbours, or the mean of several [1]. It needs 2 `byzantine` + 3 voters.

    With f = `byzantine` of n voters, each gets the sum of the squared distances to its n - f - 2 nearest others as its score, of all
    weights of an expert together; the lowest scores win. Equal scores at the limit share what is left for them.

    Args:
      byzantine: bad voters that it is to stand: a whole number from 0, or a share below 0.5 of those of each expert, rounded up.
      keep: voters whose mean is taken, at least 1 and at most n - f; None for n - f (multi-Krum).

    Raises:
      ValueError: if an argument is out of its range.

    References:
      [1] Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS 2017.
    """
    if isinstance(byzantine, bool) or not (byzantine >= 0 if isinstance(byzantine, int) else 0 <= byzantine < 0.5):
        raise ValueError(f"byzantine is {byzantine}, it must be a whole number from 0, or a share below 0.5")
    byzantine = byzantine if isinstance(byzantine, int) else float(byzantine)
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 1):
        raise ValueError(f"keep is {keep}, it must be a whole number from 1, or None")

    def rule(rows: Float[Array, "client value"], voters: Bool[Array, " client"]) -> Float[Array, " value"]:
        number, order = voters.sum(), jnp.arange(len(rows))
        bad = jnp.array(_counts(byzantine, len(rows)))[number]
        distance = jax.lax.map(lambda row: jnp.square(rows - row[None]).sum(1), rows)  # exact also where deltas are large
        others = voters[None] & (order[:, None] != order[None])
        nearest = jnp.sort(jnp.where(others, distance, jnp.inf), axis=1)
        score = jnp.where((order < number - bad - 2)[None], nearest, 0).sum(1)
        most = jnp.maximum(number - bad, 1)
        kept = most if keep is None else jnp.minimum(keep, most)
        limit = jnp.sort(jnp.where(voters, score, jnp.inf))[kept - 1]
        below, equal = voters & (score < limit), voters & (score == limit)
        weight = below + jnp.where(equal, (kept - below.sum()) / jnp.maximum(equal.sum(), 1), 0)
        return _mean(rows, weight)

    return _collecting(rule, lambda most: 2 * _counts(byzantine, most) + 3)


def geometric_median(*, iterations: int = 10, smoothing: float = 1e-6) -> Aggregator:
    """The point of least total distance to the deltas, of all weights of an expert together [1]. It needs 3 voters.

    Smoothed Weiszfeld steps from the median of each coordinate, so that few of them suffice whatever some clients send. Stands any
    values of fewer than half of the voters: its distance to the others stays bounded by how far they are apart.

    Args:
      iterations: steps, at least 1.
      smoothing: distances below it count as so much, above 0.

    Raises:
      ValueError: if an argument is out of its range.

    References:
      [1] Pillutla, Kakade and Harchaoui, "Robust Aggregation for Federated Learning", IEEE Transactions on Signal Processing 70,
        2022, algorithm 2, which starts from 0.
    """
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations is {iterations}, it must be a whole number from 1")
    if not 0 < smoothing < math.inf:
        raise ValueError(f"smoothing is {smoothing}, it must be above 0")

    def rule(rows: Float[Array, "client value"], voters: Bool[Array, " client"]) -> Float[Array, " value"]:
        def step(_, centre):
            return _mean(rows, jnp.where(voters, 1 / jnp.maximum(norms(rows - centre[None]), smoothing), 0))

        return jax.lax.fori_loop(0, iterations, step, _median(rows, voters))

    return _collecting(rule)


def norms(rows: Float[Array, "client value"]) -> Float[Array, " client"]:
    """The Euclidean norm of each row, also of one whose square is no number of its type."""
    largest = jnp.maximum(jnp.abs(rows).max(axis=1, initial=0), _TINY)
    return largest * jnp.sqrt(jnp.square(rows / largest[:, None]).sum(axis=1))


def _collecting(rule: Rule, least: Callable[[int], np.ndarray] = lambda most: np.full(most + 1, 3)) -> Aggregator:
    """The aggregator of a rule; `least(most)` tells for 0 to `most` voters how many it needs."""

    def init(experts: PyTree, shared: PyTree, clients: int, slots: int) -> Collected:
        names = groups(experts)
        flat = tuple(jnp.zeros((clients, slots, rows.shape[-1])) for rows in _of_groups(experts, 1))
        size = sum(leaf.size for leaf in jax.tree.leaves(shared))
        held = jnp.full((clients, slots * len(names)), NO_EXPERT, jnp.int32)
        weights = jax.tree.map(jnp.zeros_like, (experts, shared))
        return Collected(weights, flat, jnp.zeros((clients, size)), held, jnp.zeros(clients, bool), jnp.zeros((), jnp.int32))

    def add(total: Collected, update: ClientUpdate) -> Collected:
        def put(rows, new):
            return jax.lax.dynamic_update_slice_in_dim(rows, new, total.filled, axis=0)

        experts = tuple(map(put, total.experts, _of_groups(update.experts, 2)))
        shared = put(total.shared, _flat(jax.tree.leaves(update.shared), 1, len(update.examples)))
        held = put(total.held, jnp.where(update.tokens > 0, update.held, NO_EXPERT))
        return Collected(total.weights, experts, shared, held, put(total.votes, update.examples > 0), total.filled + len(update.examples))

    def aggregate(rows: Float[Array, "client value"], voters: Bool[Array, " client"]) -> Float[Array, " value"]:
        rows, number = jnp.where(voters[:, None], rows, 0), voters.sum()
        enough = jnp.array(np.arange(len(rows) + 1) >= least(len(rows)))[number]
        return jnp.where(enough, rule(rows, voters), _of_few(rows, voters))

    def finish(total: Collected) -> tuple[PyTree, PyTree]:
        experts, shared = total.weights
        held = by_group(total.held, len(total.experts))

        def one_group(rows, held):
            def one(expert):
                own = (held != NO_EXPERT) & (held % num_experts(experts) == expert)
                place = jnp.argmax(own, axis=1)[:, None, None]
                return aggregate(jnp.take_along_axis(rows, place, axis=1)[:, 0], own.any(axis=1))

            return jax.lax.map(one, jnp.arange(num_experts(experts)))

        made = [one_group(rows, held[:, group]) for group, rows in enumerate(total.experts)]
        leaves, treedef = jax.tree.flatten(shared)
        return _as_experts(made, experts), jax.tree.unflatten(treedef, _split(aggregate(total.shared, total.votes), leaves, 0))

    return Aggregator(init, add, finish, needs="deltas", collects=True, law=Law(counted=False, divisors=(1.0, 1.0), exact=False))


def _of_few(rows: Float[Array, "client value"], voters: Bool[Array, " client"]) -> Float[Array, " value"]:
    """What stands in where a rule has too few voters."""
    norm = norms(rows)
    smallest = jnp.where(voters, norm, jnp.inf).min()
    scale = jnp.where(norm > smallest, smallest / norm, 1)
    mean = jnp.where(voters[:, None], scale[:, None] * rows, 0).sum(0) / jnp.maximum(voters.sum(), 1)
    return jnp.where(voters.sum() > 1, mean, 0)


def _ordered(rows, voters):
    """Each coordinate's values in ascending order, those of voters first."""
    return jnp.sort(jnp.where(voters[:, None], rows, jnp.inf), axis=0)


def _median(rows, voters):
    ordered, number = _ordered(rows, voters), voters.sum()
    middle = 0.5 * ordered[jnp.maximum(number - 1, 0) // 2] + 0.5 * ordered[number // 2]
    return jnp.where(number > 0, middle, 0)


def _mean(rows, weight):
    return ((weight / jnp.maximum(weight.sum(), _TINY))[:, None] * rows).sum(0)


def _counts(part: int | float, most: int) -> np.ndarray:
    """What a number, or a share rounded up, is of 0 to `most` voters. 0.07 of 100 are 7, though the product is more."""
    voters = np.arange(most + 1, dtype=np.int32)
    return np.ceil(part * voters * (1 - 1e-12)).astype(np.int32) if isinstance(part, float) else np.full_like(voters, part)


def _of_groups(experts: PyTree, lead: int) -> list[Array]:
    """The weights of each group, flat behind `lead` axes."""
    names, leaves = groups(experts), jax.tree.leaves(experts)
    group = group_places(experts)
    return [_flat([leaf for leaf, of in zip(leaves, group, strict=True) if of == g], lead, len(leaves[0])) for g in range(len(names))]


def _flat(leaves: list[Array], lead: int, rows: int) -> Array:
    flat = [leaf.reshape(*leaf.shape[:lead], math.prod(leaf.shape[lead:])).astype(jnp.float32) for leaf in leaves]
    return jnp.concatenate(flat, axis=-1) if flat else jnp.zeros((rows, 0))


def _split(flat: Float[Array, "*lead value"], leaves: list[Array], lead: int) -> list[Array]:
    """The inverse of `_flat`, in the shapes and dtypes of `leaves`."""
    ends = np.cumsum([math.prod(leaf.shape[lead:]) for leaf in leaves])
    parts = jnp.split(flat, ends[:-1], axis=-1) if leaves else []
    return [part.reshape(leaf.shape).astype(leaf.dtype) for part, leaf in zip(parts, leaves, strict=True)]


def _as_experts(made: list[Float[Array, "expert _value"]], experts: PyTree) -> PyTree:
    """The inverse of `_of_groups`, in the shapes and dtypes of `experts`."""
    leaves, treedef = jax.tree.flatten(experts)
    group = group_places(experts)
    parts = [iter(_split(flat, [leaf for leaf, of in zip(leaves, group, strict=True) if of == g], 1)) for g, flat in enumerate(made)]
    return jax.tree.unflatten(treedef, [next(parts[of]) for of in group])
