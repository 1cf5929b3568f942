"""The product with a kernel that was trained, from that with the kernel as it was received: in one pass, on NVIDIA GPUs."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas
from jaxtyping import Array, Bool, Float, Int

from fedmoe_jax import gpu
from fedmoe_jax.base import pytree

_ROWS, _NUMBERS = 128, 1 << 14  # of a tile, at most
_WIDTHS = 256, 128, 64  # of a tile: the first that divides all


class Tiles(NamedTuple):
    """Products [tile, row, hidden] of groups, the place among them of each (None: its own), and whether it has one: else it is 0."""

    product: Float[Array, "tile row hidden"]
    place: Int[Array, " group"] | None
    filled: Bool[Array, " group"]


@pytree
class Part:
    """What some rows of the history add to a product: mix @ values, for each group."""

    mix: Float[Array, "group row other"]
    values: Float[Array, "group other hidden"]


def corrected(tiles: Tiles, scale: Float[Array, " group"], parts: Sequence[Part]) -> Float[Array, "group row hidden"]:
    """scale times the product of each group, and the sum of all parts, in the dtype of the product."""
    args = tiles, scale, tuple(parts)
    return gpu.run(in_a_kernel, one_by_one, *args) if parts and _fits(tiles, parts) else one_by_one(*args)


def one_by_one(tiles: Tiles, scale: Float[Array, " group"], parts: Sequence[Part]) -> Float[Array, "group row hidden"]:
    """`corrected`, a pass for each part."""
    product = tiles.product if tiles.place is None else tiles.product[tiles.place]
    y = jnp.where(tiles.filled[:, None, None], scale[:, None, None] * product, 0).astype(product.dtype)
    for part in parts:
        y = y + jnp.einsum("grn,gnh->grh", part.mix, part.values)
    return y


def in_a_kernel(
    tiles: Tiles, scale: Float[Array, " group"], parts: Sequence[Part], *, interpret: bool = False
) -> Float[Array, "group row hidden"]:
    """`corrected` in one kernel of a GPU, all added up in float32. `interpret` runs it anywhere, slowly."""
    _, rows, hidden = tiles.product.shape
    groups, width = tiles.filled.shape[0], _width(rows, hidden)
    places = jnp.arange(groups) if tiles.place is None else jnp.where(tiles.filled, tiles.place, 0)  # a kernel reads wherever it is told to

    def kernel(product, place, filled, scale, *others):
        *factors, out = others
        group, column = pallas.program_id(0), pallas.ds(pallas.program_id(1) * width, width)
        total = jnp.where(filled[group] > 0, scale[group] * product[place[group], :, column].astype(jnp.float32), 0.0)
        for mix, values in zip(factors[::2], factors[1::2], strict=True):
            total += lax.dot_general(mix[...], values[...], (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        out[...] = total.astype(out.dtype)

    def whole(array):
        return pallas.BlockSpec(array.shape, lambda group, column: (0,) * array.ndim)

    given = tiles.product, places, tiles.filled.astype(jnp.int32), scale
    specs = list(map(whole, given))
    for part in parts:
        other = part.mix.shape[2]
        specs += [pallas.BlockSpec((None, rows, other), lambda group, column: (group, 0, 0)), _tile(other, width)]
    result = jax.ShapeDtypeStruct((groups, rows, hidden), tiles.product.dtype)
    call = gpu.call(
        kernel, result, warps=4, interpret=interpret, grid=(groups, hidden // width), in_specs=specs, out_specs=_tile(rows, width)
    )
    return call(*given, *(array for part in parts for array in (part.mix, part.values)))


def _tile(rows, width):
    return pallas.BlockSpec((None, rows, width), lambda group, column: (group, 0, column))


def _width(rows: int, hidden: int) -> int:
    return next((width for width in _WIDTHS if hidden % width == 0 and rows * width <= _NUMBERS), 0)


def _fits(tiles: Tiles, parts: Sequence[Part]) -> bool:
    """Kernels take powers of two, small tiles, and no products in full float32."""
    product = tiles.product
    sizes, most = (product.shape[1], *(part.mix.shape[2] for part in parts)), _ROWS * 2 // max(product.dtype.itemsize, 2)
    powers = all(16 <= size <= most and size & (size - 1) == 0 for size in sizes)
    return powers and bool(_width(*product.shape[1:])) and product.dtype.itemsize <= 4 and not gpu.is_exact(product.dtype)
