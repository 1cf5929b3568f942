"""A slow oracle for the MoE layer, with small layers and inputs to compare on."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fedmoe_jax.experts import ExpertParam, Slots
from fedmoe_jax.nn.moe import MoE

CLIENTS, EXAMPLES, TOKENS, FEATURES, HIDDEN, SLOTS = 4, 6, 20, 5, 7, 8
CAPACITY = 0.6


def layer(mode="dense", **options):
    options = {"top_k": 2, "token_capacity": CAPACITY if mode == "limited" else None, "z_weight": 0.1, "balance_weight": 0.3} | options
    model = MoE(FEATURES, HIDDEN, SLOTS, **options, rngs=nnx.Rngs(0))
    key = jax.random.key(1)
    for path, variable in nnx.iter_graph(model):  # biases start at 0 and the router near it, which would hide mistakes
        if isinstance(variable, ExpertParam) and path[-1] in ("b_in", "b_out", "router"):
            key, drawn = jax.random.split(key)
            variable.set_value(jax.random.normal(drawn, variable.shape))
    return model


def split(model):
    """(weights by name, call), call(weights, x, held, prior, mask) -> (y, tokens, penalty)."""
    graphdef, state, rest = nnx.split(model, nnx.Param, ...)

    def call(weights, x, held, prior=None, mask=None):
        bound = nnx.merge(graphdef, state, rest, copy=True)
        for name, weight in weights.items():
            getattr(bound, name).set_value(weight)
        bound.slots.set_value(Slots(held=held, prior=jnp.zeros(SLOTS) if prior is None else prior, mask=mask))
        y = bound(x)
        return y, bound.slots.get_value().tokens, bound.slots.get_value().penalty

    return {path[0]: variable.get_value() for path, variable in nnx.to_flat_state(state)}, jax.jit(call)


def scenario(seed, clients=CLIENTS):
    """Inputs, and slots with empty places, priors and masked examples; client 0 holds nothing, client 1 everything."""
    random = np.random.default_rng(seed)
    held = random.random((clients, SLOTS)) < 0.6
    held[0], held[1:2] = False, True
    mask = random.random((clients, EXAMPLES)) < 0.7
    x = random.normal(size=(clients, EXAMPLES, TOKENS, FEATURES)).astype(np.float32)
    prior = random.normal(size=(clients, SLOTS)).astype(np.float32)
    return x, held, prior, mask


def softmax(values):
    values = np.exp(values - values.max())
    return values / values.sum()


def expert(weights, e, x):
    hidden = x @ weights["w_in"][e] + weights.get("b_in", np.zeros((SLOTS, 1)))[e]
    if "w_gate" in weights:
        gate = x @ weights["w_gate"][e]
        hidden = gate / (1 + np.exp(-gate)) * hidden
    else:
        hidden = np.maximum(hidden, 0)
    return hidden @ weights["w_out"][e] + weights.get("b_out", np.zeros((SLOTS, 1)))[e]


def oracle(weights, x, held, prior, mask, *, top_k, limit=None, at=None, balance_weight=0.3, z_weight=0.1):
    """One client's layer, token by token in float64 -> (y, tokens, penalty). `at`: (router, x) where a single choice has gate 1."""
    experts = np.flatnonzero(held)
    tokens, y = np.zeros(x.shape[:1] + held.shape), np.zeros(x.shape[:-1] + weights["w_out"].shape[-1:])
    if not len(experts) or not mask.any():
        return y, tokens, 0.0
    order, probabilities, z = [], [], []
    for b, t in np.ndindex(x.shape[:2]):
        if not mask[b]:
            continue
        logits = weights["router"][experts] @ x[b, t] + prior[experts]
        p = softmax(logits)
        probabilities.append(p)
        z.append(np.log(np.exp(logits).sum()) ** 2)
        best = np.argsort(-logits, kind="stable")[:top_k]
        gates = p[best] / p[best].sum()
        if top_k == 1:
            gates = p[best] / softmax(at[0][experts] @ at[1][b, t] + prior[experts])[best]
        order += [(rank, b, t, experts[i], g) for rank, (i, g) in enumerate(zip(best, gates, strict=True))]
    chosen = np.bincount([e for _, _, _, e, _ in order], minlength=len(held))[experts]
    penalty = balance_weight * len(experts) * (chosen / chosen.sum() * np.mean(probabilities, 0)).sum() + z_weight * np.mean(z)
    for _, b, t, e, gate in sorted(order, key=lambda pair: pair[:3]):
        if limit is None or tokens[:, e].sum() < limit:
            tokens[b, e] += 1
            y[b, t] += gate * expert(weights, e, x[b, t])
    return y, tokens, penalty


def limit_of(mode, top_k):
    return math.ceil(CAPACITY * EXAMPLES * TOKENS * top_k / SLOTS) if mode == "limited" else None
