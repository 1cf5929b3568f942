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
        x = pooled(jax.nn.relu(x + weights[f"{name}_bias"]))
    return x.reshape(len(x), -1) @ weights["out"] + weights["out_bias"]


def pooled(x):
    """The largest of each 2 x 2 positions."""
    examples, height, width, channels = x.shape
    x = x.reshape(examples, height // 2, 2, width, channels)
    x = jnp.maximum(x[:, :, 0], x[:, :, 1]).reshape(examples, height // 2, width // 2, 2, channels)
    return jnp.maximum(x[:, :, :, 0], x[:, :, :, 1])  # the gradient of a max over two axes takes twice as long


def loss(weights, x, y):
    """Mean cross-entropy."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits(weights, x)), y[:, None], 1).mean()
