"""Global expert load monitoring: how much each expert has been trained, and how many clients it should get next."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fedmoe_jax.base import NO_EXPERT, LoadMonitor, pytree

_LOOKS, _WAYS = 8, 32  # parts into which each look splits an interval: as fine as 40 bisections, in fewer steps
_ROUNDING = 1e-4  # a target that should be whole may miss it by the last bits of a float


@pytree
class LoadState:
    """Exponentially decayed sums over rounds, and the rounds since each expert was last trained.

    `load` is what each expert was trained on, `pairs` the client-expert pairs that did it, `asked` the slots that asked
    for each expert.
    """

    load: Float[Array, " expert"]
    pairs: Float[Array, ""]
    asked: Float[Array, " expert"]
    idle: Int[Array, " expert"]


def monitor(
    *,
    decay: float = 0.99,
    tolerance: float | None = None,
    gain: float | None = None,
    demand: float = 0.0,
    count: Literal["tokens", "clients"] = "tokens",
) -> LoadMonitor:
    """Watches the load of the experts and sets the round's bounds on clients per expert.

    load <- decay load + this round's tokens (or clients) of each expert; asked and pairs likewise. With S the round's
    slots in total, N the clients that have any, E experts and `wanted` the slots that ask for each expert:

        share_e   = (1 - demand) / E + demand asked_e / sum(asked)
        deficit_e = (share_e sum(load) - load_e) / (load of one pair of client and expert)        in clients
        wish_e    = (1 - demand) S / E + demand wanted_e + gain deficit_e
        target_e  = clip(wish_e + shift, least_e, min(N, 2 ceil(max(S / E, fair part)))),  so that the targets sum to S
        lower_e   = floor((1 - tolerance) target_e)
        upper_e   = min(N, ceil((1 + tolerance) target_e))

    where the fair part is wish_e without the deficit. So 0 <= lower <= upper <= N and sum(lower) <= S <= sum(upper). An
    expert that fell behind gets up to about twice its part until it has caught up. least_e is 0, but 1 for as many of the
    stalest experts as have to be trained now so that none waits longer than ceil(E / S) rounds; lower_e is then 1, too.
    That holds if S does not change and clients send the experts tokens. The load of one pair is the mean over the pairs that
    the load remembers.

    Args:
      decay: what a round's load still counts one round later, 0 to 1. At 1 nothing is forgotten.
      tolerance: how far a round may stray from its targets for the sake of fitness, 0 or more. By default 0.1, but 0.3 where
        bounds follow demand: with 0.1, one of two runs of 48 seeds fell behind greedy choice (experiments/README.md).
      gain: share of the deficit to make up in one round, 0 or more; above 2 it oscillates. By default 1, but 0 where
        bounds follow demand: there, making up for tokens that clients did not send costs accuracy.
      demand: 0 trains all experts evenly, 1 as much as clients ask for them; between, the mixture of both.
      count: what load counts, "tokens" routed to the expert or "clients" that trained it. That is what comes out even;
        with clients of unequal size the other does not.

    Raises:
      ValueError: if an argument is out of its range.
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay is {decay}, it must be 0 to 1")
    if not 0 <= demand <= 1:
        raise ValueError(f"demand is {demand}, it must be 0 to 1")
    tolerance = (0.3 if demand else 0.1) if tolerance is None else tolerance
    if not 0 <= tolerance < float("inf"):
        raise ValueError(f"tolerance is {tolerance}, it must be 0 or more")
    gain = float(demand == 0) if gain is None else gain
    if not 0 <= gain < float("inf"):
        raise ValueError(f"gain is {gain}, it must be 0 or more")
    if count not in ("tokens", "clients"):
        raise ValueError(f'count is {count!r}, it must be "tokens" or "clients"')

    def init(num_experts: int) -> LoadState:
        none, nobody = jnp.zeros(num_experts, jnp.float32), jnp.zeros((), jnp.float32)
        return LoadState(none, nobody, jnp.zeros_like(none), jnp.zeros(num_experts, jnp.int32))

    def fair(wanted: Float[Array, " expert"], total: Float[Array, ""] | float) -> Float[Array, " expert"]:
        """`total`, shared among the experts: evenly, as they are wanted, or a mixture."""
        asked = jnp.where(wanted.sum() > 0, wanted, 1.0)
        return total * ((1.0 - demand) / wanted.shape[0] + demand * asked / asked.sum())

    def deficit(state: LoadState) -> Float[Array, " expert"]:
        pair_load = state.load.sum() / jnp.maximum(state.pairs, 1.0)
        return (fair(state.asked, state.load.sum()) - state.load) / jnp.where(pair_load > 0, pair_load, 1.0)

    def bounds(
        state: LoadState, slots: Int[Array, " client"], wanted: Float[Array, " expert"]
    ) -> tuple[Int[Array, " expert"], Int[Array, " expert"]]:
        num_experts = state.load.shape[0]
        total, clients = slots.sum(dtype=jnp.float32), (slots > 0).sum()
        part = fair(wanted, total)
        most = jnp.minimum(clients.astype(jnp.float32), 2.0 * jnp.ceil(jnp.maximum(part, total / num_experts)))
        least = _due(state.idle, total).astype(jnp.float32)
        target = _project(part + gain * deficit(state), total, least, jnp.maximum(most, least))
        lower = jnp.maximum(jnp.floor((1.0 - tolerance) * target + _ROUNDING), least)
        upper = jnp.minimum(jnp.ceil((1.0 + tolerance) * target - _ROUNDING), clients)
        return lower.astype(jnp.int32), upper.astype(jnp.int32)

    def update(
        state: LoadState, held: Int[Array, "client slot"], tokens: Int[Array, "client slot"], wanted: Float[Array, " expert"]
    ) -> LoadState:
        num_experts = state.load.shape[0]
        filled = (held != NO_EXPERT) & (tokens > 0)
        bucket = jnp.where(filled, held, num_experts).reshape(-1)

        def of_experts(amount):
            return jax.ops.segment_sum(amount.astype(jnp.float32).reshape(-1), bucket, num_segments=num_experts + 1)[:-1]

        pairs = of_experts(filled)
        new = of_experts(tokens) if count == "tokens" else pairs
        idle = jnp.where(pairs > 0, 0, state.idle + 1)
        asked = decay * state.asked + wanted if demand else state.asked
        return LoadState(decay * state.load + new, decay * state.pairs + filled.sum(), asked, idle)

    return LoadMonitor(init, bounds, update, deficit)


