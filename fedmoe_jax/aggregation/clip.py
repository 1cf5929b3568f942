"""A bound on how much one client can change: its whole update is scaled down to a norm."""

import math
from typing import Any

import jax.numpy as jnp

from fedmoe_jax.aggregation.chain import Message, Transform
from fedmoe_jax.aggregation.robust import norms

CLIP = 10
"""Place in a chain: before what compresses."""


def clip(*, norm: float) -> Transform:
    """Scales a client's update, shared part and experts together, down to a Euclidean norm of at most `norm`.

    Experts that got no token, and router rows that stay on the client, are not sent and do not count. Where a later transform has error
    feedback, what a client kept earlier comes on top of the clipped update.

    Args:
      norm: above 0.

    Raises:
      ValueError: if `norm` is out of its range.
    """
    if not 0 < norm < math.inf:
        raise ValueError(f"norm is {norm}, it must be above 0")

    def apply(keys: Any, messages: Any) -> Any:
        every = [message.values.reshape(-1).astype(jnp.float32) for part in messages for message in part]
        whole = norms(jnp.concatenate(every)[None])[0]
        scale = jnp.where(whole > norm, norm / whole, 1.0)

        def scaled(message: Message) -> Message:
            return Message((message.values * scale).astype(message.values.dtype), message.index)

        return tuple([scaled(message) for message in part] for part in messages)

    return Transform("clip", CLIP, apply, lambda wire: wire)
