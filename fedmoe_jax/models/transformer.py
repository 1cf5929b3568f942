"""A decoder-only language model with Mixture-of-Experts layers, in the shape of Mixtral, Qwen3-MoE and OLMoE."""

from typing import Any

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from fedmoe_jax.kernels import lookup, matmul
from fedmoe_jax.nn.attention import Attention
from fedmoe_jax.nn.linear import Linear, RMSNorm, variance_scaling
from fedmoe_jax.nn.moe import MoE


class Layer(nnx.Module):
    """x + attention(norm(x)), then x + experts(norm(x)).

    What is added to x starts `residual_scale` times smaller, so that the embedding is not drowned.
    """

    def __init__(self, features: int, *, attention: Attention, moe: MoE, residual_scale: float):
        for weight in (attention.o.kernel, moe.w_out):
            weight.set_value(weight.get_value() * residual_scale)
        self.attention_norm = RMSNorm(features)
        self.attention = attention
        self.moe_norm = RMSNorm(features)
        self.moe = moe

    def __call__(self, x: Float[Array, "example token feature"]) -> Float[Array, "example token feature"]:
        x = x + self.attention(self.attention_norm(x))
        return x + self.moe(self.moe_norm(x))


class Transformer(nnx.Module):
    """embedding -> layers of causal attention and SwiGLU experts -> RMSNorm -> head. No biases, rotary positions.

    Args:
      vocabulary: number of token ids.
      layers, features: depth and width.
      heads, kv_heads, head_dim, qk_norm, rope_base: see `nn.attention.Attention`.
      attention: its `implementation`, "xla", "cudnn" or None for the latter where it can be.
      num_experts, top_k: experts of each layer, and how many a token uses.
      per_layer: whether the experts of each layer follow an assignment of their own; else all layers share one.
      expert_hidden: width inside an expert.
      max_length: longest text accepted; None for any.
      tie_embeddings: whether the head is the transposed embedding.
      dtype: what it computes in, default float32.
      remat: whether the backward pass computes each layer's inside again instead of keeping it in memory.
      moe_options: further arguments of `nn.moe.MoE`.
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        layers: int = 2,
        features: int = 128,
        heads: int = 4,
        kv_heads: int = 2,
        head_dim: int | None = None,
        qk_norm: str | None = None,
        rope_base: float = 10000.0,
        attention: str | None = None,
        num_experts: int = 8,
        top_k: int = 2,
        per_layer: bool = False,
        expert_hidden: int = 256,
        max_length: int | None = None,
        tie_embeddings: bool = False,
        dtype: DTypeLike | None = None,
        remat: bool = False,
        rngs: nnx.Rngs,
        **moe_options: Any,
    ):
        of_heads: dict[str, Any] = dict(heads=heads, kv_heads=kv_heads, head_dim=head_dim, qk_norm=qk_norm, rope_base=rope_base)
        moe: dict[str, Any] = dict(top_k=top_k, activation="swiglu", use_bias=False) | moe_options

        def layer(index):
            group: dict[str, Any] = dict(group=f"layers.{index}") if per_layer else {}
            return Layer(
                features,
                attention=Attention(features, **of_heads, implementation=attention, dtype=dtype, rngs=rngs),
                moe=MoE(features, expert_hidden, num_experts, **moe, **group, dtype=dtype, rngs=rngs),
                residual_scale=(2 * layers) ** -0.5,
            )

        self.embedding = nnx.Param(variance_scaling(rngs.params(), (vocabulary, features), features))
        self.layers = nnx.List([layer(index) for index in range(layers)])
        self.norm = RMSNorm(features)
        self.head = None if tie_embeddings else Linear(features, vocabulary, use_bias=False, dtype=dtype, rngs=rngs)
        self.max_length = max_length
        self.dtype = dtype
        self.remat = remat

    def __call__(self, x: Int[Array, "example token"]) -> Float[Array, "example token vocabulary"]:
        """Logits of the next token at each position.

        Args:
          x: token ids, 0 to vocabulary - 1.

        Raises:
          ValueError: if the text is longer than `max_length`.
        """
        if self.max_length is not None and x.shape[1] > self.max_length:
            raise ValueError(f"x has {x.shape[1]} tokens, max_length is {self.max_length}")
        embedding = self.embedding.get_value()
        h = lookup(embedding, x)
        h = h if self.dtype is None else h.astype(self.dtype)
        apply = nnx.remat(Layer.__call__) if self.remat else Layer.__call__
        for layer in self.layers:
            h = apply(layer, h)
        h = self.norm(h)
        return matmul(h, embedding.T) if self.head is None else self.head(h)
