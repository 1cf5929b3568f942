"""A router of the global model from statistics of what each expert was sent, in place of averaged router rows.

Rows that clients trained apart tell which of the experts that a client holds suits a token best; averaged they are no router of all
experts. So each client also returns, for every expert that it holds, how many of its tokens of each class went there, the sum of their
features, and the second moments of all of these. With decayed sums of them the server has a Gaussian for each expert and class, those
of an expert of one covariance, and a token, of features x less the mean of all, goes to every expert, by its posterior probability to
the power `TEMPER`:

  log p(expert | x) = logsumexp over classes of (x W[expert, class] + b[expert, class]) - x P[expert] x / 2 + constant.

What is returned tells about a client's labels and features; nothing hides it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from fedmoe_jax.base import NO_EXPERT, Batch, pytree, static
from fedmoe_jax.experts import Partition, Slots, bind, by_group, combine, groups, layers, num_experts

KEPT = 0.9
"""Share of the sums that is kept each round, since features drift as the shared weights do."""
TEMPER = 0.3
"""Power of the posterior, below 1 since features are no Gaussians."""
SHRUNK = 0.5
"""How far the covariance of each expert is drawn to that of all."""
RIDGE = 0.01
"""Added to the covariance of all, as a share of its mean variance."""
_NEVER = -1e9  # log density of what was sent nothing


@pytree
class Statistics:
    """Of one MoE layer: gates of the tokens that each expert was sent, summed by class, and times features and their products.

    `group` is the place of the layer's group of experts among all.
    """

    count: Float[Array, "expert class"]
    total: Float[Array, "expert class feature"]
    second: Float[Array, "expert feature feature"]
    group: int = static()


@pytree
class Posterior:
    """The Gaussians of one layer as quadratic functions of a feature less the mean of all, before `TEMPER`."""

    centre: Float[Array, " feature"]
    precision: Float[Array, "expert feature feature"]
    weight: Float[Array, "expert class feature"]
    bias: Float[Array, "expert class"]

    def logits(self, tokens: Float[Array, "token feature"]) -> Float[Array, "token expert"]:
        """TEMPER * log p(expert | token), but for a constant of each token; lowest for experts that were sent nothing."""
        tokens, exact = tokens.astype(jnp.float32) - self.centre, dict[str, Any](precision="highest")
        scores = jnp.einsum("nd,ecd->nec", tokens, self.weight, **exact) + self.bias
        distance = jnp.einsum("nd,edf,nf->ne", tokens, self.precision, tokens, **exact)
        return TEMPER * (jax.nn.logsumexp(scores, axis=2) - 0.5 * distance)


def observe(
    parts: Partition, experts: PyTree, shared: PyTree, batch: Batch, held: Bool[Array, " all_slots"], prior: Float[Array, " all_slots"]
) -> tuple[Statistics, ...]:
    """Statistics of each MoE layer of one client over its slots, from a batch of its examples.

    Args:
      experts, held, prior: as in `local.primal.train`.

    Raises:
      ValueError: if the model's outputs are not one number a class for each label, or a layer does not say what it saw.
    """
    model = bind(parts, experts, shared, Slots(held, prior, batch.mask, observe=True))
    *each, classes = model(batch.x).shape
    if tuple(each) != batch.y.shape:
        raise ValueError(f"router is 'statistics', but the model's outputs {(*each, classes)} have no classes for labels {batch.y.shape}")
    return tuple(_of_layer(state.get_value(), batch, classes, group) for group, state in layers(model))


def start(parts: Partition, batch: Batch) -> tuple[Statistics, ...]:
    """Nothing seen yet.

    Args:
      batch: the shapes of one.

    Raises:
      ValueError: as `observe`.
    """
    number = len(groups(parts.experts)) * num_experts(parts.experts)
    none = jnp.zeros(number, bool), jnp.zeros(number)
    shapes = jax.eval_shape(lambda batch: observe(parts, parts.experts, parts.shared, batch, *none), batch)
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)


def together(parts: Partition, seen: tuple[Statistics, ...], held: Int[Array, "client all_slots"]) -> tuple[Statistics, ...]:
    """The sum over clients of what each saw with its slots, by expert."""
    number, rows = num_experts(parts.experts), by_group(held, len(groups(parts.experts)))

    def one(layer: Statistics) -> Statistics:
        own = rows[:, layer.group]
        weight = (own != NO_EXPERT).astype(jnp.float32)
        count, total, second = (combine(sums, own, weight, number, (None,)) for sums in (layer.count, layer.total, layer.second))
        return Statistics(count, total, second, layer.group)

    return tuple(map(one, seen))


def decayed(statistics: tuple[Statistics, ...] | None) -> tuple[Statistics, ...] | None:
    """What is left of the server's sums in the next round, to which those of its clients are added."""
    return jax.tree.map(lambda kept: KEPT * kept, statistics)


