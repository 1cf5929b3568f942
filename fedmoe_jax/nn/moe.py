"""The Mixture-of-Experts layer: routes each token to held experts only, with E experts on the server and K slots on a client."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from fedmoe_jax.experts import ExpertParam, RouterParam, Slots, SlotState
from fedmoe_jax.kernels import expert_matmul, matmul
from fedmoe_jax.nn import dispatch, routing
from fedmoe_jax.nn.linear import Linear, variance_scaling

_ACTIVATIONS: dict[str, Callable] = {"relu": jax.nn.relu, "gelu": jax.nn.gelu, "swiglu": jax.nn.silu}


class FeedForward(nnx.Module):
    """A dense feed-forward network that every client holds; "swiglu" has a gate projection (Shazeer, 2020)."""

    def __init__(
        self, features: int, hidden: int, out_features: int, *, activation: str, use_bias: bool, dtype: DTypeLike | None, rngs: nnx.Rngs
    ):
        linear: dict[str, Any] = dict(use_bias=use_bias, dtype=dtype, rngs=rngs)
        self.into = Linear(features, hidden, **linear)
        self.gate = Linear(features, hidden, **linear) if activation == "swiglu" else None
        self.out = Linear(hidden, out_features, **linear)
        self.activation = activation

    def __call__(self, x: Float[Array, "*rows feature"]) -> Float[Array, "*rows out"]:
        act = _ACTIVATIONS[self.activation]
        hidden = act(self.into(x)) if self.gate is None else act(self.gate(x)) * self.into(x)
        return self.out(hidden)


class MoE(nnx.Module):
    """A feed-forward layer of experts of which each token uses `top_k`.

    The number of experts is the leading size of the weights at call time, not `num_experts`, so the same module runs
    with the K slots of a client. `slots` says which of them are held; after a call it holds the tokens of each example
    sent to each slot, and the auxiliary loss.

    Parameters, the expert axis leading: `router` [E, D], `w_in` [E, D, H], `w_gate` [E, D, H] ("swiglu" only), `w_out`
    [E, H, D'], `b_in` [E, H] and `b_out` [E, D'] (with `use_bias`), all float32. Rows are computed in one of three
    ways, chosen from static sizes. Dropless: "dense" runs every slot on every token; "tiled" sorts tokens by slot, where
    that computes less than half as many rows. With `token_capacity`, "limited" drops what a slot cannot take.

    Args:
      features, hidden, out_features: widths D, H and D' (default D).
      num_experts: E.
      top_k: experts a token uses; gates of the chosen ones sum to 1. See `routing.route` for the gradient of top_k = 1.
      activation: "relu", "gelu", or "swiglu": silu(x w_gate) * (x w_in).
      use_bias: default True, False for "swiglu".
      renormalize: False leaves the gates as probabilities over all held experts.
      balance_weight, z_weight: weights of `routing.balance_loss` and `routing.z_loss` in the auxiliary loss.
      token_capacity: a slot takes at most ceil(token_capacity * pairs / slots) of the (token, choice) pairs, overflow
        gets nothing from it. First choices go before second ones, then earlier tokens before later ones.
      shared_experts: adds a dense network of width shared_experts * hidden that every client holds and every token uses.
      group: name of the assignment that the experts follow, see `experts.ExpertParam`.
      dtype: what experts compute in, by default the dtype of x. The router computes in float32 always.
      rngs: initial weights.

    Raises:
      ValueError: naming the argument that is out of range.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        num_experts: int,
        *,
        top_k: int = 1,
        activation: str = "relu",
        use_bias: bool | None = None,
        renormalize: bool = True,
        balance_weight: float = 0.01,
        z_weight: float = 1e-3,
        token_capacity: float | None = None,
        shared_experts: int = 0,
        out_features: int | None = None,
        group: str | None = None,
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        _check(features, hidden, num_experts, top_k, activation, token_capacity, shared_experts)
        out_features = features if out_features is None else out_features
        use_bias = activation != "swiglu" if use_bias is None else use_bias

        def weights(fan_in, fan_out, scale):
            return ExpertParam(variance_scaling(rngs.params(), (num_experts, fan_in, fan_out), fan_in, scale), group=group)

        # Equal rows would send every token to the first slot, so the router starts small but not at zero.
        self.router = RouterParam(variance_scaling(rngs.params(), (num_experts, features), features, 0.1), group=group)
        self.w_in = weights(features, hidden, 1.0 if activation == "swiglu" else 2.0)
        self.w_gate = weights(features, hidden, 1.0) if activation == "swiglu" else None
        self.w_out = weights(hidden, out_features, 1.0)
        self.b_in = ExpertParam(jnp.zeros((num_experts, hidden)), group=group) if use_bias else None
        self.b_out = ExpertParam(jnp.zeros((num_experts, out_features)), group=group) if use_bias else None
        self.shared = (
            FeedForward(features, shared_experts * hidden, out_features, activation=activation, use_bias=use_bias, dtype=dtype, rngs=rngs)
            if shared_experts
            else None
        )
        self.slots = SlotState(Slots(held=jnp.ones(num_experts, bool), prior=jnp.zeros(num_experts)))
        self.top_k = top_k
        self.activation = activation
        self.renormalize = renormalize
        self.balance_weight = balance_weight
        self.z_weight = z_weight
        self.token_capacity = token_capacity
        self.dtype = dtype

    def __call__(self, x: Float[Array, "example *position feature"]) -> Float[Array, "example *position out"]:
        """The gated sum of the chosen experts, exactly 0 for masked examples and where no expert is held, plus `shared`.

        Raises:
          ValueError: if the weights and `slots` have different numbers of experts.
        """
        slots = self.slots.get_value()
        router = self.router.get_value()
        if len(slots.held) != len(router):
            raise ValueError(f"slots.held has {len(slots.held)} entries, the weights have {len(router)} experts: use experts.bind")
        tokens = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        mask = jnp.ones(x.shape[0], bool) if slots.mask is None else slots.mask
        real = jnp.repeat(mask, math.prod(x.shape[1:-1]), total_repeat_length=len(tokens))
        if slots.posterior is None:
            logits = matmul(tokens.astype(jnp.float32), router.astype(jnp.float32).T) + slots.prior
            routed = routing.route(logits, slots.held, real, top_k=self.top_k, renormalize=self.renormalize)
        else:
            logits = slots.posterior.logits(tokens)
            routed = routing.route(logits, slots.held, real, top_k=len(router))
        y, sent = self._experts(tokens if self.dtype is None else tokens.astype(self.dtype), routed, slots.posterior is not None)
        self.slots.set_value(
            dataclasses.replace(
                slots,
                tokens=routing.tokens_per_example(routed.slot, sent, len(router), x.shape[0]),
                penalty=self.balance_weight * routing.balance_loss(routed, slots.held, real)
                + self.z_weight * routing.z_loss(logits, slots.held, real),
                seen=(tokens, routing.dense_gates(routed, len(router))) if slots.observe else None,
            )
        )
        y = y.reshape(*x.shape[:-1], y.shape[-1])
        return y if self.shared is None else y + self.shared(x)

    def _experts(
        self, x: Float[Array, "token feature"], routed: routing.Routing, dropless: bool
    ) -> tuple[Float[Array, "token out"], Bool[Array, "choice token"]]:
        """The gated sum of experts for each token, and which choices were computed."""
        slots, pairs = routed.probability.shape[1], routed.slot.size
        if self.token_capacity is not None and not dropless:
            limit = min(math.ceil(self.token_capacity * pairs / slots), len(x))
            layout = dispatch.limited(routed.slot, routed.active, slots, limit)
            expert = None  # tile e is that of slot e
        elif 2 * dispatch.tiled_rows(pairs, slots) < slots * len(x):
            layout = dispatch.tiled(routed.slot, routed.active, slots)
            expert = layout.expert
        else:
            rows = self._feed_forward(jnp.broadcast_to(x, (slots, *x.shape)), None)
            gates = routing.dense_gates(routed, slots).astype(rows.dtype)
            return jnp.einsum("en,enh->nh", gates, rows), routed.active
        rows = self._feed_forward(dispatch.dispatch(x, layout), expert)
        return dispatch.combine(rows, routed.gate, layout), layout.kept

    def _feed_forward(self, rows, expert):
        """Float[group, token, D] to Float[group, token, D'], group g being tokens of expert[g], or of expert g."""

        def project(values, weight, bias):
            y = expert_matmul(values, weight.get_value(), expert)
            if bias is None:
                return y
            bias = bias.get_value()
            return y + (bias if expert is None else bias[expert])[:, None].astype(y.dtype)

        act = _ACTIVATIONS[self.activation]
        hidden = project(rows, self.w_in, self.b_in)
        hidden = act(hidden) if self.w_gate is None else act(project(rows, self.w_gate, None)) * hidden
        return project(hidden, self.w_out, self.b_out)


def mix_all(model: nnx.Module) -> None:
    """Makes every `MoE` of a model send each token to all experts, with the probabilities of its router as gates.

    Raises:
      ValueError: if the model has none, but layers of its own.
    """
    found = [layer for _, layer in nnx.iter_graph(model) if isinstance(layer, MoE)]
    if not found:
        raise ValueError("router is 'soft', but the model has no nn.MoE layer")
    for layer in found:
        layer.top_k, layer.token_capacity, layer.renormalize = layer.router.shape[0], None, True


def _check(features, hidden, num_experts, top_k, activation, token_capacity, shared_experts):
    for name, value in (("features", features), ("hidden", hidden), ("num_experts", num_experts)):
        if value < 1:
            raise ValueError(f"{name} is {value}, must be at least 1")
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k is {top_k}, must be from 1 to num_experts, which is {num_experts}")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, must be one of {', '.join(_ACTIVATIONS)}")
    if token_capacity is not None and not token_capacity > 0:
        raise ValueError(f"token_capacity is {token_capacity}, must be above 0, or None for no limit")
    if shared_experts < 0:
        raise ValueError(f"shared_experts is {shared_experts}, must be 0 or more")
