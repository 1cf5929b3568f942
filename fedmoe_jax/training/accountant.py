"""What a private run costs: (epsilon, delta) after some rounds, by dp-accounting, and the noise that a budget takes.

A round is a Gaussian mechanism on what one client adds to the sum of clipped updates (see `aggregation.privacy`), and where scores are not
withheld a second one; noise multipliers z and f together are one of (z^-2 + f^-2)^(-1/2). The assumption that each `sampling` makes:

  none      neighbours differ in one client, whose data are replaced by nothing in all rounds (zero-out). It may be in every cohort, and
            everybody may know who is. Holds for any aligner.
  poisson   the same, but each client is in a cohort by a coin of its own, of which nobody sees the outcome; in cohorts with too many, as
            many as are too many are left out at random.
  fixed     the same, but a cohort is a uniform sample of a fixed size, unseen.

The last two, amplification by sampling, need aligners that look at each client alone, such as `random` and `full`: others give clients
other experts where one is not in the cohort. They need withheld scores, too, as what a client reports tells that it was there, and that
nothing is kept of the rounds in which it was: no error feedback and, with a deadline, no pace.
"""

import dataclasses
import functools
import math
import secrets
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedmoe_jax.aggregation.clip import Bound
from fedmoe_jax.aggregation.privacy import Private
from fedmoe_jax.round import State
from fedmoe_jax.training.config import TrainConfig, num_clients

SAMPLING = ("none", "poisson", "fixed")
ASSUMPTIONS = {
    "none": "zero-out of one client's data, which may be in every round; cohorts and assignments are known; no amplification by sampling",
    "poisson": "zero-out of one client's data; cohorts are Poisson samples that nobody sees, and each client's experts depend on it alone",
    "fixed": "zero-out of one client's data; cohorts are uniform samples that nobody sees, and each client's experts depend on it alone",
}
_GRIDS, _COARSE = ((30, 1e-4), (300, 1e-3)), 1e-2  # epsilon without sampling, and the grid of losses that serves below it


class Sampling(NamedTuple):
    """How cohorts are drawn: `kind` of `SAMPLING`; for the others than "none" the `population`, and the size that cohorts have at most.

    `rate` is the chance of each client to be drawn, with "poisson".
    """

    kind: str = "none"
    population: int = 0
    cohort: int = 0
    rate: float = 1.0


ALWAYS = Sampling()
"""Every client may be in every cohort."""


class Spent(NamedTuple):
    """A budget that is spent, and under which assumption."""

    epsilon: float
    delta: float
    rounds: int
    noise_multiplier: float
    assumption: str


def secret(state: State) -> State:
    """The state with a key of noise that the operating system draws: nobody who knows the seed, and no other run, has it."""
    if state.private is None:
        return state
    data = jax.random.key_data(state.private.key)
    drawn = np.frombuffer(secrets.token_bytes(data.nbytes), data.dtype).reshape(data.shape)
    key = jax.random.wrap_key_data(jnp.asarray(drawn), impl=jax.random.key_impl(state.private.key))
    return dataclasses.replace(state, private=dataclasses.replace(state.private, key=key))


def together(*noise_multipliers: float | None) -> float:
    """The noise multiplier of one Gaussian mechanism that costs as much as these at once; None costs nothing, 0 has no noise."""
    known = [value for value in noise_multipliers if value is not None]
    if not known:
        return math.inf
    return sum(value**-2 for value in known) ** -0.5 if all(known) else 0.0


def epsilon(rounds: int, *, noise_multiplier: float, delta: float, sampling: Sampling = ALWAYS) -> float:
    """Epsilon after so many rounds; infinite without noise, 0 without rounds.

    Without sampling it is exact [1]; otherwise an upper bound by privacy loss distributions.

    Args:
      noise_multiplier: of all that a round asks of a client, see `together`.
      delta: above 0 and below 1.

    Raises:
      ValueError: if an argument is out of its range, or dp-accounting is not installed.

    References:
      [1] Balle and Wang, "Improving the Gaussian Mechanism for Differential Privacy", ICML 2018.
    """
    _check(rounds, delta, sampling)
    accounting = _dp_accounting()
    if rounds == 0 or noise_multiplier == math.inf:
        return 0.0
    if noise_multiplier <= 0:
        return math.inf
    if sampling.kind == "none":
        return float(accounting.get_epsilon_gaussian(noise_multiplier / math.sqrt(rounds), delta))
    return _sampled(accounting, rounds, noise_multiplier, delta, sampling)


@functools.lru_cache
def noise_multiplier(target: float, rounds: int, *, delta: float, sampling: Sampling = ALWAYS) -> float:
    """The least noise multiplier, to a thousandth of it, that keeps epsilon at `target` or below after so many rounds.

    Raises:
      ValueError: as `epsilon`, or if no multiplier up to 10,000 does.
    """
    if not 0 < target < math.inf:
        raise ValueError(f"target_epsilon is {target}, it must be above 0")

    def keeps(value: float) -> bool:
        return epsilon(rounds, noise_multiplier=value, delta=delta, sampling=sampling) <= target

    _check(rounds, delta, sampling)
    high = float(_dp_accounting().get_sigma_gaussian(target, delta)) * math.sqrt(rounds) * (1 + 1e-6)
    if high > 1e4 and not keeps(1e4):
        raise ValueError(f"target_epsilon is {target}, which takes a noise_multiplier above 10,000")
    high = low = min(high, 1e4)
    if sampling.kind == "none":
        return high
    while keeps(low) and low > 1e-2:
        low, high = low / 2, low
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if keeps(middle) else (middle, high)
    return high


