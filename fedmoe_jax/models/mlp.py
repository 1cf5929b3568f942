"""A multi-layer perceptron whose hidden layer is a Mixture of Experts."""

import math
from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from fedmoe_jax.nn.linear import Linear, RMSNorm, as_float
from fedmoe_jax.nn.moe import MoE


class MLP(nnx.Module):
    """flatten -> Linear -> relu -> MoE -> RMSNorm -> Linear. Nothing goes around the experts, so they do the work.

    Args:
      input_shape: shape of one example, any number of axes.
      num_classes: outputs.
      hidden: width of the shared features that experts see and return.
      num_experts, top_k: experts, and how many an example uses.
      expert_hidden: width inside an expert.
      dtype: what it computes in, by default float32, or the dtype of floating inputs.
      moe_options: further arguments of `nn.moe.MoE`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_classes: int,
        *,
        hidden: int = 128,
        num_experts: int = 8,
        expert_hidden: int = 128,
        top_k: int = 1,
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
        **moe_options: Any,
    ):
        self.into = Linear(math.prod(input_shape), hidden, dtype=dtype, rngs=rngs)
        self.moe = MoE(hidden, expert_hidden, num_experts, top_k=top_k, dtype=dtype, rngs=rngs, **moe_options)
        self.norm = RMSNorm(hidden)
        self.head = Linear(hidden, num_classes, dtype=dtype, rngs=rngs)
        self.dtype = dtype

    def __call__(self, x: Shaped[Array, "example *shape"]) -> Float[Array, "example class"]:
        x = as_float(x, self.dtype).reshape(x.shape[0], -1)
        return self.head(self.norm(self.moe(jax.nn.relu(self.into(x)))))
