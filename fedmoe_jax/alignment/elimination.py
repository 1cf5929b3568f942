"""Small systems of linear equations, again and again: by a library, which takes ten kernels of a GPU, or within one of our own."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

MOST = 64  # equations within a kernel: with more a library is quicker


def factorised(matrix: Float[Array, "n n"], vector: Float[Array, " n"]) -> Float[Array, " n"]:
    """x such that matrix x = vector, of a symmetric matrix, by Cholesky's factors; NaN unless that is positive definite."""
    return jax.scipy.linalg.solve(matrix, vector, assume_a="pos")


def swept(matrix: Float[Array, "n n"], vector: Float[Array, " n"]) -> Float[Array, " n"]:
    """As `factorised`, by the symmetric sweep operator [1] on two rows at a time, which a kernel can do. n is even.

    After all rows are swept the matrix is minus its inverse. It is symmetric throughout, so that rows do for columns.

    References:
      [1] Goodnight, "A Tutorial on the SWEEP Operator", 1979.
    """
    size = vector.shape[0]
    place = lax.iota(jnp.int32, size)
    row, column = (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))

    def sweep(pair, state):
        a, least = state
        k, m = 2 * pair, 2 * pair + 1
        first, second = (jnp.where(row == at, a, 0.0).sum(0) for at in (k, m))
        top, beside, bottom = (jnp.where(place == at, x, 0.0).sum() for x, at in ((first, k), (first, m), (second, m)))
        determinant = top * bottom - beside * beside
        first = jnp.where(place == k, -1.0, jnp.where(place == m, 0.0, first))
        second = jnp.where(place == m, -1.0, jnp.where(place == k, 0.0, second))
        shares = (bottom * first - beside * second) / determinant, (top * second - beside * first) / determinant
        others = jnp.where((row // 2 == pair) | (column // 2 == pair), 0.0, a)
        a = others - first[:, None] * shares[0][None, :] - second[:, None] * shares[1][None, :]
        return a, jnp.minimum(least, jnp.minimum(top, determinant))

    a, least = lax.fori_loop(0, size // 2, sweep, (matrix, jnp.float32(jnp.inf)))
    return jnp.where(least > 0, -(a * vector[None, :]).sum(1), jnp.nan)
