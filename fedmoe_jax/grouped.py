"""Products of many groups of rows with the weights of one expert each, without a copy of the weights for each group.

Groups of the same expert are put side by side, so that one batched product serves all. Where every expert has about as many
groups, as a balanced assignment gives it, all its groups are one batch [expert, place]; otherwise they fall into tiles, a few
for each expert. Under vmap the groups of all clients come together first: that makes a whole cohort one product.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Float, Int

from fedmoe_jax.base import pytree

_TILES = 4
"""Full tiles of each expert, about; one more may be partly empty. More of them waste fewer rows and copy more weights."""

_ROOM = 1.25
"""Places of each expert over the mean number of groups, where all are one batch."""


@pytree
class Layout:
    """`group` in each place of each tile (any where empty, `filled` says which), `expert` of each tile, and the place of each group."""

    group: Int[Array, "tile place"]
    filled: Bool[Array, "tile place"]
    expert: Int[Array, " tile"]
    place: Int[Array, " group"]


def tiles(index: Int[Array, " group"], num_experts: int) -> Layout:
    """Groups of the same expert side by side, in as many tiles of equal size as it needs."""
    num_groups = index.shape[0]
    size = max(1, num_groups // (_TILES * num_experts))
    number = -(-num_groups // size) + num_experts
    counts = jnp.bincount(index, length=num_experts).astype(jnp.int32)
    needed = -(-counts // size)
    last = jnp.cumsum(needed)
    expert = jnp.minimum((last <= jnp.arange(number)[:, None]).sum(axis=1), num_experts - 1)
    return _lay_out(index, counts, expert, last - needed, size)


def rows_of_experts(index: Int[Array, " group"], num_experts: int) -> Layout:
    """One tile for each expert, for as many groups as `places`; see `fits`."""
    counts = jnp.bincount(index, length=num_experts).astype(jnp.int32)
    each = jnp.arange(num_experts, dtype=jnp.int32)
    return _lay_out(index, counts, each, each, places(index.shape[0], num_experts))


def places(num_groups: int, num_experts: int) -> int:
    """Groups that an expert may have in `rows_of_experts`."""
    return int(_ROOM * num_groups / num_experts) + 1


def fits(index: Int[Array, " group"], num_experts: int) -> Bool[Array, ""]:
    """Whether no expert has more groups than `places`."""
    return jnp.bincount(index, length=num_experts).max() <= places(index.shape[0], num_experts)


def _lay_out(index, counts, expert, first, size) -> Layout:
    """Tile t holds `size` groups of `expert[t]`, whose tiles begin at `first`.

    Without the barrier XLA computes all of it again for every element that is gathered by it.
    """
    num_groups = index.shape[0]
    order = jnp.argsort(index, stable=True).astype(jnp.int32)
    start = jnp.cumsum(counts) - counts
    rank = (jnp.arange(expert.shape[0]) - first[expert])[:, None] * size + jnp.arange(size)
    group = order[jnp.minimum(start[expert][:, None] + rank, num_groups - 1)]
    ranks = jnp.zeros_like(order).at[order].set(jnp.arange(num_groups, dtype=jnp.int32)) - start[index]
    return lax.optimization_barrier(Layout(group, rank < counts[expert][:, None], expert, first[index] * size + ranks))


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

    def product(layout, weights):
        y = x[layout.group].reshape(layout.group.shape[0], -1, x.shape[-1]) @ weights
        return y.reshape(-1, rows, y.shape[-1])[layout.place]

    def in_tiles():
        layout = tiles(index, num_experts)
        return product(layout, base[layout.expert])

    return lax.cond(fits(index, num_experts), lambda: product(rows_of_experts(index, num_experts), base), in_tiles)


def outer(
    x: Float[Array, "group row feature"], y: Float[Array, "group row hidden"], index: Int[Array, " group"], num_experts: int
) -> Float[Array, "expert feature hidden"]:
    """For each expert the sum of x[g]^T y[g] over its groups, in float32. Groups whose index is `num_experts` are left out."""

    def sums(layout):
        flat = layout.group.shape[0], -1
        own = jnp.where(layout.filled[..., None, None], y[layout.group], 0).reshape(*flat, y.shape[-1])
        return jnp.einsum("trd,trh->tdh", x[layout.group].reshape(*flat, x.shape[-1]), own, preferred_element_type=jnp.float32)

    def in_tiles():
        layout = tiles(index, num_experts)
        return jax.ops.segment_sum(sums(layout), layout.expert, num_experts)

    nobody = index == num_experts
    y = jnp.where(nobody[:, None, None], 0, y)
    if num_experts == 1:
        return jnp.einsum("grd,grh->dh", x, y, preferred_element_type=jnp.float32)[None]
    index = jnp.where(nobody, jnp.arange(index.shape[0]) % num_experts, index)  # spread evenly, they add nothing
    return lax.cond(fits(index, num_experts), lambda: sums(rows_of_experts(index, num_experts)), in_tiles)