def wanted(score: Float[Array, "client expert"], slots: Int[Array, " client"]) -> Float[Array, " expert"]:
    """How many slots ask for each expert: what greedy choice would fill, equally fit experts sharing what is left.

    Scores must be finite; sums to the slots, where no client has more than there are experts.
    """
    num_experts = score.shape[1]
    slots = jnp.minimum(slots, num_experts)[:, None]
    ranked = jnp.sort(score, axis=1, descending=True)
    threshold = jnp.take_along_axis(ranked, jnp.maximum(slots - 1, 0), axis=1)
    above, equal = score > threshold, score == threshold
    left = (slots - above.sum(axis=1, keepdims=True)) / equal.sum(axis=1, keepdims=True)
    return jnp.where(slots > 0, above + equal * left, 0.0).sum(axis=0)


def _due(idle: Int[Array, " expert"], total: Float[Array, ""]) -> Bool[Array, " expert"]:
    """The stalest experts that have to be served now, so that each can be within ceil(E / total) rounds of its last."""
    slots = jnp.maximum(total, 1.0)
    patience = jnp.ceil(idle.shape[0] / slots)
    rank = jnp.argsort(jnp.argsort(-idle))
    now = rank + 1 - slots * jnp.maximum(patience - idle, 0.0)  # of as many as are that stale, the rest can wait
    return rank < jnp.minimum(now.max(), total)


def coefficient_of_variation(x: Float[Array, " expert"] | Int[Array, " expert"]) -> Float[Array, ""]:
    """Standard deviation over mean, 0 for perfect balance; 0 when everything is 0."""
    x = x.astype(jnp.float32)
    mean = x.mean()
    return jnp.where(mean > 0, x.std() / jnp.where(mean > 0, mean, 1.0), 0.0)


def gini(x: Float[Array, " expert"] | Int[Array, " expert"]) -> Float[Array, ""]:
    """Gini coefficient: half the mean absolute difference of two experts over the mean, 0 (even) to 1 - 1/E (all in one)."""
    x = jnp.sort(x.astype(jnp.float32), stable=False)
    total = x.sum()
    rank = jnp.arange(x.shape[0]) + 1 - 0.5 * (x.shape[0] + 1)
    return jnp.where(total > 0, 2.0 * (rank * x).sum() / (x.shape[0] * jnp.where(total > 0, total, 1.0)), 0.0)


def normalized_entropy(x: Float[Array, " expert"] | Int[Array, " expert"]) -> Float[Array, ""]:
    """Entropy of the shares over log E, 1 (even) to 0 (all in one); 1 for one expert and when everything is 0."""
    x = x.astype(jnp.float32)
    total = x.sum()
    if x.shape[0] == 1:
        return jnp.ones(())
    share = x / jnp.where(total > 0, total, 1.0)
    return jnp.where(total > 0, jax.scipy.special.entr(share).sum() / jnp.log(x.shape[0]), 1.0)


def _project(
    wish: Float[Array, " expert"], total: Float[Array, ""], least: Float[Array, " expert"], most: Float[Array, " expert"]
) -> Float[Array, " expert"]:
    """clip(wish + shift, least, most), with the shift that makes it sum to `total`, found by splitting an interval again and again."""

    def narrow(_, interval):
        low, width = interval
        width = width / _WAYS
        shifts = low + width * jnp.arange(_WAYS)
        below = jnp.clip(wish + shifts[:, None], least, most).sum(axis=1) < total
        return low + width * jnp.maximum(below.sum() - 1, 0), width

    low = (least - wish).min()
    low, width = jax.lax.fori_loop(0, _LOOKS, narrow, (low, (most - wish).max() - low), unroll=True)
    return jnp.clip(wish + (low + 0.5 * width), least, most)
