"""Causal grouped-query attention with rotary positions, in the shape of Mixtral, Qwen3-MoE and OLMoE."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from fedmoe_jax.gpu import is_portable
from fedmoe_jax.nn.linear import Linear, RMSNorm


def rotate(x: Float[Array, "example token head feature"], position: Int[Array, " token"], base: float) -> Float[Array, "..."]:
    """Rotary position embedding: turns the pair (x[i], x[i + feature / 2]) by position * base ** (-2 i / feature).

    Products of rotated queries and keys depend on the difference of their positions only (Su et al., "RoFormer", 2021).
    Angles are computed in float32.
    """
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = position[:, None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    left, right = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1).astype(x.dtype)


def is_fused(shape: tuple[int, ...], dtype: DTypeLike) -> bool:
    """Whether cuDNN's fused attention is used: in bfloat16, for shapes that it takes, on an NVIDIA GPU of compute capability 8 or 9.

    Args:
      shape: of the queries, (example, token, head, feature).
    """
    _, tokens, _, head_dim = shape
    if is_portable() or jax.config.values["jax_default_device"] is not None:  # it may run elsewhere
        return False
    takes = tokens > 1 and tokens % 2 == 0 and head_dim % 8 == 0 and head_dim <= 128
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))  # "gfx90a" of AMD's, none of a CPU
    return takes and jnp.dtype(dtype) == jnp.bfloat16 and capability.split(".")[0] in ("8", "9")


class Attention(nnx.Module):
    """Each token looks at itself and earlier tokens. Groups of heads / kv_heads query heads share a key and value head.

    Args:
      features: width of the layer.
      heads, kv_heads: query heads; key and value heads, which must divide them.
      head_dim: width of a head, even; default features / heads.
      qk_norm: RMSNorm of queries and keys, over each "head" (Qwen3) or the whole "projection" (OLMoE); default none.
      rope_base: base of the rotary frequencies.
      dtype: what it computes in, by default the dtype of x. The softmax is computed in float32.
      implementation: "xla", "cudnn", or None for the latter where `is_fused` says so. On an H200 cuDNN's outputs and gradients are
        as near to those in float32 as XLA's (benchmarks/results/attention.jsonl).

    Raises:
      ValueError: naming the argument that does not fit.
      RuntimeError, NotImplementedError: from JAX when it is called, if "cudnn" is asked for where that cannot be.
    """

    def __init__(
        self,
        features: int,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int | None = None,
        qk_norm: str | None = None,
        rope_base: float = 10000.0,
        dtype: DTypeLike | None = None,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        if implementation not in (None, "xla", "cudnn"):
            raise ValueError(f"implementation is {implementation!r}, must be 'xla', 'cudnn' or None")
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"kv_heads is {kv_heads}, must divide heads, which is {heads}")
        if head_dim is None and features % heads:
            raise ValueError(f"heads is {heads}, must divide features, which is {features}, or head_dim be given")
        head_dim = features // heads if head_dim is None else head_dim
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"head_dim is {head_dim}, must be even and at least 2: rotary positions turn pairs")
        if qk_norm not in (None, "head", "projection"):
            raise ValueError(f"qk_norm is {qk_norm!r}, must be 'head', 'projection' or None")

        def linear(fan_in, fan_out):
            return Linear(fan_in, fan_out, use_bias=False, dtype=dtype, rngs=rngs)

        self.q = linear(features, heads * head_dim)
        self.k = linear(features, kv_heads * head_dim)
        self.v = linear(features, kv_heads * head_dim)
        self.o = linear(heads * head_dim, features)
        self.q_norm = None if qk_norm is None else RMSNorm(head_dim if qk_norm == "head" else heads * head_dim)
        self.k_norm = None if qk_norm is None else RMSNorm(head_dim if qk_norm == "head" else kv_heads * head_dim)
        self.qk_norm = qk_norm
        self.head_dim = head_dim
        self.rope_base = rope_base
        self.implementation = implementation

    def __call__(self, x: Float[Array, "example token feature"]) -> Float[Array, "example token feature"]:
        position = jnp.arange(x.shape[1])
        q = rotate(self._heads(self.q(x), self.q_norm), position, self.rope_base)
        k = rotate(self._heads(self.k(x), self.k_norm), position, self.rope_base)
        used: Any = self.implementation or ("cudnn" if is_fused(q.shape, q.dtype) else "xla")
        y = jax.nn.dot_product_attention(q, k, self._heads(self.v(x), None), is_causal=True, implementation=used)
        return self.o(y.reshape(*x.shape[:2], -1))

    def _heads(self, x, norm):
        """Float[example token head*feature] to Float[example token head feature], normalised on either side of the split."""
        x = norm(x) if norm is not None and self.qk_norm == "projection" else x
        x = x.reshape(*x.shape[:2], -1, self.head_dim)
        return norm(x) if norm is not None and self.qk_norm == "head" else x
