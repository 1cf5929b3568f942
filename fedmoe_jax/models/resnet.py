"""A small residual network for images, with a Mixture of Experts on its pooled features."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from fedmoe_jax.nn.linear import Conv, GroupNorm, Linear, RMSNorm, as_float
from fedmoe_jax.nn.moe import MoE


class Block(nnx.Module):
    """Two 3 x 3 convolutions around a shortcut, which is a projection where the shape changes (He et al., 2016)."""

    def __init__(self, in_features: int, features: int, *, stride: int, groups: int, dtype: DTypeLike | None, rngs: nnx.Rngs):
        self.conv1 = Conv(in_features, features, stride=stride, dtype=dtype, rngs=rngs)
        self.norm1 = GroupNorm(features, groups)
        self.conv2 = Conv(features, features, dtype=dtype, rngs=rngs)
        self.norm2 = GroupNorm(features, groups)
        changes = stride != 1 or in_features != features
        self.shortcut = Linear(in_features, features, use_bias=False, dtype=dtype, rngs=rngs) if changes else None
        self.stride = stride

    def __call__(self, x: Float[Array, "example height width in"]) -> Float[Array, "example new_height new_width out"]:
        y = jax.nn.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return jax.nn.relu(y + (x if self.shortcut is None else self.shortcut(self._strided(x))))

    def _strided(self, x):
        # XLA's compiler for GPUs aborts when it fuses this slice into the product that follows (seen with JAX 0.11.2).
        return x if self.stride == 1 else jax.lax.optimization_barrier(x[:, :: self.stride, :: self.stride])


class ResNet(nnx.Module):
    """conv -> stages of residual blocks -> mean over positions -> MoE -> RMSNorm -> Linear.

    Every stage after the first halves height and width. GroupNorm keeps no statistics, so clients share none. The
    experts are where FLEX-MoE (arXiv 2512.23070) has them: after the last convolution, with nothing around them.

    Args:
      input_shape: (height, width, channels) of one image, or (height, width) for one channel.
      num_classes: outputs.
      widths: channels of each stage.
      blocks: residual blocks a stage.
      num_experts, top_k: experts, and how many an example uses.
      expert_hidden: width inside an expert.
      dtype: what it computes in, by default float32, or the dtype of floating inputs.
      moe_options: further arguments of `nn.moe.MoE`.

    Raises:
      ValueError: naming `input_shape`, if that is no image, or `widths`, if there are none.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_classes: int,
        *,
        widths: Sequence[int] = (16, 32, 64),
        blocks: int = 1,
        num_experts: int = 8,
        expert_hidden: int = 128,
        top_k: int = 1,
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
        **moe_options: Any,
    ):
        if len(input_shape) not in (2, 3):
            raise ValueError(f"input_shape is {tuple(input_shape)}, the resnet needs (height, width) or (height, width, channels)")
        if not widths or min(widths) < 1:
            raise ValueError(f"widths is {tuple(widths)}, must be one or more positive numbers")
        channels = input_shape[2] if len(input_shape) == 3 else 1
        self.stem = Conv(channels, widths[0], dtype=dtype, rngs=rngs)
        self.stem_norm = GroupNorm(widths[0], math.gcd(8, widths[0]))
        stack, before = [], widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                stack.append(Block(before, width, stride=stride, groups=math.gcd(8, width), dtype=dtype, rngs=rngs))
                before = width
        self.blocks = nnx.List(stack)
        self.moe = MoE(before, expert_hidden, num_experts, top_k=top_k, dtype=dtype, rngs=rngs, **moe_options)
        self.norm = RMSNorm(before)
        self.head = Linear(before, num_classes, dtype=dtype, rngs=rngs)
        self.dtype = dtype

    def __call__(self, x: Shaped[Array, "example height width *channel"]) -> Float[Array, "example class"]:
        x = as_float(x, self.dtype)
        x = x[..., None] if x.ndim == 3 else x
        x = jax.nn.relu(self.stem_norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(self.moe(x.mean((1, 2)))))
