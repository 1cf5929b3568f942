"""Products of many groups of rows with the weights of one expert each, without a copy of the weights for each group.

Under vmap the groups of all clients come together first: that makes a whole cohort one product. Kernels of our own read them where
they are, in bfloat16 on Hopper GPUs (`ragged.py`). Elsewhere groups of the same expert are put side by side in tiles, so that one
batched product serves all. Every expert has a tile; where it has more groups than that has places for, it gets some of the tiles
to spare, which need a copy of its weights. Where groups are spread evenly none is needed; how many there are else depends on how
uneven they are.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Float, Int

from fedmoe_jax import gpu, ragged
from fedmoe_jax.base import pytree

T = TypeVar("T")

_ROOM = 1.125
"""Places of a tile over the mean number of groups of an expert: so many are asked for where all targets are the mean, to within 10%."""

_SPARE = 0.45
"""Tiles to spare for each expert: for rounds in which `balanced` makes up for unequal tokens. A setting."""

_TILES = 4
"""The last resort are tiles so many times smaller than the mean, of which enough are there for any groups."""


class Part(NamedTuple):
    """What some rows of the history add to a product: mix @ values, for each group."""

    mix: Float[Array, "group row other"]
    values: Float[Array, "group other hidden"]


@pytree
class Layout:
    """`group` in each place of each tile (any where empty, `filled` says which), and the place of each group.

    The first tile of each expert comes first; `owner` is the expert of each tile to spare. Who has no place is told the first.
    """

    group: Int[Array, "tile place"]
    filled: Bool[Array, "tile place"]
    owner: Int[Array, " spare"]
    place: Int[Array, " group"]


def lay_out(index: Int[Array, " group"], counts: Int[Array, " expert"], size: int, spare: int) -> Layout:
    """Groups of the same expert side by side in tiles of `size` places: one for each expert and `spare` more, which must be enough.

    `counts` are the groups of each expert; those whose index is the number of experts have no place. Without the barrier XLA computes
    all of it again for every element that is gathered by it.
    """
    num_groups, num_experts = index.shape[0], counts.shape[0]
    each, of_expert = jnp.arange(num_experts, dtype=jnp.int32), _spare_tiles(counts, size)
    last = jnp.cumsum(of_expert)
    owner = jnp.minimum((last <= jnp.arange(spare)[:, None]).sum(axis=1, dtype=jnp.int32), num_experts - 1)
    first, start = last - of_expert, jnp.cumsum(counts) - counts
    expert = jnp.concatenate([each, owner])
    tile_of_expert = jnp.concatenate([jnp.zeros_like(each), jnp.arange(spare) - first[owner] + 1])
    rank = tile_of_expert[:, None] * size + jnp.arange(size)
    order = jnp.argsort(index, stable=True).astype(jnp.int32)
    group = order[jnp.minimum(start[expert][:, None] + rank, num_groups - 1)]
    own_rank = jnp.zeros_like(order).at[order].set(jnp.arange(num_groups, dtype=jnp.int32)) - start[index]
    tile = jnp.where(own_rank < size, index, num_experts + first[index] + own_rank // size - 1)
    place = jnp.where(index < num_experts, tile * size + own_rank % size, 0)
    return lax.optimization_barrier(Layout(group, rank < counts[expert][:, None], owner, place))


def _spare_tiles(counts: Int[Array, " expert"], size: int) -> Int[Array, " expert"]:
    return jnp.maximum(-(-counts // size) - 1, 0)


def sizes(num_groups: int, num_experts: int) -> tuple[tuple[int, int], ...]:
    """Places of a tile and tiles to spare: for groups that are spread evenly, less evenly, and in any way."""
    mean = num_groups / num_experts
    places, small = math.ceil(_ROOM * mean), max(1, int(mean / _TILES))
    return (places, 0), (places, math.ceil(_SPARE * num_experts)), (small, num_experts * -(-num_groups // (small * num_experts)))


def _spare(layout: Layout) -> list[tuple[Array, Array, Array]]:
    """Group, filled and owner of the tiles to spare, if any, in blocks of no more than there are experts: so many weights are copied."""
    spare = layout.owner.shape[0]
    if not spare:
        return []
    most = layout.group.shape[0] - spare
    tiles = layout.group[most:], layout.filled[most:], layout.owner
    group, filled, owner = (a.reshape(-1, min(spare, most), *a.shape[1:]) for a in tiles)
    return [(group, filled, owner)]


def laid_out(index: Int[Array, " group"], num_experts: int, function: Callable[[Layout], T]) -> T:
    """function(layout) of the first of `sizes` that has enough tiles."""
    options = sizes(index.shape[0], num_experts)
    counts = jnp.bincount(index, length=num_experts).astype(jnp.int32)
    short = [_spare_tiles(counts, size).sum() > spare for size, spare in options[:-1]]
    branches = [lambda chosen=chosen: function(lay_out(index, counts, *chosen)) for chosen in options]
    return lax.switch(_worst(sum(flag.astype(jnp.int32) for flag in short)), branches)


@custom_vmap
def _worst(option: Int[Array, ""]) -> Int[Array, ""]:
    """The same; under vmap the last option that any asks for, so that all take one branch."""
    return option


@_worst.def_vmap
def _worst_of_all(axis_size, in_batched, option):
    return _worst(option.max()), False


def matmul(
    x: Float[Array, "group row feature"],
    base: Float[Array, "expert feature hidden"],
    index: Int[Array, " group"],
    scale: Float[Array, ""] | float = 1.0,
    parts: Sequence[Part] = (),
) -> Float[Array, "group row hidden"]:
    """scale * x[g] @ base[index[g]], 0 where that is no expert, and the sum of all parts. Not differentiable: see `kernels.DualKernel`."""
    return _of_groups(x, base, index, jnp.broadcast_to(jnp.asarray(scale, jnp.float32), index.shape), tuple(parts))


@custom_vmap
def _of_groups(x, base, index, scale, parts):
    return _matmul(x, base, index, scale, parts)


@_of_groups.def_vmap
def _of_all_groups(axis_size, in_batched, *args):
    axes = [jax.tree.map(lambda batched: 0 if batched else None, batched) for batched in in_batched]
    if in_batched[1]:  # several models
        return jax.vmap(_matmul, axes)(*args), True

    def together(leaf, batched):
        leaf = leaf if batched else jnp.broadcast_to(leaf, (axis_size, *leaf.shape))
        return leaf.reshape(-1, *leaf.shape[2:])

    x, base, *others = args
    x, others = jax.tree.map(together, (x, others), (in_batched[0], list(in_batched[2:])))
    y = _of_groups(x, base, *others)
    return y.reshape(axis_size, -1, *y.shape[1:]), True


def _matmul(x, base, index, scale, parts):
    if base.shape[0] == 1 or not ragged.takes_matmul(x, base):
        return _one_by_one(x, base, index, scale, parts)
    inside, after = (parts, ()) if ragged.takes_parts(parts) else ((), parts)
    return _with_parts(gpu.run(ragged.matmul, _one_by_one, x, base, index, scale, inside), after)


def _one_by_one(x, base, index, scale, parts):
    """The product in tiles, and a pass for each part."""
    (num_groups, rows), num_experts = x.shape[:2], base.shape[0]

    def finished(product):
        y = jnp.where((index < num_experts)[:, None, None], scale[:, None, None] * product, 0).astype(product.dtype)
        return _with_parts(y, parts)

    if num_experts == 1 or num_groups <= num_experts:
        return finished(x @ (base[0] if num_experts == 1 else base[index]))

    def laid(groups):
        return x[groups].reshape(groups.shape[0], -1, x.shape[-1])

    def product(layout):
        y = laid(layout.group[:num_experts]) @ base
        for group, _, owner in _spare(layout):
            more = lax.map(lambda tiles: laid(tiles[0]) @ base[tiles[1]], (group, owner))
            y = jnp.concatenate([y, more.reshape(-1, *y.shape[1:])])
        return finished(y.reshape(-1, rows, y.shape[-1])[layout.place])

    return laid_out(index, num_experts, product)


def _with_parts(y, parts):
    for part in parts:
        y = y + jnp.einsum("grn,gnh->grh", part.mix, part.values)
    return y


class Rows(NamedTuple):
    """Rows of all groups: those of one local step, or of several."""

    inputs: Float[Array, "group row feature"]
    outputs: Float[Array, "group row hidden"]
    weight: Float[Array, "group row"]


def outer(rows: Sequence[Rows], index: Int[Array, " group"], num_experts: int) -> Float[Array, "expert feature hidden"]:
    """For each expert the sum of inputs[g]^T (weight[g] * outputs[g]) over its groups and all `rows`, in float32.

    Groups whose index is `num_experts` are left out. Inputs must be finite.
    """
    if num_experts == 1:
        product = functools.partial(jnp.einsum, "grd,grh->dh", preferred_element_type=jnp.float32)
        each = (product(part.inputs, _filled(part, index == 0)) for part in rows)
        return functools.reduce(jnp.add, each)[None]
    if ragged.takes_outer([(part.inputs, part.outputs) for part in rows], num_experts):
        return gpu.run(_outer_in_a_kernel, _outer_in_tiles, list(rows), index, num_experts=num_experts)
    return _outer_in_tiles(rows, index, num_experts)


def _filled(rows, filled):
    """Weighted outputs, 0 where not `filled`."""
    return jnp.where(filled[..., None, None], _weighted(rows.outputs, rows.weight), 0)


def _weighted(a, weight):
    return (a * weight[..., None]).astype(a.dtype)


def _outer_in_a_kernel(rows, index, num_experts, **options):
    """The narrower side is weighted: less is written down."""
    pairs = [(_weighted(x, weight), y) if x.shape[-1] <= y.shape[-1] else (x, _weighted(y, weight)) for x, y, weight in rows]
    return ragged.outer(pairs, index, num_experts, **options)


def _outer_in_tiles(rows, index, num_experts):
    def of_tiles(group, filled):
        laid = [Rows(*(a[group] for a in part)) for part in rows]
        inputs = jnp.concatenate([part.inputs for part in laid], axis=2)
        outputs = jnp.concatenate([_filled(part, filled) for part in laid], axis=2)
        flat = (a.reshape(a.shape[0], -1, a.shape[-1]) for a in (inputs, outputs))
        return jnp.einsum("trd,trh->tdh", *flat, preferred_element_type=jnp.float32)

    def sums(layout):
        total = of_tiles(layout.group[:num_experts], layout.filled[:num_experts])
        for blocks in _spare(layout):
            total, _ = lax.scan(lambda total, tiles: (total.at[tiles[2]].add(of_tiles(*tiles[:2])), None), total, blocks)
        return total

    return laid_out(index, num_experts, sums)
