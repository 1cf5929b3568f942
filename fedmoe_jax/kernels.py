"""Products with a weight matrix: every dense product of a layer goes through here, so that a weight may have another view.

A weight is an array. It is read in the dtype of `x`, so a layer that computes in bfloat16 casts its activations only.
"""

from jaxtyping import Array, Float, Int


def matmul(x: Float[Array, "*rows feature"], w: Float[Array, "feature hidden"]) -> Float[Array, "*rows hidden"]:
    """x @ w."""
    return x @ w.astype(x.dtype)


def expert_matmul(
    x: Float[Array, "group token feature"], w: Float[Array, "expert feature hidden"], expert: Int[Array, " group"] | None = None
) -> Float[Array, "group token hidden"]:
    """Each group of tokens times the weights of one expert: x[g] @ w[expert[g]], or x[e] @ w[e] without `expert`."""
    w = w.astype(x.dtype)
    return x @ (w if expert is None else w[expert])
