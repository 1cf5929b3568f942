"""Client-level differential privacy: Gaussian noise on a sum of clipped updates, and on what clients tell beside them.

Who is to learn nothing: whoever sees the models of all rounds and which client trained which expert. The server is trusted (central
privacy); it sees updates. Neighbours are two populations of which one has, for one client in all rounds, nothing in place of its data's
effect: an update of 0 and no feedback (zero-out). The client itself stays: who is in a cohort, available and in time, how many examples
each has, what it can afford and, by that, the assignment that follows are taken as known to all. Taking a client out altogether would
not do: an aligner with load bounds then gives the others other experts, and all their updates change.

So an update counts the same whatever its tokens and examples, sums are divided by fixed numbers, every expert gets noise whoever holds
it, and the server learns nothing else from clients than what `gaussian_noise` says. What a simulation measures (`Info`, evaluation,
metrics) is for the experimenter: it has no noise and is not covered. Noise follows from `Kept.key`, and that from the key of the run,
which must stay secret, be of true entropy (`jax.random.key(secrets.randbits(63))`) and serve for one run: two of the same key have the
same noise. `fedmoe train` has the system draw `Kept.key`, whatever the seed. Noise is made of float32 numbers, whose gaps an attacker
with every bit of a model may use (Mironov 2012).
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from fedmoe_jax.aggregation.chain import Transform
from fedmoe_jax.aggregation.clip import Bound
from fedmoe_jax.aggregation.secure import FixedPoint
from fedmoe_jax.base import NO_EXPERT, Aggregator, Alignment, ClientUpdate, Cohort, Feedback, client_keys, pytree, stage_key
from fedmoe_jax.experts import groups, map_groups, num_experts
from fedmoe_jax.mass import Law

NOISE = 40
"""Place in a chain: after what bounds and what compresses."""

_LEAST_SCORE = 1e-3


class Fixed(NamedTuple):
    """Numbers of clients by which `fixed_mean` divides sums: of an expert, and of the shared part."""

    holders: float
    clients: float


@pytree
class Kept:
    """What a private aggregator carries from round to round: the norm to which it clips, and the key of all noise."""

    norm: Float[Array, ""]
    key: Key[Array, ""]


class Private(NamedTuple):
    """What a private aggregator is, for the round and for accounts.

    `noise_multiplier` is that of updates and, with adaptive clipping, of the number of clients below the norm together;
    `feedback_multiplier` that of the scores, None where they are withheld.
    """

    bound: Bound
    noise_multiplier: float
    feedback_multiplier: float | None

    def start(self, key: Key[Array, ""]) -> Kept:
        """The norm of the first round, and a key of noise that follows from that of the run."""
        return Kept(jnp.float32(self.bound.norm), stage_key(key, "privacy"))

    def reported(self, key: Key[Array, ""], cohort: Cohort, alignment: Alignment, feedback: Feedback) -> Feedback:
        """What the aligner gets to know: one example of each present client, one token of each expert that it holds, and no losses.

        Unless withheld, `solo_loss` is that of scores exp(-loss), 0 to 1, with Gaussian noise of feedback_multiplier sqrt(n) / 2 on
        each of the n that a client has places for. A score that is not known is 1/2, so that a client's scores have
        a distance of at most sqrt(n) / 2 to those of nothing. Losses of noisy scores are cut off at 0 and 7.
        """
        present = cohort.present[:, None]
        tokens = (present & (alignment.held != NO_EXPERT)).astype(jnp.int32)
        unknown = jnp.where(tokens > 0, jnp.nan, 0.0)
        pairs = jnp.concatenate([alignment.held, alignment.probed], axis=1)
        told = jnp.full(pairs.shape, jnp.nan)
        if self.feedback_multiplier is not None:
            known = (feedback.examples[:, None] > 0) & jnp.isfinite(feedback.solo_loss)
            score = jnp.where(known, jnp.clip(jnp.exp(-jnp.where(known, feedback.solo_loss, 0.0)), 0, 1), 0.5)
            noise = jax.vmap(lambda key: jax.random.normal(key, pairs.shape[1:]))(client_keys(key, cohort.client))
            score += self.feedback_multiplier * math.sqrt(pairs.shape[1]) / 2 * noise
            told = -jnp.log(jnp.clip(score, _LEAST_SCORE, 1))
        told = jnp.where(present & (pairs != NO_EXPERT), told, 0)
        return Feedback(cohort.present.astype(jnp.int32), tokens, unknown, unknown, told)


def fixed_mean(*, clients: float, holders: float, fixed_point: FixedPoint | None = None) -> Aggregator:
    """The sum of the clients' deltas over fixed numbers: each client counts the same, whatever its tokens, examples and companions.

    An expert's delta is summed over the clients that hold it and sent it tokens, the shared delta over those with examples.

    Args:
      clients: that the sum of the shared part is divided by, above 0; the cohort size, times the chance to be available.
      holders: that the sum of an expert is divided by, above 0; clients x slots / experts is what an expert has in the mean. One that
        has more of them in a round takes a larger step, one that has fewer a smaller one.
      fixed_point: what numbers are sent as, so that the sums are those of secure aggregation, see `secure`; as they are if None.

    Raises:
      ValueError: if an argument is out of its range.
    """
    for name, value in {"clients": clients, "holders": holders}.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}, it must be above 0")
    if fixed_point is not None and not (0 <= fixed_point.fraction_bits <= 30 and fixed_point.clients >= 1):
        raise ValueError(f"fixed_point is {fixed_point}, fraction_bits must be from 0 to 30 and clients at least 1")

    def init(experts: PyTree, shared: PyTree) -> tuple[PyTree, PyTree]:
        return jax.tree.map(lambda leaf: jnp.zeros_like(leaf, dtype=fixed_point and jnp.uint32), (experts, shared))

    def add(total: tuple[PyTree, PyTree], update: ClientUpdate) -> tuple[PyTree, PyTree]:
        deltas, size = sent(update), num_experts(total[0])
        if fixed_point is not None:
            deltas = jax.tree.map(fixed_point.encode, deltas)

        def of_experts(held, leaf):
            bucket = jnp.where(held == NO_EXPERT, size, held % size).reshape(-1)
            return jax.ops.segment_sum(leaf.reshape(-1, *leaf.shape[2:]), bucket, num_segments=size + 1)[:-1]

        experts = map_groups(of_experts, groups(deltas[0]), update.held, deltas[0])
        return jax.tree.map(jnp.add, total, (experts, jax.tree.map(lambda leaf: leaf.sum(0), deltas[1])))

    def finish(total: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        experts, shared = total if fixed_point is None else jax.tree.map(fixed_point.decode, total)
        return jax.tree.map(lambda leaf: leaf / holders, experts), jax.tree.map(lambda leaf: leaf / clients, shared)

    law = Law(counted=False, divisors=(float(holders), float(clients)), exact=fixed_point is None)
    return Aggregator(init, add, finish, needs="deltas", fixed=Fixed(float(holders), float(clients)), law=law)


def sent(update: ClientUpdate) -> tuple[PyTree, PyTree]:
    """The clients' deltas (experts, shared) with 0 for what is not sent: experts without tokens, and all of clients without examples."""
    here = update.examples > 0
    sends = here[:, None] & (update.held != NO_EXPERT) & (update.tokens > 0)

    def masked(mask, leaf):
        return jnp.where(mask.reshape(mask.shape + (1,) * (leaf.ndim - mask.ndim)), leaf, 0)

    return map_groups(masked, groups(update.experts), sends, update.experts), jax.tree.map(lambda leaf: masked(here, leaf), update.shared)


