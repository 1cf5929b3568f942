"""Layers whose parameters every client holds: Linear, 3 x 3 convolution, RMSNorm, GroupNorm, and reading raw inputs."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key, Shaped

from fedmoe_jax import gpu
from fedmoe_jax.kernels import matmul
from fedmoe_jax.nn import implicit
from fedmoe_jax.nn.convolution import convolve, on_gpu, patches

_FEW = 128  # bytes of all channels of a position, up to which patches that are not written down were the quickest


@functools.partial(jax.jit, static_argnames=("shape", "fan_in", "scale"))
def variance_scaling(key: Key[Array, ""], shape: tuple[int, ...], fan_in: int, scale: float = 1.0) -> Float[Array, "..."]:
    """Normal initial weights, truncated at two standard deviations, of variance scale / fan_in."""
    std = math.sqrt(scale / fan_in) / 0.87962566  # the standard deviation that the truncation leaves
    return std * jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32)


def as_float(x: Shaped[Array, "*shape"], dtype: DTypeLike | None = None) -> Float[Array, "*shape"]:
    """Inputs as a model computes with them: uint8 is scaled from 0..255 to 0..1, everything else only cast.

    `dtype` defaults to float32; floating inputs keep their own.
    """
    if jnp.issubdtype(x.dtype, jnp.floating):
        return x if dtype is None else x.astype(dtype)
    values = x.astype(jnp.float32) / 255 if x.dtype == jnp.uint8 else x.astype(jnp.float32)
    return values if dtype is None else values.astype(dtype)


class Linear(nnx.Module):
    """x @ kernel + bias, on the last axis. Parameters are float32; `dtype` is what it computes in, by default that of x."""

    def __init__(self, in_features: int, out_features: int, *, use_bias: bool = True, dtype: DTypeLike | None = None, rngs: nnx.Rngs):
        self.kernel = nnx.Param(variance_scaling(rngs.params(), (in_features, out_features), in_features))
        self.bias = nnx.Param(jnp.zeros(out_features)) if use_bias else None
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*rows in"]) -> Float[Array, "*rows out"]:
        x = x if self.dtype is None else x.astype(self.dtype)
        y = matmul(x, self.kernel.get_value())
        return y if self.bias is None else y + self.bias.get_value().astype(y.dtype)


class Conv(nnx.Module):
    """3 x 3 convolution with zero padding and without bias. Kernel [9 * in, out], rows ordered (row, column, channel).

    Clients have kernels of their own. A convolution with a kernel for each client runs as a grouped convolution, or as a batched
    product of patches, which are written down or not; each is the quickest for some layers (`benchmarks/convolutions.py`).

    Args:
      in_features, out_features: channels.
      stride: between positions of the output.
      method: "matmul", the nine shifts of the image times one matrix, which is all that the dual engine takes; "implicit", the same
        without writing the shifts down (`implicit.convolve`), in kernels of our own on NVIDIA GPUs, elsewhere as the next one;
        "convolution", XLA's, but for the gradient of the kernel (`convolution.convolve`); or "auto", what was the quickest for most
        layers of clients on an H200: on a GPU and without stride "implicit" up to 32 channels in float32 and 64 in 16 bits where
        kernels run, else "convolution" with as many channels out as in and on images of 16 x 16 or more. Gradients exist in reverse
        mode only, but for "matmul" elsewhere than on a GPU.
      dtype: what it computes in, by default that of x.

    Raises:
      ValueError: if there is no such method, or it takes no stride.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        stride: int = 1,
        method: str = "auto",
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        if method not in ("auto", "matmul", "convolution", "implicit"):
            raise ValueError(f"method is {method!r}, must be 'auto', 'matmul', 'convolution' or 'implicit'")
        if method == "implicit" and stride != 1:
            raise ValueError(f"stride is {stride}, must be 1 where method is 'implicit'")
        self.linear = Linear(9 * in_features, out_features, use_bias=False, dtype=dtype, rngs=rngs)
        self.shape = 3, 3, in_features, out_features
        self.stride = stride
        self.method = method

    def __call__(self, x: Float[Array, "example height width in"]) -> Float[Array, "example new_height new_width out"]:
        """The output has ceil(height / stride) rows and ceil(width / stride) columns."""
        method = self._quickest(x) if self.method == "auto" else self.method
        if method == "matmul":
            return self.linear(patches(x, self.stride))
        x = x if self.linear.dtype is None else x.astype(self.linear.dtype)
        kernel = self.linear.kernel.get_value().reshape(self.shape)
        return implicit.convolve(x, kernel) if method == "implicit" else convolve(x, kernel, self.stride)

    def _quickest(self, x):
        if not on_gpu() or self.stride > 1:
            return "matmul"
        size = jnp.dtype(self.linear.dtype or x.dtype).itemsize
        if gpu.has_kernels() and size <= 4 and max(self.shape[2:]) * size <= _FEW:
            return "implicit"
        return "convolution" if self.shape[2] == self.shape[3] and min(x.shape[1:3]) >= 16 else "matmul"


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, computed in float32 (Zhang and Sennrich, 2019)."""

    def __init__(self, features: int, *, epsilon: float = 1e-5):
        self.scale = nnx.Param(jnp.ones(features))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*rows feature"]) -> Float[Array, "*rows feature"]:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt((wide**2).mean(-1, keepdims=True) + self.epsilon)
        return (wide * self.scale.get_value()).astype(x.dtype)


class GroupNorm(nnx.Module):
    """Normalises each example over all positions and the channels of a group, in float32 (Wu and He, 2018).

    It keeps no statistics of other examples, so clients need not share any. `groups` must divide `features`.
    """

    def __init__(self, features: int, groups: int, *, epsilon: float = 1e-5):
        if features % groups:
            raise ValueError(f"groups is {groups}, must divide features, which is {features}")
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.groups = groups
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "example *position feature"]) -> Float[Array, "example *position feature"]:
        wide = x.astype(jnp.float32).reshape(x.shape[0], -1, self.groups, x.shape[-1] // self.groups)
        mean = wide.mean((1, 3), keepdims=True)
        variance = ((wide - mean) ** 2).mean((1, 3), keepdims=True)
        wide = ((wide - mean) * jax.lax.rsqrt(variance + self.epsilon)).reshape(x.shape)
        return (wide * self.scale.get_value() + self.bias.get_value()).astype(x.dtype)
