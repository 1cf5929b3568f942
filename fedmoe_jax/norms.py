"""Norms of what clients added to kernels, from the rows that it is made of, and multiples of it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from fedmoe_jax.kernels import DualDelta, History, gram, is_dual, is_places, joined, times


def frobenius(delta: DualDelta, held: Int[Array, "client slot"] | None = None) -> Float[Array, "client *slot"]:
    """The Frobenius norm of what each client added to a shared kernel, or to that of each slot, from Gram matrices of its rows.

    Where rows cancel, it is off by as much as float32 rounds their sums, and what is less than 1e-6 may count as zero. Where squares are
    no numbers of float32, it is found anew from rows over powers of two; where the norm itself is none, it is infinite or NaN.

    Args:
      held: the expert in each slot, the number of experts where it has none, which counts as zero; None for a shared kernel.
    """
    plain = _norm(delta, held, lambda values: (values.astype(jnp.float32), jnp.zeros(len(values), jnp.int32)))
    return lax.cond(jnp.isfinite(plain).all(), lambda: plain, lambda: _norm(delta, held, _even))


def _norm(delta, held, even) -> Float[Array, "client *slot"]:
    """`frobenius`, even(values) -> (values over powers of two, one for each client, and which these are)."""
    rows = delta.history[0] if len(delta.history) == 1 else joined(delta.history)
    inputs, of_inputs = (rows.inputs, 0) if is_places(rows.inputs) else even(rows.inputs)
    gradients, of_gradients = even(rows.gradients.astype(jnp.float32) * rows.weight[:, None, :, None])
    base, of_base = even(delta.base[None])

    def along():
        """The product of base and what was added to it."""
        return _of_slots((_based(inputs, base[0], held, rows.slot) * gradients).sum(-1), rows, held)

    with jax.default_matmul_precision("highest"):
        pairs = jax.vmap(gram)(inputs, inputs) * jax.vmap(gram)(gradients, gradients)
        if held is not None and rows.slot is not None:
            whose = _whose(rows, held)
            product = jnp.einsum("cns,cnm,cms->cs", whose, pairs[:, 0], whose)
        else:
            product = _of_slots(pairs.sum(-1), rows, held)
        product = jnp.maximum(product, 0)
        straight = lax.cond((delta.shrink != 0).any(), along, lambda: jnp.zeros_like(product))  # with weight decay or prox
    whole = jnp.square(base[0].astype(jnp.float32)).sum((-2, -1))
    whole = whole if held is None else jnp.append(whole, 0)[held]
    made, shrunk = jnp.ldexp(1.0, of_inputs + of_gradients), delta.shrink * jnp.ldexp(1.0, of_base)
    unit = jnp.maximum(jnp.maximum(made, jnp.abs(shrunk)), jnp.finfo(jnp.float32).tiny)
    made, shrunk, unit = (a.reshape(-1, *(1,) * (product.ndim - 1)) for a in (made / unit, shrunk / unit, unit))
    return unit * jnp.sqrt(jnp.maximum(made**2 * product + 2 * made * shrunk * straight + shrunk**2 * whole, 0))


def scaled(delta: Any, factor: Float[Array, " client"]) -> Any:
    """Factor times what each client added: an array [client, ...] or a `DualDelta`."""
    if not is_dual(delta):
        return (delta * factor.reshape(-1, *(1,) * (delta.ndim - 1))).astype(delta.dtype)
    history = tuple(dataclasses.replace(rows, weight=rows.weight * factor[:, None]) for rows in delta.history)
    return dataclasses.replace(delta, history=history, shrink=delta.shrink * factor)


def _even(values: Float[Array, "client *axes"]) -> tuple[Float[Array, "client *axes"], Int[Array, " client"]]:
    """The values over a power of two that is at most the largest of each client, in float32, and which power that is."""
    values = values.astype(jnp.float32)
    _, power = jnp.frexp(jnp.abs(values).max(axis=range(1, values.ndim)))
    return jnp.ldexp(values, -power.reshape(-1, *(1,) * (values.ndim - 1))), power


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
