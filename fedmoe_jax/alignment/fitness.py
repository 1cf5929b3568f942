"""Dynamic fitness scoring: how well each expert suits each client, a moving average learnt from training feedback.

With s the score of a pair in this round, Q <- (1 - beta) Q + beta s, for scored pairs only. They differ in s:

  solo             exp(-alpha loss) of an expert used alone on a local batch; held and probed experts
  loss_driven      exp(-alpha loss) of the tokens that the client's router sent to the expert
  accuracy_driven  accuracy of those tokens
  usage_driven     share of the client's tokens that its router sent to the expert

All other pairs keep Q, or decay to the prior with `forget`. The cost of a round depends on the cohort alone.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from fedmoe_jax.base import NO_EXPERT, Alignment, Cohort, Feedback, Fitness, pytree

SPREAD_RATE = 0.1
"""Weight of a round in the moving average of the spread."""
ROUNDS_TO_TELL = 50
"""Rounds before the spread is believed: experts that are to differ start alike."""


@pytree
class FitnessState:
    """Q and what makes it lazy: a client's row is brought up to date only when the client is seen.

    `count` is how often each pair was scored; it has no columns when exploration is off. `seen` is the round up to
    which a client's row is decayed, `round` the number of updates so far. `spread` is how much the scores of experts differ that a
    client tried in the same round: their standard deviation over their mean, a moving average from 0 over the `told` rounds in which
    some client tried several. By solo evaluation they are scored on the same examples.
    """

    value: Float[Array, "population expert"]
    count: Float[Array, "population counted"]
    seen: Int[Array, " population"]
    round: Int[Array, ""]
    spread: Float[Array, ""]
    told: Int[Array, ""]

    def differs(self, least_spread: float) -> Bool[Array, ""]:
        """Whether experts differ by at least so much to clients, or it is too early to tell."""
        spread = self.spread / (1 - (1 - SPREAD_RATE) ** jnp.maximum(self.told, 1))
        return (spread >= least_spread) | (self.told < ROUNDS_TO_TELL)


def solo(
    *, beta: float = 0.6, alpha: float = 1.0, probes: int = 1, prior: float = 1.0, exploration: float = 0.0, forget: float = 0.0
) -> Fitness:
    """Fitness from each expert used alone on a local batch: s = exp(-alpha solo_loss), in (0, 1] for losses >= 0.

    The mixture's accuracy hardly tells its experts apart; an expert alone does.

    Args:
      beta: weight of the newest score, above 0, at most 1.
      alpha: how fast the score falls with the loss, positive.
      probes: unheld experts that each client also tries in a round.
      prior: Q of a pair never scored. High values make clients try every expert.
      exploration: weight of the bonus sqrt(log(1 + n_c) / (1 + n_ce)), n_ce scores of the pair, n_c of the client [1].
      forget: share of the distance to the prior that pairs without a new score lose each round, 0 to 1.

    Raises:
      ValueError: if an argument is out of its range.

    References:
      [1] Auer, Cesa-Bianchi and Fischer, "Finite-time analysis of the multiarmed bandit problem", 2002 (UCB1).
    """
    _check(alpha=alpha, probes=probes)

    def pairs(alignment: Alignment, feedback: Feedback):
        expert = jnp.concatenate([alignment.held, alignment.probed], axis=1)
        valid = ~jnp.isnan(feedback.solo_loss) & (feedback.examples[:, None] > 0)  # not all compilers give exp(nan) as nan
        return expert, jnp.exp(-alpha * feedback.solo_loss), valid

    return _moving_average(pairs, beta=beta, prior=prior, exploration=exploration, forget=forget, probes=probes)


def loss_driven(*, beta: float = 0.6, alpha: float = 1.0, prior: float = 1.0, exploration: float = 0.0, forget: float = 0.0) -> Fitness:
    """Fitness from the mean loss of the tokens routed to the expert: s = exp(-alpha loss). Arguments as in `solo`."""
    _check(alpha=alpha)

    def pairs(alignment: Alignment, feedback: Feedback):
        return alignment.held, jnp.exp(-alpha * feedback.loss), ~jnp.isnan(feedback.loss) & (feedback.tokens > 0)

    return _moving_average(pairs, beta=beta, prior=prior, exploration=exploration, forget=forget)


def accuracy_driven(*, beta: float = 0.6, prior: float = 1.0, exploration: float = 0.0, forget: float = 0.0) -> Fitness:
    """Fitness from the accuracy of the tokens routed to the expert: s = correct, 0 to 1. Arguments as in `solo`."""

    def pairs(alignment: Alignment, feedback: Feedback):
        return alignment.held, feedback.correct, feedback.tokens > 0

    return _moving_average(pairs, beta=beta, prior=prior, exploration=exploration, forget=forget)


def usage_driven(*, beta: float = 0.6, prior: float = 1.0, exploration: float = 0.0, forget: float = 0.0) -> Fitness:
    """Fitness from the share of the client's tokens routed to the expert, 0 to 1. Arguments as in `solo`.

    A held expert that got no token of a client that has some is scored 0: that, too, is usage.
    """

    def pairs(alignment: Alignment, feedback: Feedback):
        total = feedback.tokens.sum(axis=1, keepdims=True)
        return alignment.held, feedback.tokens / jnp.maximum(total, 1), jnp.broadcast_to(total > 0, feedback.tokens.shape)

    return _moving_average(pairs, beta=beta, prior=prior, exploration=exploration, forget=forget)


def ranked(fitness: Fitness) -> Fitness:
    """A fitness with each client's scores replaced by their ranks, so that no client has more say than another whatever it reports.

    The score of an expert is the share of the other experts that suit the client no better than it, 0 to 1; equal ones share the highest
    place. So the r-th best of a client is at most (r - 1) / (E - 1) below its best, exactly that where it tells all experts apart. Who
    claims that one expert suits it perfectly, and the others not at all, bids no more for it than an honest client for its favourite;
    who claims the same of all bids for none. How much better an expert is no longer counts.

    The state, what is probed, and what is learnt are those of `fitness`.
    """

    def score(state: PyTree, client: Int[Array, " client"]) -> Float[Array, "client expert"]:
        value = fitness.score(state, client)
        no_better = jax.vmap(lambda row: jnp.searchsorted(jnp.sort(row), row, side="right"))(value)
        return (no_better - 1) / max(value.shape[1] - 1, 1)

    return fitness._replace(score=score)


def _moving_average(pairs, *, beta: float, prior: float, exploration: float, forget: float, probes: int = 0) -> Fitness:
    """The Fitness whose `pairs(alignment, feedback)` gives (expert, score, valid), each [client, pair]."""
    _check(beta=beta, prior=prior, exploration=exploration, forget=forget)
    counted = exploration > 0

    def init(num_clients: int, num_experts: int) -> FitnessState:
        return FitnessState(
            value=jnp.full((num_clients, num_experts), prior, jnp.float32),
            count=jnp.zeros((num_clients, num_experts if counted else 0), jnp.float32),
            seen=jnp.zeros(num_clients, jnp.int32),
            round=jnp.zeros((), jnp.int32),
            spread=jnp.zeros(()),
            told=jnp.zeros((), jnp.int32),
        )

    def rows(state: FitnessState, client: Int[Array, " client"]):
        """Value and count of some clients, decayed up to now."""
        keep = jnp.power(1.0 - forget, (state.round - state.seen[client])[:, None])
        return prior + (state.value[client] - prior) * keep, state.count[client] * keep

    def score(state: FitnessState, client: Int[Array, " client"]) -> Float[Array, "client expert"]:
        value, count = rows(state, client)
        if not counted:
            return value
        return value + exploration * jnp.sqrt(jnp.log1p(count.sum(axis=1, keepdims=True)) / (1.0 + count))

    def update(state: FitnessState, cohort: Cohort, alignment: Alignment, feedback: Feedback) -> FitnessState:
        value, count = rows(state, cohort.client)
        scored, new = _to_experts(value.shape[1], *pairs(alignment, feedback))
        value = jnp.where(scored, (1.0 - beta) * value + beta * new, prior + (value - prior) * (1.0 - forget))
        count = jnp.where(scored, count + 1.0, count * (1.0 - forget)) if counted else count
        tried = scored & cohort.present[:, None]
        row = jnp.where(cohort.present, cohort.client, state.seen.shape[0])  # absent rows fall off the end
        return FitnessState(
            value=state.value.at[row].set(value, mode="drop"),
            count=state.count.at[row].set(count, mode="drop"),
            seen=state.seen.at[row].set(state.round + 1, mode="drop"),
            round=state.round + 1,
            spread=_spread(state.spread, new, tried),
            told=state.told + (tried.sum(axis=1) > 1).any(),
        )

    return Fitness(init, score, update, probes)


def _to_experts(
    num_experts: int, expert: Int[Array, "client pair"], score: Float[Array, "client pair"], valid: Bool[Array, "client pair"]
) -> tuple[Bool[Array, "client expert"], Float[Array, "client expert"]]:
    """Which experts got a usable score, and the scores, from slots to columns of experts."""
    valid = valid & (expert != NO_EXPERT) & jnp.isfinite(score)
    column = jnp.where(valid, expert, num_experts)
    row = jnp.arange(expert.shape[0])[:, None]
    shape = (expert.shape[0], num_experts)
    scored = jnp.zeros(shape, bool).at[row, column].set(True, mode="drop")
    return scored, jnp.zeros(shape, jnp.float32).at[row, column].set(score.astype(jnp.float32), mode="drop")


def _spread(old: Float[Array, ""], score: Float[Array, "client expert"], scored: Bool[Array, "client expert"]) -> Float[Array, ""]:
    """The moving average after a round, of clients that scored at least two experts; `old` if there are none.

    Sorted, so that the order of the cohort changes not even a rounding.
    """
    if score.shape[1] < 2:
        return old
    number = scored.sum(axis=1)
    mean = (score * scored).sum(axis=1) / jnp.maximum(number, 1)
    variance = (jnp.where(scored, score - mean[:, None], 0) ** 2).sum(axis=1) / jnp.maximum(number - 1, 1)
    each = jnp.where(number > 1, jnp.sqrt(variance) / jnp.maximum(jnp.abs(mean), 1e-6), 0)
    new = jnp.sort(each, stable=False).sum() / jnp.maximum((number > 1).sum(), 1)
    return jnp.where((number > 1).any(), (1 - SPREAD_RATE) * old + SPREAD_RATE * new, old)


def _check(**arguments: float | int) -> None:
    allowed = {
        "beta": (lambda v: 0 < v <= 1, "above 0, at most 1"),
        "alpha": (lambda v: 0 < v < float("inf"), "positive"),
        "probes": (lambda v: v >= 0, "0 or more"),
        "prior": (lambda v: abs(v) < float("inf"), "finite"),
        "exploration": (lambda v: 0 <= v < float("inf"), "0 or more"),
        "forget": (lambda v: 0 <= v <= 1, "0 to 1"),
    }
    for name, value in arguments.items():
        accepts, words = allowed[name]
        if not accepts(value):
            raise ValueError(f"{name} is {value}, it must be {words}")
