"""The two networks of the workload in plain JAX, for simulators that take a loss function."""

import jax
import jax.numpy as jnp


def logits(weights, x):
    """x [example, 28, 28] to [example, class]."""
    if "into" in weights:
        hidden = jax.nn.relu(x.reshape(len(x), -1) @ weights["into"] + weights["into_bias"])
        return hidden @ weights["out"] + weights["out_bias"]
    x = x[..., None]
    for name in ("first", "second"):
        x = jax.lax.conv_general_dilated(x, weights[name], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = activated(x, weights[f"{name}_bias"])
    return x.reshape(len(x), -1) @ weights["out"] + weights["out_bias"]


def activated(x, bias):
    """x + bias, its ReLU, and of that the largest of each 2 x 2 positions, in the order that is the quickest: the result is the same.

    After pooling the bias has less to sum in its gradient. The barrier keeps that sum in a kernel of its own, which a GPU does sooner.
    """
    if jax.default_backend() == "gpu":
        return jax.nn.relu(jax.lax.optimization_barrier(_pooled(x) + bias))
    x = _windows(jax.nn.relu(x + bias))
    x = jnp.maximum(x[:, :, 0], x[:, :, 1])
    return jnp.maximum(x[:, :, :, 0], x[:, :, :, 1])  # the gradient of a max over two axes takes twice as long


@jax.custom_vjp
def _pooled(x):
    return _windows(x).max((2, 4))


def _windows(x):
    examples, height, width, channels = x.shape
    return x.reshape(examples, height // 2, 2, width // 2, 2, channels)


def _gradient(saved, gradient):
    """The largest share it evenly."""
    x, most = saved
    largest = _windows(x) == most[:, :, None, :, None]
    share = gradient / largest.sum((2, 4))
    return (jnp.where(largest, share[:, :, None, :, None], 0).reshape(x.shape),)


def _forward(x):
    most = _pooled(x)
    return most, (x, most)


_pooled.defvjp(_forward, _gradient)


def loss(weights, x, y):
    """Mean cross-entropy."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits(weights, x)), y[:, None], 1).mean()