def gaussian_noise(*, noise_multiplier: float, feedback_multiplier: float | None = None) -> Transform:
    """Makes an aggregate private [1]: Gaussian noise of noise_multiplier x norm on the sum of clipped updates, of all experts too.

    Goes after `clip` or `adaptive_clip` and whatever compresses, before `fixed_mean`, as in
    `chain(clip(norm=1.0), quantize(bits=8), gaussian_noise(noise_multiplier=1.0), fixed_mean(clients=20.0, holders=5.0))`. The server clips
    what arrives, shared part and experts together, so one client changes the sum by at most the norm; error feedback only delays. What
    is not finite counts as 0.

    Args:
      noise_multiplier: standard deviation of the noise on a sum, as a multiple of the norm; 0 adds none and protects nothing.
      feedback_multiplier: that of the scores from solo evaluation, as a multiple of how far one client's scores can go, see
        `Private.reported`. They need much noise, as no sum hides a client's scores. None withholds them: the aligner then goes
        by load and by chance.

    Raises:
      ValueError: if an argument is out of its range; in `chain`, if something before or after it does not go with it.

    References:
      [1] McMahan, Ramage, Talwar and Zhang, "Learning Differentially Private Recurrent Language Models", ICLR 2018.
    """
    if not 0 <= noise_multiplier < math.inf:
        raise ValueError(f"noise_multiplier is {noise_multiplier}, it must be at least 0")
    if feedback_multiplier is not None and not 0 < feedback_multiplier < math.inf:
        raise ValueError(f"feedback_multiplier is {feedback_multiplier}, it must be above 0, or None")

    def around(bound: Bound | None, aggregator: Aggregator) -> Aggregator:
        if bound is None:
            raise ValueError("chain has gaussian_noise without clip or adaptive_clip, one of them must come before it")
        if aggregator.fixed is None:
            raise ValueError("chain has gaussian_noise before an aggregator that weighs clients by their data, end it in fixed_mean(...)")
        return _private(Private(bound, float(noise_multiplier), feedback_multiplier), aggregator)

    return Transform("gaussian_noise", NOISE, None, lambda wire: wire, around=around)


