"""Products of many groups of rows with the weights of an expert each, and sums over the groups of each expert, on Hopper GPUs.

Kernels of our own read rows where they are, by a list that is sorted by expert: nothing is copied or padded, however unevenly
groups are spread, and what a history adds to a product is added before that is written.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas
from jaxtyping import Array, Float, Int

from fedmoe_jax import gpu
from fedmoe_jax.base import pytree

_DEPTHS = 64, 32, 16  # of what is multiplied at once: the first that divides all
_WIDTHS = 256, 128, 64  # of a tile of outputs, likewise
_FEW = 64  # rows of a group, up to which a tile of outputs with parts is a small one
_PROGRAMS = 128  # about as many as a GPU has processors
_STAGES = 3  # of loads that are under way


@pytree
class Part:
    """What some rows of the history add to a product: mix @ values, for each group."""

    mix: Float[Array, "group row other"]
    values: Float[Array, "group other hidden"]


class Tile(NamedTuple):
    """Rows and columns of outputs that one program makes, and how much it multiplies at once."""

    height: int
    width: int
    depth: int

    @property
    def warps(self) -> int:
        """Of a program."""
        return 8 if self.width == _WIDTHS[0] else 4


def has_matmul(x: Float[Array, "group row feature"], base: Float[Array, "expert feature hidden"]) -> bool:
    """Whether `matmul` takes them: 16 bits, and widths that tiles divide."""
    return _fits(x, base.shape[-1], x.size, base.size, x.size // x.shape[-1] * base.shape[-1])


def takes(parts: Sequence[Part]) -> bool:
    """Whether `matmul` adds these parts: as many rows as a power of two, of at least 16, and a multiple of 16 others."""
    sizes = [part.mix.shape[1:] for part in parts]
    return all(rows >= 16 and rows & (rows - 1) == 0 and others % 16 == 0 for rows, others in sizes)


def has_outer(pairs: Sequence[tuple[Array, Array]], num_experts: int) -> bool:
    """Whether `outer` takes them, all of as many rows, and they are work enough for a GPU."""
    x, y = pairs[0]
    programs = num_experts * x.shape[-1] * y.shape[-1] // _WIDTHS[1] ** 2
    alike = len({inputs.shape for inputs, _ in pairs}) == 1 and x.shape[-1] % _WIDTHS[-1] == 0
    return alike and programs >= _PROGRAMS and _fits(x, y.shape[-1], x.size, y.size)


def _fits(x, hidden, *sizes):
    divided = x.shape[-1] % _DEPTHS[-1] == 0 and hidden % _WIDTHS[-1] == 0
    return gpu.is_hopper() and jnp.dtype(x.dtype).itemsize == 2 and divided and max(sizes) < 2**31  # places are of 32 bits


def matmul(
    x: Float[Array, "group row feature"],
    base: Float[Array, "expert feature hidden"],
    index: Int[Array, " group"],
    scale: Float[Array, " group"],
    parts: Sequence[Part] = (),
    *,
    interpret: bool = False,
) -> Float[Array, "group row hidden"]:
    """scale[g] * x[g] @ base[index[g]], 0 where that is no expert, and the sum of all parts, all added up in float32.

    `interpret` runs it anywhere, slowly.
    """
    (groups, rows, features), (experts, _, hidden) = x.shape, base.shape
    tile = _tile(rows, features, hidden, parts)
    source, expert = _tiles(index, experts, rows, tile.height)
    columns = hidden // tile.width

    def expert_gemm(x, base, source, expert, scale, *others):
        *factors, out = others
        here, column = pallas.program_id(0) // columns, pallas.program_id(0) % columns * tile.width
        across, own = pallas.ds(column, tile.width), expert[here]

        @pallas.when(own <= experts)
        def _():
            place = source[here, :]
            row = jnp.minimum(place, groups * rows - 1)

            def product(step, total):
                along = pallas.ds(step * tile.depth, tile.depth)
                return total + _dot(x[row, along], base[jnp.minimum(own, experts - 1), along, across])

            steps = (own < experts).astype(jnp.int32) * (features // tile.depth)
            total = lax.fori_loop(0, steps, product, jnp.zeros((tile.height, tile.width), jnp.float32))
            total *= scale[row // rows][:, None]
            for mix, values in zip(factors[::2], factors[1::2], strict=True):
                total = _with_part(total, mix, values, source, here, across, rows)
            gpu.store(out, place[:, None] * hidden + column + jnp.arange(tile.width), place[:, None] < groups * rows, total)

    given = [x.reshape(-1, features), base, source, expert, scale]
    for part in parts:
        given += [part.mix.reshape(groups * rows, -1), part.values.reshape(-1, hidden)]
    out = jax.ShapeDtypeStruct((groups * rows * hidden,), x.dtype)
    call = gpu.call(expert_gemm, out, warps=tile.warps, stages=_STAGES, interpret=interpret, **_whole(expert.size * columns, given, out))
    return call(*given).reshape(groups, rows, hidden)


def _with_part(total, mix, values, source, here, across, rows):
    """The part of each group that has rows in the tile: of the product of all of these with its values, which may be NaN, its own rows."""
    height, (all_rows, others) = total.shape[0], mix.shape
    depth = next(depth for depth in _DEPTHS if others % depth == 0)
    row, of = jnp.minimum(source[here, :], all_rows - 1), jnp.arange(height)[:, None] // rows

    def added(step, total):
        mixed = mix[row, pallas.ds(step * depth, depth)]
        for group in range(-(-height // rows)):
            first = jnp.minimum(source[here, group * rows], all_rows - 1) // rows * others + step * depth
            found = _dot(mixed, values[pallas.ds(first, depth), across])
            total += found if height <= rows else jnp.where(of == group, found, 0.0)
        return total

    return lax.fori_loop(0, others // depth, added, total)


def outer(
    pairs: Sequence[tuple[Float[Array, "group row feature"], Float[Array, "group row hidden"]]],
    index: Int[Array, " group"],
    num_experts: int,
    *,
    interpret: bool = False,
) -> Float[Array, "expert feature hidden"]:
    """For each expert the sum of x[g]^T y[g] over its groups and all pairs, in float32. Groups without an expert are left out."""
    (_, rows, features), hidden = pairs[0][0].shape, pairs[0][1].shape[-1]
    down, across = (next(width for width in _WIDTHS[1:] if size % width == 0) for size in (features, hidden))
    depth, tiles = _DEPTHS[0], (features // down, hidden // across)
    source, start, counts = _sorted(index, num_experts, rows)

    def outer_gemm(source, start, counts, *others):
        *factors, out = others
        place = pallas.program_id(0)
        expert, own = place // (tiles[0] * tiles[1]), pallas.ds(place % tiles[1] * across, across)
        first = place // tiles[1] % tiles[0] * down
        total = jnp.zeros((down, across), jnp.float32)
        for x, y in zip(factors[::2], factors[1::2], strict=True):

            def product(step, total, x=x, y=y):
                rank = step * depth + jnp.arange(depth)
                there = rank < counts[expert]
                row = source[jnp.where(there, start[expert] + rank, 0)]
                mine = gpu.load(x, row[:, None] * features + first + jnp.arange(down), there[:, None])
                return total + _dot(mine, y[row, own], turned=True)

            total = lax.fori_loop(0, pallas.cdiv(counts[expert], depth), product, total)
        out[expert, pallas.ds(first, down), own] = total

    given = [source, start, counts]
    for x, y in pairs:
        given += [x.reshape(-1), y.reshape(-1, hidden)]
    out = jax.ShapeDtypeStruct((num_experts, features, hidden), jnp.float32)
    call = gpu.call(outer_gemm, out, warps=4, stages=_STAGES, interpret=interpret, **_whole(num_experts * tiles[0] * tiles[1], given, out))
    return call(*given)


def _dot(a, b, turned: bool = False):
    """a @ b, or a^T @ b."""
    return lax.dot_general(a, b, (((0 if turned else 1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _tile(rows: int, features: int, hidden: int, parts: Sequence[Part]) -> Tile:
    """Large ones read less; with parts of few rows smaller ones, as all that a tile holds is multiplied with each group's values."""
    height, most = (_FEW, _WIDTHS[1]) if parts and rows <= _FEW else (2 * _FEW, _WIDTHS[0])
    width = next(width for width in _WIDTHS if width <= most and hidden % width == 0)
    return Tile(height, width, next(depth for depth in _DEPTHS if features % depth == 0))


