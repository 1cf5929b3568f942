"""The router: which held experts each token goes to, with which gates, and what keeps it balanced."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fedmoe_jax.base import pytree

_MASKED = -1e30  # finite, so that a softmax over no held expert at all is not NaN


@pytree
class Routing:
    """The choices of each token, best first. `gate` is 0 and `active` False for choices that fall on no held expert."""

    slot: Int[Array, "choice token"]
    gate: Float[Array, "choice token"]
    active: Bool[Array, "choice token"]
    probability: Float[Array, "token slot"]


def route(
    logits: Float[Array, "token slot"], held: Bool[Array, " slot"], real: Bool[Array, " token"], *, top_k: int, renormalize: bool = True
) -> Routing:
    """Sends each real token to the `top_k` held experts with the largest logits.

    Gates are the probabilities of the chosen experts, renormalised to sum 1 as in Mixtral (or left as they are). A
    renormalised single choice has the gate 1, which tells the router nothing, so its gradient is that of
    log(probability): the gate is p / stop_gradient(p).

    Args:
      logits: float32.
      held: slots that may be chosen. With fewer than `top_k` of them, surplus choices get the gate 0.
      real: tokens that are not padding; the others go nowhere.
      top_k: choices a token; at most the number of slots are made.
      renormalize: whether the gates of a token's choices sum to 1.
    """
    logits = jnp.where(held, logits, _MASKED)
    probability = jnp.where(held, jax.nn.softmax(logits), 0)
    _, slot = jax.lax.top_k(jax.lax.stop_gradient(logits), min(top_k, held.shape[0]))
    chosen = jnp.take_along_axis(probability, slot, -1)
    active = held[slot] & real[:, None]
    if not renormalize:
        gate = chosen
    elif slot.shape[1] == 1:
        gate = chosen / jax.lax.stop_gradient(jnp.where(active, chosen, 1))
    else:
        gate = jax.nn.softmax(jnp.take_along_axis(logits, slot, -1))
    return Routing(slot.T, jnp.where(active, gate, 0).T, active.T, probability)


def balance_loss(routing: Routing, held: Bool[Array, " slot"], real: Bool[Array, " token"]) -> Float[Array, ""]:
    """(number held) * sum_e f_e P_e over held experts: 1 when balanced, 0 when nothing is held.

    f_e is the share of all choices that fall on expert e, P_e the mean of its probability over real tokens. With
    top_k = 1 it is equation 4 of Fedus et al., "Switch Transformers", 2022.
    """
    choices = _per_slot(routing.slot, routing.active, held.shape[0]).sum(0)
    share = choices / jnp.maximum(choices.sum(), 1)
    probability = jnp.where(real[:, None], routing.probability, 0).sum(0) / jnp.maximum(real.sum(), 1)
    return held.sum() * (share * probability).sum()


def z_loss(logits: Float[Array, "token slot"], held: Bool[Array, " slot"], real: Bool[Array, " token"]) -> Float[Array, ""]:
    """Mean over real tokens of the squared log-sum-exp of the held logits (Zoph et al., "ST-MoE", 2022, equation 5).

    0 when nothing is held.
    """
    total = jax.nn.logsumexp(jnp.where(held, logits, _MASKED), axis=-1)
    total = jnp.where(real & held.any(), total, 0)
    return (total**2).sum() / jnp.maximum(real.sum(), 1)


def tokens_per_example(
    slot: Int[Array, "choice token"], sent: Bool[Array, "choice token"], slots: int, examples: int
) -> Float[Array, "example slot"]:
    """How many tokens of each example were sent to each slot; tokens are ordered by example."""
    counts = _per_slot(slot, sent, slots)
    return counts.reshape(examples, counts.shape[0] // max(examples, 1), slots).sum(1)


def dense_gates(routing: Routing, slots: int) -> Float[Array, "slot token"]:
    """The gates as a matrix: 0 where a token did not choose the slot."""
    chosen = routing.slot[:, None, :] == jnp.arange(slots)[:, None]
    return jnp.where(chosen, routing.gate[:, None, :], 0).sum(0)


def _per_slot(slot, sent, slots):
    """Float[token, slot]: 1 where the token was sent."""
    return ((slot[..., None] == jnp.arange(slots)) & sent[..., None]).sum(0).astype(jnp.float32)