def update_multiplier(noise_multiplier: float, deviation: float) -> float:
    """z_delta, the noise multiplier of updates that with noise of this deviation on the number of clients costs `noise_multiplier`.

    Raises:
      ValueError: if the number alone costs as much.
    """
    if noise_multiplier and 2 * deviation <= noise_multiplier:
        half = noise_multiplier / 2
        raise ValueError(f"deviation is {deviation}, it must be above {half}, half of noise_multiplier, so that some budget is left")
    return (noise_multiplier**-2 - (2 * deviation) ** -2) ** -0.5 if noise_multiplier else 0.0


def _private(private: Private, inner: Aggregator) -> Aggregator:
    bound, fixed = private.bound, inner.fixed
    adaptive = bound.quantile is not None
    multiplier = update_multiplier(private.noise_multiplier, bound.deviation)

    def init(experts: PyTree, shared: PyTree, norm: Float[Array, ""]) -> tuple[Any, Any, Any]:
        return inner.init(experts, shared), norm, jnp.zeros(())

    def add(total: tuple[Any, Any, Any], update: ClientUpdate) -> tuple[Any, Any, Any]:
        summed, norm, below = total
        deltas = sent(update)
        squares = sum(jnp.square(leaf.astype(jnp.float32)).sum(tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(deltas))
        whole = jnp.sqrt(squares)
        scale = jnp.where(jnp.isfinite(whole), jnp.minimum(1, norm / jnp.maximum(whole, jnp.finfo(jnp.float32).tiny)), 0)

        def scaled(leaf):
            by = scale.reshape(-1, *(1,) * (leaf.ndim - 1))
            return jnp.where(by > 0, leaf * by, 0).astype(leaf.dtype)

        experts, shared = jax.tree.map(scaled, deltas)
        told = jnp.where(update.examples > 0, jnp.where(whole <= norm, 0.5, -0.5), 0.0).sum()
        return inner.add(summed, dataclasses.replace(update, experts=experts, shared=shared)), norm, below + told

    def finish(total: tuple[Any, Any, Any], key: Key[Array, ""]) -> tuple[tuple[PyTree, PyTree], Float[Array, ""]]:
        summed, norm, below = total
        experts, shared = inner.finish(summed)
        size = multiplier * norm
        noisy = (
            _with_noise(stage_key(key, "experts"), experts, size / fixed.holders),
            _with_noise(stage_key(key, "shared"), shared, size / fixed.clients),
        )
        if not adaptive:
            return noisy, norm
        deviation = bound.deviation if private.noise_multiplier else 0.0
        share = 0.5 + (below + deviation * jax.random.normal(stage_key(key, "below"))) / fixed.clients
        return noisy, norm * jnp.exp(-bound.rate * (share - bound.quantile))

    return inner._replace(init=init, add=add, finish=finish, private=private, law=None)


def _with_noise(key: Key[Array, ""], weights: PyTree, deviation: Float[Array, ""]) -> PyTree:
    def one(path, leaf):
        noise = jax.random.normal(stage_key(key, jax.tree_util.keystr(path)), leaf.shape)
        return (leaf + deviation * noise).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, weights)
