"""Loss functions of the form loss_fn(model, batch, key) -> (loss[example], metrics[example])."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Shaped

from fedmoe_jax.base import Batch, LossFn, stage_key

IGNORE = -1
"""A label that counts neither for the loss nor for the accuracy, such as padding of a text."""


def cross_entropy(model: Any, batch: Batch, key: Key[Array, ""]) -> tuple[Float[Array, " example"], dict[str, Float[Array, " example"]]]:
    """Cross-entropy of class logits, computed in float32; an example's loss is the mean over its positions.

    Args:
      model: model(x) -> logits [example, ..., class].
      batch: y [example, ...], integers from 0 to class - 1, or `IGNORE`. An example all of whose labels are ignored has
        the loss 0.
      key: not used.

    Returns:
      The loss of each example in nats, and {"correct": share of its positions where the largest logit is right}.
    """
    logits = model(batch.x).astype(jnp.float32)
    y = batch.y.astype(jnp.int32)
    counted = y != IGNORE
    wanted = jnp.maximum(y, 0)[..., None] == jnp.arange(logits.shape[-1])  # the gradient of an index would be a scatter
    loss = -jnp.where(wanted, jax.nn.log_softmax(logits), 0.0).sum(-1)
    loss = jnp.where(y < logits.shape[-1], loss, jnp.nan)

    def mean(values):
        values, weight = (v.reshape(v.shape[0], -1) for v in (jnp.where(counted, values, 0), counted))
        return values.sum(1) / jnp.maximum(weight.sum(1), 1)

    return mean(loss), {"correct": mean((logits.argmax(-1) == y).astype(jnp.float32))}


def balanced_softmax(model: Any, batch: Batch, key: Key[Array, ""]) -> tuple[Float[Array, " example"], dict[str, Float[Array, " example"]]]:
    """`cross_entropy` of logits to which the client's label prior is added [1], so that the model need not learn it.

    Raises:
      ValueError: if the population knows no label priors.

    References:
      [1] Ren et al., "Balanced Meta-Softmax for Long-Tailed Visual Recognition", NeurIPS 2020, equation 3; for clients: Zhang et al.,
          "Federated Learning with Label Distribution Skew via Logits Calibration", ICML 2022.
    """
    prior = batch.label_prior
    if prior is None:
        raise ValueError("batch.label_prior is None: balanced_softmax needs Population.from_arrays(..., label_prior=...)")
    return cross_entropy(lambda x: model(x) + prior, batch, key)


def augmented(loss_fn: LossFn) -> LossFn:
    """A loss of images that are changed at random [1], see `augment`; for training, of which solo evaluation is part.

    References:
      [1] He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2.
    """

    def loss(model: Any, batch: Batch, key: Key[Array, ""]) -> tuple[Float[Array, " example"], dict[str, Array]]:
        return loss_fn(model, dataclasses.replace(batch, x=augment(stage_key(key, "augment"), batch.x)), key)

    return loss


def augment(key: Key[Array, ""], x: Shaped[Array, "example *shape"]) -> Shaped[Array, "example *shape"]:
    """Images [example, height, width] or [..., channel], each mirrored with a chance of a half and shifted by up to an eighth of its size.

    Zeros come in where an image is shifted away.

    Raises:
      ValueError: if `x` are no images.
    """
    if x.ndim not in (3, 4):
        raise ValueError(f"x has shape {x.shape}, only images [example, height, width] with or without channels can be augmented")
    margin = x.shape[1] // 8, x.shape[2] // 8
    padded = jnp.pad(x, ((0, 0), *((m, m) for m in margin), *((0, 0),) * (x.ndim - 3)))
    mirror, *shift = jax.random.split(key, 3)
    starts = [jax.random.randint(k, (len(x),), 0, 2 * m + 1) for k, m in zip(shift, margin, strict=True)]

    def one(image, mirrored, *start):
        image = jax.lax.dynamic_slice(image, (*start, *(0,) * (x.ndim - 3)), x.shape[1:])
        return jnp.where(mirrored, image[:, ::-1], image)

    # Else XLA looks up each image anew for each of the nine shifts of a convolution.
    return jax.lax.optimization_barrier(jax.vmap(one)(padded, jax.random.bernoulli(mirror, shape=(len(x),)), *starts))