def spent(private: Private, rounds: int, *, delta: float, sampling: Sampling = ALWAYS) -> Spent:
    """What a run with this private aggregator has spent after so many rounds.

    Raises:
      ValueError: as `epsilon`, or if scores that are not withheld meet sampling other than "none".
    """
    if private.feedback_multiplier is not None and sampling.kind != "none":
        raise ValueError(f"sampling is {sampling.kind!r}, but scores tell who was there: withhold them, or take 'none'")
    each = together(private.noise_multiplier, private.feedback_multiplier)
    return Spent(
        epsilon(rounds, noise_multiplier=each, delta=delta, sampling=sampling), delta, rounds, each, ASSUMPTIONS[sampling.kind]
    )  # fmt: skip


def sampling_of(config: TrainConfig) -> Sampling:
    """What a configuration lets count on."""
    population = num_clients(config)
    if not config.secret_cohorts or population is None:
        return ALWAYS
    if config.sampling_rate is None:
        return Sampling("fixed", population, config.cohort)
    return Sampling("poisson", population, config.cohort, config.sampling_rate)


def multiplier(config: TrainConfig) -> float | None:
    """The noise multiplier of updates that a configuration asks for, or that its target takes; None without noise.

    Raises:
      ValueError: as `noise_multiplier`, or if the scores alone cost more than the target.
    """
    if config.target_epsilon is None:
        return config.noise_multiplier
    sampling, target = sampling_of(config), config.target_epsilon
    whole = noise_multiplier(target, config.rounds, delta=config.target_delta, sampling=sampling)
    if config.feedback_noise is None:
        return whole
    if config.feedback_noise <= whole:
        raise ValueError(f"feedback_noise: must be above {whole:.4g}, lest scores alone cost target_epsilon, got {config.feedback_noise}")
    return (whole**-2 - config.feedback_noise**-2) ** -0.5


def of_run(config: TrainConfig, rounds: int) -> Spent | None:
    """What a run has spent after so many rounds; None if it has no noise.

    Raises:
      ValueError: as `multiplier`.
    """
    noise = multiplier(config)
    if noise is None:
        return None
    private = Private(Bound(config.clip_norm or math.inf, config.clip_quantile), noise, config.feedback_noise)
    return spent(private, rounds, delta=config.target_delta, sampling=sampling_of(config))


def account(config: TrainConfig, rounds: int) -> dict[str, Any]:
    """What summary.json tells of it: {"privacy": the fields of `Spent`}, or nothing without noise.

    Raises:
      ValueError: as `multiplier`.
    """
    found = of_run(config, rounds)
    return {} if found is None else {"privacy": found._asdict()}


def told(privacy: Mapping[str, Any]) -> str:
    """The "privacy" of a summary as one line; an epsilon of None is infinite."""
    known = privacy["epsilon"] is not None and math.isfinite(privacy["epsilon"])
    shown = f"epsilon {privacy['epsilon']:.3g}" if known else "infinite epsilon"
    return f"{shown} at delta {privacy['delta']:.3g} after {privacy['rounds']} rounds: {privacy['assumption']}"


def _sampled(accounting: Any, rounds: int, noise_multiplier: float, delta: float, sampling: Sampling) -> float:
    """Epsilon with amplification. A fixed size is what is left where all are drawn and too many are left out."""
    relation = accounting.NeighboringRelation.REPLACE_SPECIAL
    rate = sampling.rate if sampling.kind == "poisson" else 1.0
    unsampled = float(accounting.get_epsilon_gaussian(noise_multiplier / math.sqrt(rounds), delta))
    if unsampled > 3000:  # distributions of so large losses do not fit into memory
        return unsampled
    event = accounting.TruncatedSubsampledGaussianDpEvent(sampling.population, rate, sampling.cohort, noise_multiplier)
    interval = next((gap for most, gap in _GRIDS if unsampled < most), _COARSE)
    accountant = accounting.pld.PLDAccountant(relation, value_discretization_interval=interval)
    return min(unsampled, float(accountant.compose(event, rounds).get_epsilon(delta)))


def _check(rounds: int, delta: float, sampling: Sampling) -> None:
    if rounds < 0:
        raise ValueError(f"rounds is {rounds}, it must be at least 0")
    if not 0 < delta < 1:
        raise ValueError(f"target_delta is {delta}, it must be above 0 and below 1")
    if sampling.kind not in SAMPLING:
        raise ValueError(f"sampling is {sampling.kind!r}, it must be {', '.join(SAMPLING)}")
    if sampling.kind != "none" and not 0 < sampling.cohort <= sampling.population:
        raise ValueError(f"cohort is {sampling.cohort}, it must be 1 to the population, {sampling.population}")
    if not 0 < sampling.rate <= 1:
        raise ValueError(f"rate is {sampling.rate}, it must be above 0 and at most 1")


def _dp_accounting() -> Any:
    try:
        import dp_accounting
    except ImportError:
        raise ValueError(
            "noise_multiplier: dp-accounting, which tells what it costs, is missing: pip install 'fedmoe-jax[privacy]'"
        ) from None
    return dp_accounting
