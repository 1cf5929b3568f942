"""Global expert load monitoring: how much each expert has been trained, and how many clients it should get next."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fedmoe_jax.base import NO_EXPERT, LoadMonitor, pytree

_BISECTIONS = 40
_ROUNDING = 1e-4  # a target that should be whole may miss it by the last bits of a float


@pytree
class LoadState:
    """Exponentially decayed sums over rounds: what each expert was trained on, and the pairs that trained it."""

    load: Float[Array, " expert"]
    pairs: Float[Array, ""]


def monitor(
    *, decay: float = 0.9, tolerance: float = 0.1, gain: float = 1.0, count: Literal["tokens", "clients"] = "tokens"
) -> LoadMonitor:
    """Watches the load of the experts and sets the round's bounds on clients per expert.

    load <- decay load + this round's tokens (or clients) of each expert. With S the round's slots in total, N the
    clients that have any, E experts and m = S / E:

        deficit_e = (mean load - load_e) / (load of one pair of client and expert)            in clients
        target_e  = clip(m + gain deficit_e + shift, 0, min(N, 2 ceil(m))),  shift such that the targets sum to S
        lower_e   = floor((1 - tolerance) target_e)
        upper_e   = min(N, ceil((1 + tolerance) target_e))

    So 0 <= lower <= upper <= N and sum(lower) <= S <= sum(upper). An expert that fell behind gets up to about twice the
    mean until it has caught up. The load of one pair is the mean over the pairs that the load remembers.

    Args:
      decay: what a round's load still counts one round later, 0 to below 1.
      tolerance: how far a round may stray from its targets for the sake of fitness, 0 or more.
      gain: share of the deficit to make up in one round, 0 or more; above 2 it oscillates.
      count: what load counts, "tokens" routed to the expert or "clients" that trained it.

    Raises:
      ValueError: if an argument is out of its range.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay is {decay}, it must be 0 or more and below 1")
    if not 0 <= tolerance < float("inf"):
        raise ValueError(f"tolerance is {tolerance}, it must be 0 or more")
    if not 0 <= gain < float("inf"):
        raise ValueError(f"gain is {gain}, it must be 0 or more")
    if count not in ("tokens", "clients"):
        raise ValueError(f'count is {count!r}, it must be "tokens" or "clients"')

    def init(num_experts: int) -> LoadState:
        return LoadState(jnp.zeros(num_experts, jnp.float32), jnp.zeros((), jnp.float32))

    def bounds(state: LoadState, slots: Int[Array, " client"]) -> tuple[Int[Array, " expert"], Int[Array, " expert"]]:
        total, clients = slots.sum(dtype=jnp.float32), (slots > 0).sum()
        mean = total / state.load.shape[0]
        pair_load = state.load.sum() / jnp.maximum(state.pairs, 1.0)
        deficit = (state.load.mean() - state.load) / jnp.where(pair_load > 0, pair_load, 1.0)
        most = jnp.minimum(clients.astype(jnp.float32), 2.0 * jnp.ceil(mean))
        target = _project(mean + gain * deficit, total, most)
        lower = jnp.floor((1.0 - tolerance) * target + _ROUNDING)
        upper = jnp.minimum(jnp.ceil((1.0 + tolerance) * target - _ROUNDING), clients)
        return jnp.maximum(lower, 0).astype(jnp.int32), upper.astype(jnp.int32)

    def update(state: LoadState, held: Int[Array, "client slot"], tokens: Int[Array, "client slot"]) -> LoadState:
        num_experts = state.load.shape[0]
        filled = (held != NO_EXPERT) & (tokens > 0)
        amount = jnp.where(filled, tokens if count == "tokens" else 1, 0).astype(jnp.float32)
        bucket = jnp.where(filled, held, num_experts)
        new = jax.ops.segment_sum(amount.reshape(-1), bucket.reshape(-1), num_segments=num_experts + 1)[:-1]
        return LoadState(decay * state.load + new, decay * state.pairs + filled.sum())

    return LoadMonitor(init, bounds, update)


def coefficient_of_variation(x: Float[Array, " expert"] | Int[Array, " expert"]) -> Float[Array, ""]:
    """Standard deviation over mean, 0 for perfect balance; 0 when everything is 0."""
    x = x.astype(jnp.float32)
    mean = x.mean()
    return jnp.where(mean > 0, x.std() / jnp.where(mean > 0, mean, 1.0), 0.0)


def _project(wish: Float[Array, " expert"], total: Float[Array, ""], most: Float[Array, ""]) -> Float[Array, " expert"]:
    """clip(wish + shift, 0, most), with the shift that makes it sum to `total`, found by bisection."""

    def halve(_, interval):
        low, high = interval
        middle = 0.5 * (low + high)
        below = jnp.clip(wish + middle, 0.0, most).sum() < total
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    low, high = jax.lax.fori_loop(0, _BISECTIONS, halve, (-wish.max(), most - wish.min()))
    return jnp.clip(wish + 0.5 * (low + high), 0.0, most)
