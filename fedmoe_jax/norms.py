"""Norms of what clients added to kernels, from the rows that it is made of, and multiples of it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from fedmoe_jax.kernels import DualDelta, History, gram, is_dual, is_places, joined, times


def squared_norm(delta: DualDelta, held: Int[Array, "client slot"] | None = None) -> Float[Array, "client *slot"]:
    """The squared Frobenius norm of what each client added to a shared kernel, or to that of each slot, from Gram matrices of its rows.

    Args:
      held: the expert in each slot, its number if empty being that of the experts; None for a shared kernel.
    """
    rows = _in_one(delta.history)
    inputs = rows.inputs if is_places(rows.inputs) else rows.inputs.astype(jnp.float32)
    gradients = rows.gradients.astype(jnp.float32) * rows.weight[:, None, :, None]

    def along():
        """The product of base and what was added to it."""
        return _of_slots((_based(inputs, delta.base, held, rows.slot) * gradients).sum(-1), rows, held)

    with jax.default_matmul_precision("highest"):
        pairs = jax.vmap(gram)(inputs, inputs) * jax.vmap(gram)(gradients, gradients)
        if held is not None and rows.slot is not None:
            whose = _whose(rows, held)
            product = jnp.einsum("cns,cnm,cms->cs", whose, pairs[:, 0], whose)
        else:
            product = _of_slots(pairs.sum(-1), rows, held)
        product = jnp.maximum(product, 0)
        straight = lax.cond((delta.shrink != 0).any(), along, lambda: jnp.zeros_like(product))  # with weight decay or prox
    shrink = delta.shrink.reshape(-1, *(1,) * (product.ndim - 1))
    whole = jnp.square(delta.base.astype(jnp.float32)).sum((-2, -1))
    whole = whole if held is None else jnp.append(whole, 0)[held]
    return jnp.maximum(product + 2 * shrink * straight + shrink**2 * whole, 0)


def scaled(delta: Any, factor: Float[Array, " client"]) -> Any:
    """Factor times what each client added: an array [client, ...] or a `DualDelta`."""
    if not is_dual(delta):
        return (delta * factor.reshape(-1, *(1,) * (delta.ndim - 1))).astype(delta.dtype)
    history = tuple(dataclasses.replace(rows, weight=rows.weight * factor[:, None]) for rows in delta.history)
    return dataclasses.replace(delta, history=history, shrink=delta.shrink * factor)


def _in_one(history: tuple[History, ...]) -> History:
    """All rows: tiles of all steps in one lane, others side by side in theirs."""
    return history[0] if len(history) == 1 else joined(history)


def _whose(rows: History, held) -> Float[Array, "client row slot"]:
    slot = jnp.asarray(rows.slot)
    return jax.nn.one_hot(jnp.repeat(slot, rows.weight.shape[1] // slot.shape[1], axis=1), held.shape[1])


def _of_slots(values: Float[Array, "client lane row"], rows: History, held) -> Float[Array, "client *slot"]:
    """Sums over the rows of each slot, or of all."""
    if held is None:
        return values[:, 0].sum(-1)
    return values.sum(-1) if rows.slot is None else jnp.einsum("cn,cns->cs", values[:, 0], _whose(rows, held))


def _based(inputs, base, held, slot) -> Float[Array, "client lane row hidden"]:
    """The rows times the base of their kernel."""
    if held is None:
        return times(inputs, base, None)
    index = held if slot is None else jnp.take_along_axis(held, slot, axis=1)
    y = times(inputs.reshape(index.size, -1, inputs.shape[-1]), base, index.reshape(-1))
    return y.reshape(*inputs.shape[:3], y.shape[-1])
