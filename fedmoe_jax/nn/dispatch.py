"""Which token goes to which row of which expert: layouts, and the inverse pair dispatch / combine.

Each token makes k choices of a slot. A layout lays the chosen (choice, token) pairs out in tiles, each tile being rows
of one slot, so that the expert's product is a batched matmul. Shapes are fixed by the number of tokens, choices and
slots; rows that no pair fills are zero. Derivatives are those of reverse mode only (`jax.grad`, not `jax.jvp`).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from fedmoe_jax.base import pytree

MIN_TILE = 32
"""Rows of the smallest tile: with fewer, copying its expert's weights costs more than the product."""


@pytree
class Layout:
    """Tiles of rows. `pair` is the flat (choice, token) pair in each row where `filled`, `row` the flat row of each pair where `kept`."""

    expert: Int[Array, " tile"]
    pair: Int[Array, "tile row"]
    filled: Bool[Array, "tile row"]
    row: Int[Array, "choice token"]
    kept: Bool[Array, "choice token"]


def tile_size(pairs: int, slots: int) -> int:
    """Rows of a tile: a power of two, so small that the last tile of each slot wastes at most about half of `pairs` rows."""
    size = max(MIN_TILE, pairs // (2 * slots))
    return 1 << (size.bit_length() - 1)


def num_tiles(pairs: int, slots: int, size: int) -> int:
    """Tiles that suffice for `pairs` pairs, however they are spread over the slots."""
    return -(-pairs // size) + slots


def tiled_rows(pairs: int, slots: int) -> int:
    """Rows that the tiled layout computes, filled or not."""
    size = tile_size(pairs, slots)
    return size * num_tiles(pairs, slots, size)


def tiled(slot: Int[Array, "choice token"], active: Bool[Array, "choice token"], slots: int) -> Layout:
    """Dropless: each slot gets as many tiles as it needs.

    Args:
      slot: the chosen slot of each pair, 0 to slots - 1.
      active: pairs that are to be computed.
      slots: number of slots.
    """
    size = tile_size(slot.size, slots)
    tiles = num_tiles(slot.size, slots, size)
    counts = _counts(slot, active, slots)
    last = jnp.cumsum(-(-counts // size))
    first = last - -(-counts // size)
    expert = jnp.minimum((last <= jnp.arange(tiles)[:, None]).sum(1), slots - 1)
    return _lay_out(slot, active, counts, expert, first, size, slot.size)


def limited(slot: Int[Array, "choice token"], active: Bool[Array, "choice token"], slots: int, limit: int) -> Layout:
    """At most `limit` pairs a slot; the surplus is dropped.

    First choices are served before second ones; among equal choices, earlier tokens before later ones.
    """
    each = jnp.arange(slots)
    return _lay_out(slot, active, _counts(slot, active, slots), each, each, limit, limit)


def dispatch(x: Float[Array, "token feature"], layout: Layout) -> Float[Array, "tile row feature"]:
    """The tokens in their rows; zeros in rows that are not filled."""
    return _fill(x, layout)


def combine(rows: Float[Array, "tile row feature"], gates: Float[Array, "choice token"], layout: Layout) -> Float[Array, "token feature"]:
    """The inverse of `dispatch`: each token gets the sum of its rows, times `gates`. Pairs not kept give zero."""
    return (_collect(rows, layout) * gates[..., None].astype(rows.dtype)).sum(0)


def _rows_of(x, layout):
    token = layout.pair % layout.kept.shape[1]
    return jnp.where(layout.filled[..., None], x[token], 0)


def _pairs_of(rows, layout):
    return jnp.where(layout.kept[..., None], rows.reshape(-1, rows.shape[-1])[layout.row], 0)


@jax.custom_vjp
def _fill(x: Float[Array, "token feature"], layout: Layout) -> Float[Array, "tile row feature"]:
    """The gradient of a gather is a scatter, but each pair has one row at most, so that it can be a gather as well."""
    return _rows_of(x, layout)


_fill.defvjp(lambda x, layout: (_rows_of(x, layout), layout), lambda layout, g: (_pairs_of(g, layout).sum(0), None))


@jax.custom_vjp
def _collect(rows: Float[Array, "tile row feature"], layout: Layout) -> Float[Array, "choice token feature"]:
    """The rows of all pairs, zeros for those not kept."""
    return _pairs_of(rows, layout)


def _collect_backwards(layout, g):
    flat = g.reshape(-1, g.shape[-1])
    return jnp.where(layout.filled[..., None], flat[layout.pair], 0), None


_collect.defvjp(lambda rows, layout: (_pairs_of(rows, layout), layout), _collect_backwards)


def _counts(slot, active, slots):
    return ((slot[..., None] == jnp.arange(slots)) & active[..., None]).sum((0, 1), dtype=jnp.int32)


def _lay_out(slot, active, counts, expert, first, size, limit):
    """Tile t holds `size` rows of slot `expert[t]`, whose tiles begin at `first`. A slot's pairs beyond `limit` are dropped.

    Without the barrier XLA computes all of it again for every element that is gathered by it.
    """
    slots, tiles = len(counts), len(expert)
    flat = jnp.where(active, slot, slots).reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    start = jnp.cumsum(counts) - counts
    place = jnp.arange(flat.size, dtype=jnp.int32)
    rank = jnp.zeros_like(place).at[order].set(place, unique_indices=True) - start[jnp.minimum(flat, slots - 1)]
    row = first[jnp.minimum(flat, slots - 1)] * size + rank
    # The ranks of a slot's rows go on through its tiles; `counts` ends them, so surplus tiles stay empty.
    rank_of_row = (jnp.arange(tiles) - first[expert])[:, None] * size + jnp.arange(size)
    filled = rank_of_row < counts[expert][:, None]
    pair = order[jnp.where(filled, start[expert][:, None] + rank_of_row, 0)]
    kept = active & (rank < limit).reshape(slot.shape)
    row = jnp.where(kept, row.reshape(slot.shape), 0)
    return lax.optimization_barrier(Layout(expert, pair, filled, row, kept))
