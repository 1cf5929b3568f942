"""Products of many groups of rows with the weights of an expert each, and sums over the groups of each expert, on Hopper GPUs.

Kernels of our own, in bfloat16, read rows where they are, by a list that is sorted by expert: no row is laid out in tiles or
padded, however unevenly groups are spread, and what a history adds to a product is added before that is written.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas
from jaxtyping import Array, Float, Int

from fedmoe_jax import gpu

_HEIGHTS = 128, 64  # rows of a tile of outputs
_WIDTHS = 256, 128, 64  # columns of it: the first that divides all
_DEPTHS = 64, 32, 16  # of what is multiplied at once, likewise
_PROGRAMS = 128  # about as many as a GPU has processors
_STAGES = 3  # of loads that are under way

Pair = tuple[Float[Array, "group row _"], Float[Array, "group _ hidden"]]


class Tiles(NamedTuple):
    """Tiles of rows of one expert each.

    row: the rows of each tile, and any where it has no more; `kept`, 0 or 1, says which are its own.
    expert: that of the tile, and any where its rows have none.
    work: 2 where its rows have an expert, 1 where they have none, 0 where it is not used.
    """

    row: Int[Array, "tile height"]
    kept: Int[Array, "tile height"]
    expert: Int[Array, " tile"]
    work: Int[Array, " tile"]


def takes_matmul(x: Float[Array, "group row feature"], base: Float[Array, "expert feature hidden"]) -> bool:
    """Whether `matmul` takes them here: on a Hopper GPU, bfloat16, widths that tiles divide, and places that 32 bits can tell."""
    hidden = base.shape[-1]
    return _fits(x, base) and hidden % _WIDTHS[-1] == 0 and x.shape[0] * x.shape[1] * hidden < 2**31


def takes_parts(parts: Sequence[Pair]) -> bool:
    """Whether `matmul` adds these: bfloat16, as many rows as a power of two, of at least 16, a multiple of 16 others, and no more
    numbers than 32 bits can tell the places of."""
    sizes = [mix.shape[1:] for mix, _ in parts]
    divided = all(rows >= 16 and rows & (rows - 1) == 0 and others % 16 == 0 for rows, others in sizes)
    return divided and all(a.dtype == jnp.bfloat16 and 0 < a.size < 2**31 for part in parts for a in part)


def takes_outer(pairs: Sequence[tuple[Array, Array]], num_experts: int) -> bool:
    """Whether `outer` takes them here, as `matmul` does, [group, row, width] each, of as many rows, and they are work enough for a GPU."""
    x, y = pairs[0]
    programs = num_experts * x.shape[-1] * y.shape[-1] // _WIDTHS[1] ** 2
    divided = all(a.shape[-1] % _WIDTHS[-1] == 0 for a in (x, y)) and len({inputs.shape for inputs, _ in pairs}) == 1
    return divided and programs >= _PROGRAMS and _fits(*(a for pair in pairs for a in pair))


def _fits(*arrays):
    sizes = [a.size for a in arrays]
    right = all(a.dtype == jnp.bfloat16 and a.shape[-1] % _DEPTHS[-1] == 0 for a in arrays)
    return gpu.is_hopper() and right and min(sizes) > 0 and max(sizes) < 2**31


def matmul(
    x: Float[Array, "group row feature"],
    base: Float[Array, "expert feature hidden"],
    index: Int[Array, " group"],
    scale: Float[Array, " group"],
    parts: Sequence[Pair] = (),
    *,
    interpret: bool = False,
) -> Float[Array, "group row hidden"]:
    """scale[g] * x[g] @ base[index[g]], 0 where that is no expert, and the sum of all parts' mix[g] @ values[g], added up in float32.

    Indices are at least 0. `interpret` runs it anywhere, slowly.
    """
    (groups, rows, features), (experts, _, hidden) = x.shape, base.shape
    height, width = _tile(rows, hidden, bool(parts))
    depth, columns = _first(_DEPTHS, features), hidden // width
    tiles = _tiles(index, experts, rows, height)

    def expert_gemm(x, base, row, kept, expert, work, scale, *others):
        *factors, out = others
        tile, column = pallas.program_id(0) // columns, pallas.program_id(0) % columns * width
        across, mine, own = pallas.ds(column, width), row[tile, :], kept[tile, :] > 0

        @pallas.when(work[tile] > 0)
        def _():
            def product(step, total):
                along = pallas.ds(step * depth, depth)
                return total + _dot(x[mine, along], base[expert[tile], along, across])

            whole = work[tile] > 1
            total = jnp.zeros((height, width), jnp.float32)
            total = lax.fori_loop(0, whole.astype(jnp.int32) * (features // depth), product, total)
            total = jnp.where(whole, total * scale[mine // rows][:, None], 0.0)
            for mix, values in zip(factors[::2], factors[1::2], strict=True):
                total = _add_part(total, mix, values, row, tile, across, rows)
            place = jnp.where(own, mine, groups * rows)  # none that is kept is also that of one that is not: they are written in any order
            gpu.store(out, place[:, None] * hidden + column + jnp.arange(width), own[:, None], total)

    given = [x.reshape(-1, features), base, *tiles, scale]
    for mix, values in parts:
        given += [mix.reshape(groups * rows, -1), values.reshape(-1, hidden)]
    out = jax.ShapeDtypeStruct((groups * rows * hidden,), x.dtype)
    warps, grid = 8 if width == _WIDTHS[0] else 4, _whole(tiles.expert.size * columns, given, out)
    call = gpu.call(expert_gemm, out, warps=warps, stages=_STAGES, interpret=interpret, **grid)
    return call(*given).reshape(groups, rows, hidden)


def _add_part(total, mix, values, row, tile, across, rows):
    """A total with a part: all rows of the tile are multiplied with the values of each group in it, maybe NaN, and take their own."""
    height, others = total.shape[0], mix.shape[1]
    groups = -(-height // rows)
    depth = _first([depth for depth in _DEPTHS if depth * groups <= 2 * _DEPTHS[0]], others)
    mine, of = row[tile, :], jnp.arange(height)[:, None] // rows

    def add(step, total):
        mixed = mix[mine, pallas.ds(step * depth, depth)]
        for group in range(groups):
            first = row[tile, group * rows] // rows * others + step * depth
            found = _dot(mixed, values[pallas.ds(first, depth), across])
            total += found if groups == 1 else jnp.where(of == group, found, 0.0)
        return total

    return lax.fori_loop(0, others // depth, add, total)


def outer(
    pairs: Sequence[tuple[Array, Array]], index: Int[Array, " group"], num_experts: int, *, interpret: bool = False
) -> Float[Array, "expert feature hidden"]:
    """For each expert the sum of x[g]^T y[g] over its groups and all pairs (x, y), [group, row, width] each, in float32.

    Groups whose index is `num_experts` are left out. `interpret` runs it anywhere, slowly.
    """
    (_, rows, features), hidden = pairs[0][0].shape, pairs[0][1].shape[-1]
    down, across = (_first(_WIDTHS[1:], size) for size in (features, hidden))
    depth, columns = _DEPTHS[0], hidden // across
    programs = num_experts * (features // down) * columns
    source, start, counts = _sorted(index, num_experts, rows)

    def outer_gemm(source, start, counts, *others):
        *factors, out = others
        program = pallas.program_id(0)
        expert, own = program // (features // down * columns), pallas.ds(program % columns * across, across)
        first = program // columns % (features // down) * down
        total = jnp.zeros((down, across), jnp.float32)
        for x, y in zip(factors[::2], factors[1::2], strict=True):

            def product(step, total, x=x, y=y):
                rank = step * depth + jnp.arange(depth, dtype=jnp.int32)
                there = rank < counts[expert]
                row = source[start[expert] + jnp.where(there, rank, 0)]
                mine = gpu.load(x, row[:, None] * features + first + jnp.arange(down), there[:, None])
                return total + _dot(mine, y[row, own], turned=True)

            total = lax.fori_loop(0, (counts[expert] + (depth - 1)) // depth, product, total)
        out[expert, pallas.ds(first, down), own] = total

    given = [source, start, counts]
    for x, y in pairs:
        given += [x.reshape(-1), y.reshape(-1, hidden)]
    out = jax.ShapeDtypeStruct((num_experts, features, hidden), jnp.float32)
    call = gpu.call(outer_gemm, out, warps=4, stages=_STAGES, interpret=interpret, **_whole(programs, given, out))
    return call(*given)


def _dot(a, b, turned: bool = False):
    """a @ b, or a^T @ b, of numbers as they are, whatever precision is asked for by default."""
    dimensions = ((0 if turned else 1,), (0,)), ((), ())
    return lax.dot_general(a, b, dimensions, precision=lax.Precision.DEFAULT, preferred_element_type=jnp.float32)


def _first(sizes: Sequence[int], of: int) -> int:
    return next(size for size in sizes if of % size == 0)


def _tile(rows: int, hidden: int, with_parts: bool) -> tuple[int, int]:
    """Height and width. Large tiles read less; with parts of few rows the small one was quicker, as it holds fewer groups."""
    small = with_parts and rows <= _HEIGHTS[1]
    return _HEIGHTS[small], _first(_WIDTHS[small:], hidden)


def _sorted(index, num_experts, rows):
    """All rows, in the order of their experts, and where those of each begin and how many there are, those without an expert last."""
    index = jnp.minimum(index, num_experts)
    order = jnp.argsort(index, stable=True).astype(jnp.int32)
    counts = jnp.bincount(index, length=num_experts + 1).astype(jnp.int32)
    source = (order[:, None] * rows + jnp.arange(rows, dtype=jnp.int32)).reshape(-1)
    return source, (jnp.cumsum(counts, dtype=jnp.int32) - counts) * rows, counts * rows


def _tiles(index, num_experts, rows, height) -> Tiles:
    """Enough for any groups: those of each expert are filled but for its last."""
    source, start, counts = _sorted(index, num_experts, rows)
    number = -(-counts // height)
    last = jnp.cumsum(number, dtype=jnp.int32)
    tile = jnp.arange(source.size // height + num_experts + 1, dtype=jnp.int32)
    expert = (last <= tile[:, None]).sum(axis=1, dtype=jnp.int32)
    own = jnp.minimum(expert, num_experts)
    rank = ((tile - (last - number)[own]) * height)[:, None] + jnp.arange(height, dtype=jnp.int32)
    kept = (rank < counts[own][:, None]) & (expert <= num_experts)[:, None]
    row = source[jnp.where(kept, start[own][:, None] + rank, 0)]
    work = jnp.clip(num_experts - expert + 1, 0, 2)
    return Tiles(row, kept.astype(jnp.int32), jnp.minimum(own, num_experts - 1), work)


def _whole(programs: int, given: Sequence[Any], out: Any) -> dict[str, Any]:
    """A grid of programs that each see all of all arrays."""

    def spec(array):
        return pallas.BlockSpec(array.shape, lambda program: (0,) * len(array.shape))

    return dict(grid=(programs,), in_specs=list(map(spec, given)), out_specs=spec(out))
