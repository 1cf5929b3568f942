"""The two networks of the workload in plain JAX, for simulators that take a loss function."""

import functools

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
    return functools.reduce(jnp.maximum, _four(x))


def _windows(x):
    examples, height, width, channels = x.shape
    return x.reshape(examples, height // 2, 2, width // 2, 2, channels)


def _four(x):
    windows = _windows(x)
    return [windows[:, :, row, :, column] for row in (0, 1) for column in (0, 1)]


def _forward(x):
    """Kept is a bit for each of the four, set where it is the largest."""
    most = _pooled(x)
    bits = sum((part == most).astype(jnp.uint8) << place for place, part in enumerate(_four(x)))
    return most, jax.lax.optimization_barrier(bits)


def _gradient(bits, gradient):
    """The largest share it evenly."""
    share = gradient / jax.lax.population_count(bits)
    place = jnp.arange(4, dtype=jnp.uint8).reshape(2, 1, 2, 1)
    largest = bits[:, :, None, :, None] >> place & 1 > 0
    examples, height, width, channels = gradient.shape
    return (jnp.where(largest, share[:, :, None, :, None], 0).reshape(examples, 2 * height, 2 * width, channels),)


_pooled.defvjp(_forward, _gradient)


def loss(weights, x, y):
    """Mean cross-entropy."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits(weights, x)), y[:, None], 1).mean()