def _sorted(index, num_experts, rows):
    """All rows, in the order of their experts, and where those of each begin and how many there are."""
    order = jnp.argsort(index, stable=True).astype(jnp.int32)
    counts = jnp.bincount(index, length=num_experts + 1).astype(jnp.int32)
    source = (order[:, None] * rows + jnp.arange(rows, dtype=jnp.int32)).reshape(-1)
    return source, (jnp.cumsum(counts) - counts) * rows, counts * rows


def _tiles(index, num_experts, rows, height):
    """The rows of each tile, their number where it has no more, and its expert: the number of experts of rows without one, else more."""
    source, start, counts = _sorted(index, num_experts, rows)
    number = -(-counts // height)
    last = jnp.cumsum(number)
    tile = jnp.arange(source.size // height + num_experts + 1, dtype=jnp.int32)
    expert = (last <= tile[:, None]).sum(axis=1, dtype=jnp.int32)
    own = jnp.minimum(expert, num_experts)
    rank = ((tile - (last - number)[own]) * height)[:, None] + jnp.arange(height, dtype=jnp.int32)
    there = (rank < counts[own][:, None]) & (expert <= num_experts)[:, None]
    return jnp.where(there, source[jnp.where(there, start[own][:, None] + rank, 0)], source.size), expert


def _whole(programs: int, given: Sequence[Any], out: Any) -> dict[str, Any]:
    """A grid of programs that each see all of all arrays."""

    def spec(array):
        return pallas.BlockSpec(array.shape, lambda program: (0,) * len(array.shape))

    return dict(grid=(programs,), in_specs=list(map(spec, given)), out_specs=spec(out))
