"""Loss functions of the form loss_fn(model, batch, key) -> (loss[example], metrics[example])."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from fedmoe_jax.base import Batch

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
    loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(y, 0)[..., None], -1)[..., 0]

    def mean(values):
        values, weight = (v.reshape(v.shape[0], -1) for v in (jnp.where(counted, values, 0), counted))
        return values.sum(1) / jnp.maximum(weight.sum(1), 1)

    return mean(loss), {"correct": mean((logits.argmax(-1) == y).astype(jnp.float32))}
