"""Small systems of linear equations, again and again: by a library, which takes ten kernels of a GPU, or within one of our own."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

MOST = 64  # equations within a kernel: with more a library is quicker


def factorised(matrix: Float[Array, "n n"], vector: Float[Array, " n"]) -> Float[Array, " n"]:
    """x such that matrix x = vector, of a symmetric matrix, by Cholesky's factors; NaN unless that is positive definite."""
    return jax.scipy.linalg.solve(matrix, vector, assume_a="pos")


def reduced(matrix: Float[Array, "n n"], vector: Float[Array, " n"]) -> Float[Array, " n"]:
    """As `factorised`, by Gauss-Jordan elimination without pivoting, which a kernel can do."""
    size = vector.shape[0]
    place = lax.iota(jnp.int32, size)
    row, column = (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))

    def step(k, state):
        a, b = state
        of_row, of_column = (jnp.where(at == k, a, 0.0).sum(axis) for axis, at in enumerate((row, column)))
        pivot, right = (jnp.where(place == k, x, 0.0).sum() for x in (of_row, b))
        share = jnp.where(place == k, 0.0, of_column / pivot)
        return a - share[:, None] * of_row[None, :], b - share * right

    a, b = lax.fori_loop(0, size, step, (matrix, vector))
    pivots = jnp.where(row == column, a, 0.0).sum(1)
    return jnp.where(pivots.min() > 0, b / pivots, jnp.nan)
