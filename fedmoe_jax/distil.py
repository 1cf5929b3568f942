"""Distils the router of statistics into plain router rows, so that the global model serves as any other: `top_k` experts a token.

The server has no data, but the Gaussians of what each expert was sent (`posterior`). It draws features from them and fits the rows of a
linear router, x W[expert], to the posterior of these features by the cross-entropy (Hinton et al., "Distilling the Knowledge in a Neural
Network", 2015), with L-BFGS.
"""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Key, PyTree

from fedmoe_jax.experts import Partition, RouterParam, Slots, bind, groups, layers, num_experts, partition
from fedmoe_jax.posterior import Statistics, gaussians, posteriors

SAMPLES = 8192
"""Features that are drawn, as many for each expert."""
STEPS = 60
"""Steps of L-BFGS."""
_RIDGE = 1e-4  # of the logits' size, so that rows stay finite where experts are apart


def weights(parts: Partition, experts: PyTree, shared: PyTree, statistics: tuple[Statistics, ...]) -> PyTree:
    """The expert weights of the global model with distilled router rows. Features are drawn in the same way each time.

    Raises:
      ValueError: if a MoE layer has no `RouterParam`, or several.
    """
    return _weights(parts.graphdef, experts, shared, parts.rest, statistics)


def routers(model: nnx.Module) -> list[RouterParam]:
    """The router rows of every layer, in the order of `experts.layers`.

    Raises:
      ValueError: if a MoE layer has no `RouterParam`, or several.
    """
    nodes, each = list(nnx.iter_graph(model)), []
    for _, state in layers(model):
        (owner,) = (path[:-1] for path, node in nodes if node is state)
        found = [node for path, node in nodes if isinstance(node, RouterParam) and path[: len(owner)] == owner]
        if len(found) != 1:
            raise ValueError(f"router is 'distilled', but the model has a MoE layer with {len(found)} RouterParams")
        each += found
    return each


@functools.partial(jax.jit, static_argnums=0)
def _weights(graphdef, experts, shared, rest, statistics):
    parts = Partition(graphdef, experts, shared, rest)
    number = len(groups(experts)) * num_experts(experts)
    model = bind(parts, experts, shared, Slots(jnp.ones(number, bool), jnp.zeros(number)))
    for router, layer in zip(routers(model), statistics, strict=True):
        router.set_value(rows(layer, router.get_value(), jax.random.key(0)))
    return partition(model).experts


def rows(layer: Statistics, start: Float[Array, "expert feature"], key: Key[Array, ""]) -> Float[Array, "expert feature"]:
    """The router rows of a layer that are nearest to its posterior, or `start` where nothing was seen yet, or nothing that makes sense."""
    features, share = _drawn(layer, key)
    (router,) = posteriors((layer,))
    target = share[:, None] * jax.nn.softmax(router.logits(features))
    scale = jnp.sqrt((share[:, None] * features**2).sum(0)) + 1e-6

    def loss(scaled):
        logits = jnp.matmul(features / scale, scaled.T, precision="highest")
        return -(target * jax.nn.log_softmax(logits)).sum() + _RIDGE * (scaled**2).sum()

    solver, value_and_grad = optax.lbfgs(), optax.value_and_grad_from_state(loss)

    def step(carry, _):
        scaled, state = carry
        value, grad = value_and_grad(scaled, state=state)
        updates, state = solver.update(grad, state, scaled, value=value, grad=grad, value_fn=loss)
        return (optax.apply_updates(scaled, updates), state), None

    scaled = jnp.zeros(start.shape)
    (scaled, _), _ = jax.lax.scan(step, (scaled, solver.init(scaled)), length=STEPS)
    return jnp.where(layer.count.any() & jnp.isfinite(scaled).all(), scaled / scale, start).astype(start.dtype)


def _drawn(layer: Statistics, key: Key[Array, ""]) -> tuple[Float[Array, "sample feature"], Float[Array, " sample"]]:
    """Features of each expert's Gaussians, and the share of all tokens that each stands for."""
    number, each = len(layer.count), -(-SAMPLES // len(layer.count))
    centre, mean, covariance = gaussians(layer)
    of_class, noise = jax.random.split(key)
    label = jax.random.categorical(of_class, jnp.log(layer.count)[:, None], shape=(number, each))
    noise = jax.random.normal(noise, (number, each, len(centre)))
    size, axes = jax.lax.map(jnp.linalg.eigh, covariance)  # one at a time, as in `posterior`; rounding can make sizes negative
    root = jnp.einsum("edk,ek,efk->edf", axes, jnp.sqrt(jnp.maximum(size, 0)), axes, precision="highest")
    spread = jnp.einsum("edf,enf->end", root, noise, precision="highest")
    features = centre + mean[jnp.arange(number)[:, None], label] + spread
    share = layer.count.sum(1) / jnp.maximum(layer.count.sum(), 1e-9) / each
    return features.reshape(number * each, -1), jnp.repeat(share, each)