def posteriors(statistics: tuple[Statistics, ...]) -> tuple[Posterior, ...]:
    """The router of each layer; where nothing was seen yet, one that knows no difference between experts."""
    return tuple(map(_posterior, statistics))


def serve(model: PyTree, routers: Sequence[Posterior]) -> None:
    """Makes the layers of a model of all experts route by `routers`, one a layer."""
    for (_, state), router in zip(layers(model), routers, strict=True):
        state.set_value(dataclasses.replace(state.get_value(), posterior=router))


def report_bytes(statistics: tuple[Statistics, ...], num_groups: int) -> tuple[float, ...]:
    """Bytes that a client returns for each expert of a group that it holds: float32, half of the symmetric products."""

    def of_layer(layer: Statistics) -> float:
        classes, features = layer.count.shape[1], layer.second.shape[-1]
        return 4.0 * classes * (features + 1) + 2.0 * features * (features + 1)

    return tuple(sum(of_layer(layer) for layer in statistics if layer.group == group) for group in range(num_groups))


def _of_layer(slots: Slots, batch: Batch, classes: int, group: int) -> Statistics:
    if slots.seen is None:
        raise ValueError("router is 'statistics', but the model has a MoE layer that does not say what it saw (Slots.observe)")
    tokens, gates = slots.seen
    tokens = tokens.astype(jnp.float32)
    if tokens.shape[0] % batch.y.size:
        raise ValueError(f"router is 'statistics', but labels of shape {batch.y.shape} fit no {tokens.shape[0]} tokens of a layer")
    mask = jnp.broadcast_to(batch.mask.reshape(-1, *(1,) * (batch.y.ndim - 1)), batch.y.shape).reshape(-1)
    label = jnp.where(mask, batch.y.reshape(-1).astype(jnp.int32), -1)
    label = jnp.repeat(label, tokens.shape[0] // label.size, total_repeat_length=tokens.shape[0])
    weight = gates[:, :, None] * jax.nn.one_hot(label, classes)  # [slot, token, class]
    exact: dict[str, Any] = dict(precision="highest")
    total = jnp.einsum("knc,nd->kcd", weight, tokens, **exact)
    second = jnp.einsum("kn,nd,nf->kdf", weight.sum(2), tokens, tokens, **exact)
    return Statistics(weight.sum(1), total, second, group)


def gaussians(
    layer: Statistics,
) -> tuple[Float[Array, " feature"], Float[Array, "expert class feature"], Float[Array, "expert feature feature"]]:
    """The mean of all features, those of each expert and class less that mean, and the covariance of each expert."""
    sent = layer.count > 0
    count = jnp.where(sent, layer.count, 1.0)
    centre = layer.total.sum((0, 1)) / jnp.where(sent.any(), layer.count.sum(), 1.0)
    mean = layer.total / count[..., None]
    of_expert = jnp.where(sent.any(1), layer.count.sum(1), 1.0)[:, None, None]
    scatter = layer.second - jnp.einsum("ec,ecd,ecf->edf", layer.count, mean, mean, precision="highest")
    pooled = scatter.sum(0) / jnp.where(sent.any(), layer.count.sum(), 1.0)
    features = pooled.shape[0]
    pooled += RIDGE * jnp.maximum(jnp.trace(pooled) / features, 1e-6) * jnp.eye(features)
    covariance = SHRUNK * pooled + (1 - SHRUNK) * scatter / of_expert
    return centre, mean - centre, covariance


def _posterior(layer: Statistics) -> Posterior:
    sent = layer.count > 0
    count = jnp.where(sent, layer.count, 1.0)
    centre, mean, covariance = gaussians(layer)
    precision, volume = jax.lax.map(_inverted, covariance)
    weight = jnp.einsum("ecd,edf->ecf", mean, precision, precision="highest")
    bias = jnp.log(count) - 0.5 * (weight * mean).sum(2) - 0.5 * volume[:, None]
    return Posterior(centre, precision, weight, jnp.where(sent, bias, _NEVER))


def _inverted(covariance: Float[Array, "feature feature"]) -> tuple[Float[Array, "feature feature"], Float[Array, ""]]:
    """The inverse and the log determinant of one matrix.

    One at a time: two batches of matrices at once can wait for each other's threads for ever, in LAPACK's wrappers of jaxlib 0.10.
    """
    return jnp.linalg.inv(covariance), jnp.linalg.slogdet(covariance)[1]
