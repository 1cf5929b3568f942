"""A bound on how much one client can change: its whole update is scaled down to a norm."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from fedmoe_jax.aggregation.chain import Message, Transform
from fedmoe_jax.aggregation.robust import norms
from fedmoe_jax.base import NO_EXPERT, ClientUpdate
from fedmoe_jax.experts import map_groups
from fedmoe_jax.kernels import is_dual
from fedmoe_jax.norms import frobenius

CLIP = 10
"""Place in a chain: before what compresses."""


class Bound(NamedTuple):
    """The norm to which updates are clipped: for good, or at first, where it follows a `quantile` of theirs, see `adaptive_clip`."""

    norm: float
    quantile: float | None = None
    rate: float = 0.0
    deviation: float = math.inf


def clip(*, norm: float) -> Transform:
    """Scales a client's update, shared part and experts together, down to a Euclidean norm of at most `norm`.

    Experts that got no token, and router rows that stay on the client, are not sent and do not count. Where a later transform has error
    feedback, what a client kept earlier comes on top of the clipped update. Where the chain has `gaussian_noise`, the server clips what
    arrives once more, to the same norm. The norm is as exact as float32; an update whose norm is no number of that type counts as zero.

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

    def factor(update: ClientUpdate, sends: Bool[Array, "client slot"], names: tuple[str | None, ...]) -> Float[Array, " client"]:
        whole = _norms(update, sends, names)
        return jnp.where(whole <= norm, 1.0, jnp.where(whole < jnp.inf, norm / whole, 0.0))

    return Transform("clip", CLIP, apply, lambda wire: wire, bound=Bound(float(norm)), factor=factor)


def _norms(update: ClientUpdate, sends: Bool[Array, "client slot"], names: tuple[str | None, ...]) -> Float[Array, " client"]:
    """The norm of each client's update: of the shared part and of the experts in the slots that it sends."""

    def of_slots(rows, delta):
        sends, held = rows
        if is_dual(delta):
            number = delta.base.shape[0]
            each = frobenius(delta, jnp.where(held == NO_EXPERT, number, held % number))
        else:
            each = norms(delta.reshape(sends.size, -1).astype(jnp.float32)).reshape(sends.shape)
        return norms(jnp.where(sends, each, 0))

    def of_shared(delta):
        return frobenius(delta) if is_dual(delta) else norms(delta.reshape(len(sends), -1).astype(jnp.float32))

    experts = map_groups(of_slots, names, (sends, update.held), update.experts)
    shared = jax.tree.map(of_shared, update.shared, is_leaf=is_dual)
    return norms(jnp.stack([*jax.tree.leaves(experts), *jax.tree.leaves(shared)], axis=1))


def adaptive_clip(*, norm: float, deviation: float, quantile: float = 0.5, rate: float = 0.2) -> Transform:
    """As `clip`, but the norm C follows a quantile of the clients' norms [1]. It goes with `gaussian_noise` only.

    After a round C <- C exp(-rate (b - quantile)), where b is the share of `fixed_mean`'s clients whose update had a norm of at most C,
    with Gaussian noise on their number. What clients return for it are -1/2 and 1/2, so that a client changes the sum by at most 1/2;
    absent ones count as half a client. What arrives is clipped, after compression.

    The noise on the number is part of `gaussian_noise`'s noise_multiplier z: that on updates is z_delta C, where
    z_delta = (z^-2 - (2 deviation)^-2)^(-1/2), so that both together cost what z alone would ([1], theorem 1).

    Args:
      norm: C of the first round, above 0.
      deviation: of the noise on the number of clients, above 0; [1] takes a twentieth of the cohort.
      quantile: of the norms, from 0 to 1.
      rate: how fast C moves, above 0.

    Raises:
      ValueError: if an argument is out of its range.

    References:
      [1] Andrew, Thakkar, McMahan and Ramaswamy, "Differentially Private Learning with Adaptive Clipping", NeurIPS 2021.
    """
    for name, value in {"norm": norm, "deviation": deviation, "rate": rate}.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}, it must be above 0")
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile is {quantile}, it must be from 0 to 1")
    bound = Bound(float(norm), float(quantile), float(rate), float(deviation))
    return Transform("adaptive_clip", CLIP, None, lambda wire: wire, bound=bound)
