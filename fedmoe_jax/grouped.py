"""Products of many groups of rows with the weights of one expert each, without a copy of the weights for each group.

Groups of the same expert are put side by side in tiles, a few for each expert, and one batched product serves all tiles.
Under vmap the groups of all clients come together first: that is what makes a whole cohort one product.
"""

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Int

from fedmoe_jax.base import pytree

_TILES = 4
"""Full tiles of each expert, about; one more may be partly empty. More of them waste fewer rows and copy more weights."""


@pytree
class Tiles:
    """`group` in each place of each tile (num_groups where empty), `expert` of each tile, and the place of each group."""

    group: Int[Array, "tile place"]
    expert: Int[Array, " tile"]
    place: Int[Array, " group"]


def tiles(index: Int[Array, " group"], num_experts: int) -> Tiles:
    """Puts groups of the same expert side by side."""
    num_groups = index.shape[0]
    size = max(1, num_groups // (_TILES * num_experts))
    number = -(-num_groups // size) + num_experts
    order = jnp.argsort(index, stable=True).astype(jnp.int32)
    counts = jnp.bincount(index, length=num_experts).astype(jnp.int32)
    needed = -(-counts // size)
    last = jnp.cumsum(needed)
    first, start = last - needed, jnp.cumsum(counts) - counts
    expert = jnp.minimum((last <= jnp.arange(number)[:, None]).sum(axis=1), num_experts - 1)
    rank = (jnp.arange(number) - first[expert])[:, None] * size + jnp.arange(size)
    filled = rank < counts[expert][:, None]
    group = jnp.where(filled, order[jnp.minimum(start[expert][:, None] + rank, num_groups - 1)], num_groups)
    ranks = jnp.zeros_like(order).at[order].set(jnp.arange(num_groups, dtype=jnp.int32)) - start[index]
    return Tiles(group, expert, first[index] * size + ranks)


@custom_vmap
def matmul(
    x: Float[Array, "group row feature"], base: Float[Array, "expert feature hidden"], index: Int[Array, " group"]
) -> Float[Array, "group row hidden"]:
    """x[g] @ base[index[g]]. Not differentiable: see `kernels.DualKernel`."""
    return _matmul(x, base, index)


@matmul.def_vmap
def _matmul_of_all(axis_size, in_batched, x, base, index):
    batched_x, batched_base, batched_index = in_batched
    if batched_base:  # several models
        return jax.vmap(_matmul, tuple(0 if batched else None for batched in in_batched))(x, base, index), True
    x = x if batched_x else jnp.broadcast_to(x, (axis_size, *x.shape))
    index = index if batched_index else jnp.broadcast_to(index, (axis_size, *index.shape))
    y = matmul(x.reshape(-1, *x.shape[2:]), base, index.reshape(-1))
    return y.reshape(axis_size, -1, *y.shape[1:]), True


def _matmul(x, base, index):
    num_experts, (num_groups, rows) = base.shape[0], x.shape[:2]
    if num_experts == 1:
        return x @ base[0]
    if num_groups <= num_experts:
        return x @ base[index]
    layout = tiles(index, num_experts)
    y = _laid_out(x, layout) @ base[layout.expert]
    return y.reshape(-1, rows, y.shape[-1])[layout.place]


def outer(
    x: Float[Array, "group row feature"], y: Float[Array, "group row hidden"], index: Int[Array, " group"], num_experts: int
) -> Float[Array, "expert feature hidden"]:
    """For each expert the sum of x[g]^T y[g] over its groups, in float32. Groups whose index is `num_experts` are left out."""
    nobody = index == num_experts
    y = jnp.where(nobody[:, None, None], 0, y)
    if num_experts == 1:
        return jnp.einsum("grd,grh->dh", x, y, preferred_element_type=jnp.float32)[None]
    layout = tiles(jnp.where(nobody, 0, index), num_experts)
    sums = jnp.einsum("trd,trh->tdh", _laid_out(x, layout), _laid_out(y, layout), preferred_element_type=jnp.float32)
    return jax.ops.segment_sum(sums, layout.expert, num_experts)


def _laid_out(x, layout: Tiles) -> Float[Array, "tile row feature"]:
    rows = jnp.take(x, layout.group, axis=0, mode="fill", fill_value=0)  # [tile, place, row, feature]
    return rows.reshape(rows.shape[0], -1, x.shape[-1])
