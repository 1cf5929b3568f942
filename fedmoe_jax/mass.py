"""Whether the aggregate is made of what clients send: each update along random signs, summed apart from any aggregator.

Of each weight a client's delta d becomes the number z.d, z being signs [1] that are the same for all clients and new in each round.
What conserves mass conserves the weighted sum of these numbers: that over clients, by what they hold and report, must be z times the
aggregate. It takes one look at each update and a few numbers of each client and slot, in the order of the cohort, so that neither
chunks nor devices nor the scatter into experts have a part in it. Signs are a product of one vector for each axis: a delta X^T G of
the dual engine is then (X u).(G v), from its factors, and signs of any two entries are still independent.

How close: entries of the aggregate are rounded one by one, independently of their signs. So z.d is off by about the root of the sum of
their squared errors, which is at most their relative error times the sum over clients of weight times |d|, Euclidean norms, however
many entries there are. (Of the sum of all absolute values, which grows faster, that would be next to nothing, and so would be a whole
client.) Sums of n float32 numbers are off by about sqrt(n) 2^-24: 2e-5 for 100,000 clients, a fifth of what is allowed. A fault
shows where it moves more than what is allowed: 1e-4 is one client of thousands.

References:
  [1] Alon, Matias and Szegedy, "The Space Complexity of Approximating the Frequency Moments", STOC 1996.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fedmoe_jax.base import NO_EXPERT, ClientUpdate, Feedback, pytree
from fedmoe_jax.experts import by_group, group_places, groups, num_experts
from fedmoe_jax.kernels import DualDelta, is_dual

EXACT = 1e-4
"""What sums in float32 may be off by, relative to the sum of norms."""

ROUNDED = {"cpu": EXACT, "gpu": 2.0**-8}
"""The same of products of float32 numbers: 8 times the rounding of TensorFloat-32 on GPUs; elsewhere, as of bfloat16 numbers, `COARSE`."""

COARSE = 2.0**-5

_TINY = 1e-30


class Law(NamedTuple):
    """What an aggregator makes of deltas: their weighted sum over a divisor, for each expert and for the shared part.

    An expert's weight is the tokens that the client sent it, the shared part's its examples, if these are `counted`, otherwise 1 for
    all that sent any. `divisors`, of experts and of the shared part, are the sums of the weights if None. If it is not `exact`, the
    aggregate is something else, whose norm is at most that sum of norms.
    """

    counted: bool
    divisors: tuple[float, float] | None = None
    exact: bool = True


@pytree
class Mass:
    """Of each weight, as a last axis: the delta along signs, its norm or more, and how much of that rounding may take."""

    experts: Float[Array, "client slot expert_leaf 3"]
    shared: Float[Array, "client shared_leaf 3"]


def of_update(update: ClientUpdate, round: Any) -> Mass:
    """The masses of what clients send, as an aggregator is to get it.

    Args:
      round: its number, from which signs follow.
    """
    leaves = (jax.tree.leaves(tree, is_leaf=is_dual) for tree in (update.experts, update.shared))
    held = by_group(update.held, len(groups(update.experts)))

    def one(leaf, lead, place, held=None):
        signs = _signs(round, lead, place, leaf.base.shape[-2:] if is_dual(leaf) else leaf.shape[lead:])
        return _of_dual(leaf, signs, held) if is_dual(leaf) else _of_array(leaf, signs, _doubt(leaf))

    own = [one(leaf, 2, place, held[:, g]) for place, (leaf, g) in enumerate(zip(next(leaves), group_places(update.experts), strict=True))]
    shared = [one(leaf, 1, place) for place, leaf in enumerate(next(leaves))]
    return Mass(_stacked(own, held[:, 0].shape), _stacked(shared, update.examples.shape))


def conserved(
    law: Law | None, masses: Mass | None, delta: Any, held: Int[Array, "client all_slots"], feedback: Feedback, round: Any
) -> Bool[Array, ""]:
    """Whether the aggregate `delta` of (experts, shared) is what the law of its aggregator makes of what clients sent.

    True where there is no law, or nobody looked. What is not finite is not compared.

    Args:
      masses: of all clients, in the order of `held` and `feedback`.
    """
    if law is None or masses is None:
        return jnp.bool_(True)
    experts, shared = delta
    places, size = jnp.array(group_places(experts), jnp.int32), num_experts(experts)
    weights = [tokens.astype(jnp.float32) if law.counted else jnp.float32(tokens > 0) for tokens in (feedback.tokens, feedback.examples)]
    weight, holds = (jnp.swapaxes(by_group(rows, len(groups(experts)))[:, places], 1, 2) for rows in (weights[0], held))
    bucket = jnp.where(holds == NO_EXPERT, size, holds % size)  # [client, slot, leaf]
    empty = jnp.zeros((size, len(places), 4))
    sums = empty.at[bucket, jnp.arange(len(places))].add(_weighted(masses.experts, weight), mode="drop")
    of_shared = _weighted(masses.shared, jnp.broadcast_to(weights[1][:, None], masses.shared.shape[:2])).sum(axis=0)

    def found(leaves, lead):
        looks = [_of_array(leaf, _signs(round, lead + 1, place, leaf.shape[lead:]), 0.0) for place, leaf in enumerate(leaves)]
        return _stacked(looks, (size,)[:lead])

    fixed = (None, None) if law.divisors is None else law.divisors
    of_experts = _agree(law, sums, found(jax.tree.leaves(experts), 1), fixed[0])
    return of_experts & _agree(law, of_shared, found(jax.tree.leaves(shared), 0), fixed[1])


def _agree(law: Law, sums: Float[Array, "*lead leaf 4"], found: Float[Array, "*lead leaf 3"], divisor: float | None) -> Bool[Array, ""]:
    divided = sums[..., :3] / (jnp.maximum(sums[..., 3:], 1) if divisor is None else divisor)
    along, norm, doubt = (divided[..., number] for number in range(3))
    wrong = found[..., 1] > norm + doubt + _TINY
    if law.exact:
        wrong |= jnp.abs(found[..., 0] - along) > doubt + _TINY
    return ~wrong.any()


def _weighted(masses: Float[Array, "*lead 3"], weight: Float[Array, "*lead"]) -> Float[Array, "*lead 4"]:
    """Masses times their weight, and the weight; what weighs nothing may be anything."""
    return jnp.concatenate([jnp.where(weight[..., None] > 0, weight[..., None] * masses, 0), weight[..., None]], axis=-1)


def _stacked(looks: list[Float[Array, "*lead 3"]], lead: tuple[int, ...]) -> Float[Array, "*lead leaf 3"]:
    return jnp.stack(looks, axis=-2) if looks else jnp.zeros((*lead, 0, 3))


def _signs(round: Any, lead: int, place: int, shape: tuple[int, ...]) -> list[Array]:
    """Signs of each axis of a weight, the `place`-th of the experts (lead 2) or of the shared part (lead 1)."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(jax.random.key(0), round), lead), place)
    return [jax.random.rademacher(jax.random.fold_in(key, axis), (size,), jnp.float32) for axis, size in enumerate(shape)]


