"""A 3 x 3 convolution as a product with patches that are never written down (implicit GEMM [1]): kernels for NVIDIA GPUs.

Where each client has a kernel of its own, a library has a small convolution for each client, and all patches are nine times the images.
Here a program reads a tile of patches straight from the images, multiplies it, and goes on to the next.

References:
  [1] Chetlur et al., "cuDNN: Efficient Primitives for Deep Learning", arXiv 1410.0759, 2014.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas
from jaxtyping import Array, Float

from fedmoe_jax import gpu
from fedmoe_jax.nn import convolution

_ROWS, _WIDTH, _WIDTH_SUMMED, _FEATURES = 128, 32, 64, 64  # of a tile, at most
_SUMMED = 32  # rows that are read at a time where all are added up
_SUMS = 1 << 13  # numbers of such a sum in a program
_EXACT = 32  # channels up to which products in full float32 are compiled in seconds
_PIECES, _PIECE = 31, 512  # programs that share all rows, at most, and rows of each, at least


@jax.custom_vjp
def convolve(x: Float[Array, "example height width in"], kernel: Float[Array, "3 3 in out"]) -> Float[Array, "example height width out"]:
    """As `convolution.convolve` without a stride, which it is where kernels of our own do not run."""
    return _run(multiplied, convolution.convolved, x, kernel)


@jax.custom_vjp
def _correlate(x, gradient):
    """Gradient of the kernel, in float32."""
    return _run(correlated, convolution.of_kernel, x, gradient)


def _turned(kernel):
    """The kernel of the gradient of x."""
    return kernel[::-1, ::-1].swapaxes(2, 3)


convolve.defvjp(
    lambda x, kernel: (convolve(x, kernel), (x, kernel)),
    lambda saved, g: (convolve(g, _turned(saved[1])), _correlate(saved[0], g).astype(saved[1].dtype)),
)
_correlate.defvjp(
    lambda x, gradient: (_correlate(x, gradient), (x, gradient)),
    lambda saved, g: (convolve(saved[1], _turned(g)).astype(saved[0].dtype), convolve(saved[0], g).astype(saved[1].dtype)),
)


def _run(kernel, otherwise, x, other):
    """Kernels count in 32 bits, multiply no doubles, and want something to multiply. Large ones in full float32 are slow to compile."""
    positions, channels, features = math.prod(x.shape[:3]), x.shape[3], other.shape[3]
    most = max(positions * max(channels, features), _PIECES * 9 * channels * features)
    fits = min(x.size, other.size) > 0 and most < 2**30 and x.dtype.itemsize <= 4
    fits &= not gpu.is_exact(x.dtype) or max(channels, features) <= _EXACT
    return gpu.run(kernel, otherwise, x, other) if fits else otherwise(x, other)


class _Patches(NamedTuple):
    """The matrix [position, column] of what each position of images [example, height, width, channel] reads of them.

    Its columns are (row, column, channel) of a kernel.
    """

    examples: int
    height: int
    width: int
    channels: int

    @property
    def rows(self) -> int:
        return self.examples * self.height * self.width

    @property
    def columns(self) -> int:
        return 9 * self.channels

    def read(self, images: Any, row: Array, column: Array) -> Array:
        """The entries at row [r, 1] and column [1, c]; zero outside of images and of the matrix."""
        tap, channel = _divided(column, self.channels)
        down, right = _divided(tap, 3)
        line, x = _divided(row, self.width)
        example, y = _divided(line, self.height)
        y, x = y + down - 1, x + right - 1
        there = (y >= 0) & (y < self.height) & (x >= 0) & (x < self.width) & (row < self.rows) & (column < self.columns)
        return gpu.load(images, ((example * self.height + y) * self.width + x) * self.channels + channel, there)


def multiplied(
    x: Float[Array, "example height width in"], kernel: Float[Array, "3 3 in out"], *, interpret: bool = False
) -> Float[Array, "example height width out"]:
    """x convolved with the kernel, accumulated in float32, in the dtype of x. `interpret` runs it anywhere, slowly."""
    patches, features = _Patches(*x.shape), kernel.shape[3]
    width, tile = _tile(patches.columns, _WIDTH), _tile(features, _FEATURES)

    def program(images, matrix, out):
        row, feature = _range(pallas.program_id(0) * _ROWS, _ROWS, 0), _range(pallas.program_id(1) * tile, tile, 1)
        total = jnp.zeros((_ROWS, tile), jnp.float32)
        for first in range(0, patches.columns, width):
            column = _range(first, width, 0)
            factor = gpu.load(matrix, column * features + feature, (column < patches.columns) & (feature < features))
            total += _dot(patches.read(images, row, _range(first, width, 1)), factor, 1)
        gpu.store(out, row * features + feature, (row < patches.rows) & (feature < features), total)

    out = jax.ShapeDtypeStruct((patches.rows * features,), x.dtype)
    grid = pallas.cdiv(patches.rows, _ROWS), pallas.cdiv(features, tile)
    call = gpu.call(program, out, warps=4, interpret=interpret, grid=grid)
    return call(x.ravel(), kernel.astype(x.dtype).ravel()).reshape(*x.shape[:3], features)


def correlated(
    x: Float[Array, "example height width in"], gradient: Float[Array, "example height width out"], *, interpret: bool = False
) -> Float[Array, "3 3 in out"]:
    """Gradient of the kernel of `multiplied`, in float32, summed in pieces. `interpret` as there."""
    patches, features = _Patches(*x.shape), gradient.shape[3]
    width, tile = _tile(patches.columns, _WIDTH_SUMMED), _tile(features, _FEATURES)
    blocks = pallas.cdiv(patches.columns, width)
    each = min(max(_SUMS // (width * tile), 1), blocks)  # blocks of a program
    length = _SUMMED * pallas.cdiv(max(_PIECE, pallas.cdiv(patches.rows, _PIECES)), _SUMMED)
    pieces = pallas.cdiv(patches.rows, length)

    def program(images, gradient, out):
        piece, number, side = (pallas.program_id(axis) for axis in range(3))
        feature = _range(side * tile, tile, 1)
        firsts = [(number * each + place) * width for place in range(each)]

        def add(step, totals):
            row = _range(piece * length + step * _SUMMED, _SUMMED, 0)
            seen = gpu.load(gradient, row * features + feature, (row < patches.rows) & (feature < features))
            parts = (patches.read(images, row, _range(first, width, 1)) for first in firsts)
            return tuple(total + _dot(part, seen, 0) for total, part in zip(totals, parts, strict=True))

        totals = lax.fori_loop(jnp.int32(0), jnp.int32(length // _SUMMED), add, (jnp.zeros((width, tile), jnp.float32),) * each)
        for total, first in zip(totals, firsts, strict=True):
            column = _range(first, width, 0)
            there = (column < patches.columns) & (feature < features)
            gpu.store(out, (piece * patches.columns + column) * features + feature, there, total)

    out = jax.ShapeDtypeStruct((pieces * patches.columns * features,), jnp.float32)
    grid = pieces, pallas.cdiv(blocks, each), pallas.cdiv(features, tile)
    call = gpu.call(program, out, warps=4, interpret=interpret, grid=grid)
    return call(x.ravel(), gradient.astype(x.dtype).ravel()).reshape(pieces, 3, 3, patches.channels, features).sum(0)


def _tile(number: int, most: int) -> int:
    """A power of two that holds so many, from 16 on, as a product in a kernel wants it."""
    return min(max(16, 1 << (number - 1).bit_length()), most)


def _range(first, number: int, axis: int):
    """Numbers from `first` on, along that axis of two."""
    return first + lax.broadcasted_iota(jnp.int32, (number, 1) if axis == 0 else (1, number), axis)


def _divided(number, by: int):
    """Quotient and remainder of what is not negative."""
    return lax.div(number, jnp.int32(by)), lax.rem(number, jnp.int32(by))


def _dot(a, b, axis: int):
    return lax.dot_general(a, b, (((axis,), (0,)), ((), ())), preferred_element_type=jnp.float32)
