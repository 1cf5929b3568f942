"""Small systems of linear equations, again and again: on a GPU one kernel each, where a library takes ten."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from fedmoe_jax import gpu

_MOST = 64  # equations of a kernel: with more a library is quicker


def solve(matrix: Float[Array, "n n"], vector: Float[Array, " n"]) -> Float[Array, " n"]:
    """x such that matrix x = vector, of a symmetric matrix; NaN unless that is positive definite."""
    if matrix.shape[0] > _MOST:
        return factorised(matrix, vector)
    return gpu.run(eliminated, factorised, matrix, vector)


def factorised(matrix: Float[Array, "n n"], vector: Float[Array, " n"]) -> Float[Array, " n"]:
    """`solve` by Cholesky's factors."""
    return jax.scipy.linalg.solve(matrix, vector, assume_a="pos")


def eliminated(matrix: Float[Array, "n n"], vector: Float[Array, " n"], *, interpret: bool = False) -> Float[Array, " n"]:
    """`solve` by Gauss-Jordan elimination without pivoting, in one kernel of a GPU."""
    size, whole = vector.shape[0], max(1 << (vector.shape[0] - 1).bit_length(), 16)  # a power of two, as kernels want it
    more = whole - size
    padded = jnp.pad(matrix, (0, more)) + jnp.diag(jnp.arange(whole) >= size)
    result = jax.ShapeDtypeStruct((whole,), vector.dtype)
    return gpu.call(_eliminate, result, warps=8, interpret=interpret)(padded, jnp.pad(vector, (0, more)))[:size]


def _eliminate(matrix, vector, out):
    size = vector.shape[0]
    place = lax.iota(jnp.int32, size)
    row, column = (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))

    def step(k, state):
        a, b = state
        of_row, of_column = (jnp.where(at == k, a, 0.0).sum(axis) for axis, at in enumerate((row, column)))
        pivot, right = (jnp.where(place == k, x, 0.0).sum() for x in (of_row, b))
        share = jnp.where(place == k, 0.0, of_column / pivot)
        return a - share[:, None] * of_row[None, :], b - share * right

    a, b = lax.fori_loop(0, size, step, (matrix[...], vector[...]))
    pivots = jnp.where(row == column, a, 0.0).sum(1)
    out[...] = jnp.where(pivots.min() > 0, b / pivots, jnp.nan)