def _of_array(leaf: Array, signs: Sequence[Array], doubt: float) -> Float[Array, "*lead 3"]:
    value = leaf.astype(jnp.float32)
    norm = jnp.sqrt(jnp.square(value).sum(axis=tuple(range(leaf.ndim - len(signs), leaf.ndim))))
    for sign in reversed(signs):
        value = (value * sign).sum(axis=-1)
    return jnp.stack([value, norm, doubt * norm], axis=-1)


def _of_dual(delta: DualDelta, signs: Sequence[Array], held: Int[Array, "client slot"] | None) -> Float[Array, "*lead 3"]:
    """That of shrink * base + the sum of X^T (weight * G), from its factors; [client, slot, 3], or [client, 3] without `held`."""
    own = _of_array(delta.base, signs, 0.0)[..., :2]
    own = own[None] if held is None else own[jnp.maximum(held, 0) % len(own)]
    total = _scaled(jnp.broadcast_to(own, (len(delta.shrink), *own.shape[-2:])), delta.shrink[:, None])
    for rows in delta.history:
        one_hot = jnp.issubdtype(rows.inputs.dtype, jnp.integer)
        x = jnp.stack([signs[0][rows.inputs], jnp.ones(rows.inputs.shape)], axis=-1) if one_hot else _of_array(rows.inputs, signs[:1], 0.0)
        looks = _scaled(x[..., :2] * _of_array(rows.gradients, signs[1:], 0.0)[..., :2], rows.weight[:, None])  # [client, lane, row, 2]
        if rows.slot is None:
            total += looks.sum(axis=2)
        else:  # the one lane falls into tiles, each of a slot
            of_tiles = looks.reshape(*rows.slot.shape, -1, 2).sum(axis=2)
            total += jnp.einsum("cts,ctn->csn", jax.nn.one_hot(rows.slot, total.shape[1]), of_tiles, precision=jax.lax.Precision.HIGHEST)
    made = jnp.concatenate([total, _doubt(*(rows.gradients for rows in delta.history)) * total[..., 1:]], axis=-1)
    return made[:, 0] if held is None else made


def _doubt(*factors: Array) -> float:
    """What rounding may take of sums over clients of these, relative to the sum of their norms."""
    whole = all(factor.dtype == jnp.float32 for factor in factors)
    return ROUNDED.get(jax.default_backend(), COARSE) if whole else COARSE


def _scaled(looks: Float[Array, "*#lead 2"], by: Float[Array, "*#lead"]) -> Float[Array, "*_lead 2"]:
    """Those of as many times the value: its norm times the size of that."""
    return looks * jnp.stack([by, jnp.abs(by)], axis=-1)
