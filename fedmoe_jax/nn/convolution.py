"""A 3 x 3 convolution whose gradient stays quick where each client has a kernel of its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fedmoe_jax.gpu import is_portable

_LAYOUT = ("NHWC", "HWIO", "NHWC")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(
    x: Float[Array, "example height width in"], kernel: Float[Array, "3 3 in out"], stride: int = 1
) -> Float[Array, "example new_height new_width out"]:
    """x convolved with the kernel, zeros around it, in the dtype of x.

    XLA's gradient of a kernel for each client is one small convolution for each client on a GPU. Here it is one product of the shifted
    images with the shifted gradients for all of them, accumulated in float32. Gradients exist in reverse mode only.
    """
    return convolved(x, kernel, stride)


def convolved(
    x: Float[Array, "example height width in"], kernel: Float[Array, "3 3 in out"], stride: int = 1
) -> Float[Array, "example new_height new_width out"]:
    """As `convolve`, but that its gradients are XLA's."""
    return jax.lax.conv_general_dilated(x, kernel.astype(x.dtype), (stride, stride), ((1, 1), (1, 1)), dimension_numbers=_LAYOUT)


def _forward(x, kernel, stride):
    return convolved(x, kernel, stride), (x, kernel)


def _backward(stride, saved, gradient):
    x, kernel = saved
    (of_x,) = jax.vjp(lambda x: convolved(x, kernel, stride), x)[1](gradient)
    return of_x, of_kernel(x, gradient, stride).astype(kernel.dtype)


def of_kernel(
    x: Float[Array, "example height width in"], gradient: Float[Array, "example new_height new_width out"], stride: int = 1
) -> Float[Array, "3 3 in out"]:
    """Gradient of the kernel, in float32, or double."""
    return _of_kernel(x, gradient) if stride == 1 else _of_strided_kernel(x, gradient, stride)


def _of_kernel(x, gradient):
    """Gradient of the kernel. Columns are shifted in the images and rows in the gradients, so that neither is copied nine times."""
    height, width = x.shape[1:3]
    columns = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (0, 0)))
    columns = jnp.concatenate([columns[:, :, shift : shift + width] for shift in range(3)], -1)
    rows = jnp.pad(gradient, ((0, 0), (1, 1), (0, 0), (0, 0)))
    rows = jnp.concatenate([rows[:, 2 - shift : 2 - shift + height] for shift in range(3)], -1)
    product = jnp.einsum("nhwi,nhwo->io", columns, rows, preferred_element_type=jnp.promote_types(jnp.float32, x.dtype))
    return product.reshape(3, x.shape[-1], 3, gradient.shape[-1]).transpose(2, 0, 1, 3)


def _of_strided_kernel(x, gradient, stride):
    product = jnp.einsum("nhwi,nhwo->io", patches(x, stride), gradient, preferred_element_type=jnp.promote_types(jnp.float32, x.dtype))
    return product.reshape(3, 3, x.shape[-1], gradient.shape[-1])


def patches(x: Float[Array, "example height width channel"], stride: int) -> Float[Array, "example new_height new_width 9*channel"]:
    """What each position of a 3 x 3 convolution reads, ordered (row, column, channel).

    A GPU looks them up by a table, which is quicker there; a CPU joins nine shifts of the image. On a GPU gradients exist in reverse
    mode only.
    """
    return _looked_up(x, stride) if on_gpu() else _joined(x, stride)


def on_gpu() -> bool:
    """Whether a model is traced for a GPU, and not as on any machine."""
    return jax.default_backend() == "gpu" and not is_portable()


def _joined(x, stride):
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return jnp.concatenate([padded[:, i : i + height : stride, j : j + width : stride] for i in range(3) for j in range(3)], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _looked_up(x, stride):
    examples, height, width, channels = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))).reshape(examples, (height + 2) * (width + 2), channels)
    rows, columns = np.arange(0, height, stride), np.arange(0, width, stride)
    corner, offset = (width + 2) * rows[:, None] + columns, (width + 2) * np.arange(3)[:, None] + np.arange(3)
    found = padded.at[:, corner[..., None] + offset.reshape(-1)].get(mode="promise_in_bounds")
    return found.reshape(examples, len(rows), len(columns), 9 * channels)


def _add_joined(stride, x, gradient):
    """The gradient is that of the joined shifts: they are added without atomics, so that it has the same bits in each run."""
    return jax.vjp(lambda x: _joined(x, stride), x)[1](gradient)


convolve.defvjp(_forward, _backward)
_looked_up.defvjp(lambda x, stride: (_looked_up(x, stride), x), _add_joined)
