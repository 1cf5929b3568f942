"""Accounts of privacy against the formula of the Gaussian mechanism, numerical integration, and jax-privacy; noise for a target."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import integrate, stats

from fedmoe_jax.aggregation.clip import Bound
from fedmoe_jax.aggregation.privacy import Private
from fedmoe_jax.training import accountant, named
from fedmoe_jax.training.accountant import Sampling
from fedmoe_jax.training.config import TrainConfig, validate

pytest.importorskip("dp_accounting", reason="accounts need the extra privacy")
DELTA = 1e-5
PRIVATE = TrainConfig(clip_norm=1.0, noise_multiplier=1.0)


COINS = Sampling("poisson", 1000, 60, 0.02)


def delta_of(epsilon, noise_multiplier, rounds):
    """Of so many Gaussian mechanisms, which are one of a root of their number less noise: Balle and Wang 2018, theorem 8."""
    mean = math.sqrt(rounds) / noise_multiplier
    return stats.norm.cdf(mean / 2 - epsilon / mean) - math.exp(epsilon) * stats.norm.cdf(-mean / 2 - epsilon / mean)


@pytest.mark.parametrize(("noise", "rounds"), [(0.8, 1), (2.0, 10), (20.0, 300), (5.0, 1000)])
def test_without_sampling_epsilon_is_exact(noise, rounds):
    epsilon = accountant.epsilon(rounds, noise_multiplier=noise, delta=DELTA)
    assert delta_of(epsilon, noise, rounds) == pytest.approx(DELTA, rel=1e-4)


def mixture_delta(epsilon, noise, rate):
    """The larger of both directions for one round of a Poisson sample, by integration: a number that is there with a chance of `rate`."""

    def densities(x):
        out = stats.norm.pdf(x, scale=noise)
        return out, (1 - rate) * out + rate * stats.norm.pdf(x, loc=1, scale=noise)

    def excess(x, way):
        pair = densities(x)
        return np.maximum(pair[way] - math.exp(epsilon) * pair[1 - way], 0.0)

    x = np.linspace(-12 * noise, 1 + 12 * noise, 200_001)
    return max(integrate.trapezoid(excess(x, way), x) for way in (0, 1))


def test_a_poisson_sample_costs_what_integration_says():
    sampling = Sampling("poisson", 1000, 1000, 0.1)
    epsilon = accountant.epsilon(1, noise_multiplier=1.0, delta=1e-3, sampling=sampling)
    assert mixture_delta(epsilon, 1.0, 0.1) == pytest.approx(1e-3, rel=0.02)


def test_sampling_costs_less_the_rarer_clients_are_and_more_where_cohorts_are_cut_off():
    def epsilon(*sampling):
        return accountant.epsilon(50, noise_multiplier=1.0, delta=DELTA, sampling=Sampling(*sampling))

    always, often, seldom = epsilon(), epsilon("poisson", 1000, 1000, 0.2), epsilon("poisson", 1000, 1000, 0.02)
    assert seldom < often < always
    assert often < epsilon("poisson", 1000, 205, 0.2) <= epsilon("fixed", 1000, 205) <= always
    assert epsilon("fixed", 1000, 20) > seldom  # another client takes the place
    assert epsilon("fixed", 20, 20) == pytest.approx(always, rel=1e-3)


def test_jax_privacy_agrees_on_poisson_samples():
    oracle = pytest.importorskip("jax_privacy.accounting", reason="an oracle that the package does not need")
    params = oracle.analysis.DpParams(noise_multipliers=1.1, batch_size=20, num_samples=1000, delta=DELTA)
    theirs = oracle.analysis.DpsgdTrainingAccountant(oracle.accountants.PldAccountantConfig()).compute_epsilon(100, params)
    ours = accountant.epsilon(100, noise_multiplier=1.1, delta=DELTA, sampling=Sampling("poisson", 1000, 1000, 0.02))
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_ends_of_the_scale():
    assert accountant.epsilon(0, noise_multiplier=1.0, delta=DELTA) == 0
    assert accountant.epsilon(5, noise_multiplier=0.0, delta=DELTA) == math.inf
    assert accountant.epsilon(5, noise_multiplier=math.inf, delta=DELTA) == 0
    huge = accountant.epsilon(1000, noise_multiplier=0.05, delta=DELTA, sampling=Sampling("fixed", 100, 50))
    assert 1000 < huge < math.inf


def test_noise_multipliers_add_up_as_inverse_squares():
    assert accountant.together(3.0, 4.0) == pytest.approx(12 / 5)
    assert accountant.together(3.0, None) == 3.0 and accountant.together(3.0, 0.0) == 0.0 and accountant.together(None) == math.inf
    private = Private(Bound(1.0), 3.0, 4.0)
    spent = accountant.spent(private, 10, delta=DELTA)
    assert spent.epsilon == accountant.epsilon(10, noise_multiplier=12 / 5, delta=DELTA)
    assert "no amplification" in spent.assumption and spent.rounds == 10 and spent.delta == DELTA
    with pytest.raises(ValueError, match="sampling is 'fixed', but scores tell who was there"):
        accountant.spent(private, 10, delta=DELTA, sampling=Sampling("fixed", 100, 10))


@pytest.mark.parametrize("sampling", [accountant.ALWAYS, Sampling("fixed", 4, 3)])
def test_the_noise_for_a_target_keeps_it_and_hardly_more(sampling):
    noise = accountant.noise_multiplier(0.3, 2, delta=DELTA, sampling=sampling)
    for factor, keeps in ((1.0, True), (0.998, False)):
        assert (accountant.epsilon(2, noise_multiplier=factor * noise, delta=DELTA, sampling=sampling) <= 0.3) == keeps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rounds=-1), "rounds is -1"),
        (dict(delta=0.0), "target_delta is 0.0, it must be above 0 and below 1"),
        (dict(sampling=Sampling("often")), "sampling is 'often', it must be none, poisson, fixed"),
        (dict(sampling=Sampling("fixed", 5, 6)), "cohort is 6, it must be 1 to the population, 5"),
        (dict(sampling=Sampling("poisson", 5, 5, 0.0)), "rate is 0.0"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    options = dict(rounds=1, delta=DELTA, noise_multiplier=1.0) | options
    with pytest.raises(ValueError, match=message):
        accountant.epsilon(options.pop("rounds"), **options)


def test_impossible_targets_are_named():
    with pytest.raises(ValueError, match=r"target_epsilon is 0.0, it must be above 0"):
        accountant.noise_multiplier(0.0, 1, delta=DELTA)
    with pytest.raises(ValueError, match=r"target_epsilon is 1e-07, which takes a noise_multiplier above 10,000"):
        accountant.noise_multiplier(1e-7, 1000, delta=1e-9)


def test_unseen_cohorts_cost_what_the_readme_says():
    found = [accountant.epsilon(300, noise_multiplier=1.0, delta=1e-5, sampling=each) for each in (Sampling("fixed", 1000, 20), COINS)]
    assert [f"{epsilon:.3g}" for epsilon in found] == ["15.8", "2.2"]


def test_a_missing_extra_is_told(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "dp_accounting", None)
    with pytest.raises(ValueError, match=r"noise_multiplier: .* pip install 'fedmoe-jax\[privacy\]'"):
        accountant.of_run(PRIVATE, 3)
    assert accountant.of_run(TrainConfig(), 3) is None


def test_a_configuration_says_what_is_counted_on():
    hidden = dataclasses.replace(PRIVATE, aligner="random", secret_cohorts=True)
    assert accountant.sampling_of(PRIVATE) == accountant.ALWAYS
    assert accountant.sampling_of(hidden) == Sampling("fixed", 100, 20)
    assert accountant.sampling_of(dataclasses.replace(hidden, sampling_rate=0.1)) == Sampling("poisson", 100, 20, 0.1)
    assert accountant.account(TrainConfig(), 5) == {}
    infinite = accountant.account(dataclasses.replace(PRIVATE, noise_multiplier=0.0), 5)["privacy"]
    assert accountant.told(infinite).startswith("infinite epsilon at delta 1e-05 after 5 rounds: zero-out")


def test_a_configuration_makes_the_aggregator():
    made = named.aggregator(dataclasses.replace(PRIVATE, target_epsilon=2.0, noise_multiplier=None, feedback_noise=300.0))
    assert accountant.spent(made.private, 300, delta=DELTA).epsilon == pytest.approx(2.0, rel=5e-3)
    assert made.fixed == (20 * 2 / 8, 20) and made.needs == "deltas"
    with pytest.raises(ValueError, match=r"feedback_noise: must be above .*, lest scores alone cost target_epsilon, got 3"):
        named.aggregator(dataclasses.replace(PRIVATE, target_epsilon=2.0, noise_multiplier=None, feedback_noise=3.0))
    other = dataclasses.replace(PRIVATE, clip_quantile=0.5, secure_bits=16, aligner="full", availability=0.5, sampling_rate=0.16)
    made = named.aggregator(other)
    assert made.private.bound == Bound(1.0, 0.5, 0.2, 1.0) and made.fixed == (8, 8)
    assert named.aggregator(TrainConfig(secure_bits=16)).private is None


REFUSED = {
    "noise_multiplier: needs clip_norm": dict(clip_norm=None),
    "noise_multiplier: and target_epsilon: give one of them": dict(target_epsilon=1.0),
    "noise_multiplier: goes with aggregator mean": dict(aggregator="median"),
    "noise_multiplier: does not go with control_variates": dict(control_variates=True),
    "noise_multiplier: does not go with router statistics": dict(router="statistics"),
    "noise_multiplier: does not go with router personal": dict(router="personal"),
    "noise_multiplier: does not go with loss balanced_softmax": dict(loss="balanced_softmax"),
    "noise_multiplier: must be at least 0": dict(noise_multiplier=-1.0),
    "clip_quantile: goes with noise_multiplier or target_epsilon only": dict(noise_multiplier=None, clip_quantile=0.5),
    "clip_quantile: must be at most 1": dict(clip_quantile=1.5),
    "feedback_noise: goes with noise_multiplier or target_epsilon only": dict(noise_multiplier=None, feedback_noise=2.0),
    "feedback_noise: goes with fitness solo or ranked_solo, whose scores it is on, not usage": dict(feedback_noise=2.0, fitness="usage"),
    "secret_cohorts: goes with aligner random or full and min_holders 1 only": dict(secret_cohorts=True),
    "secret_cohorts: does not go with feedback_noise": dict(secret_cohorts=True, aligner="random", feedback_noise=1.0),
    "secret_cohorts: does not go with compress_share": dict(secret_cohorts=True, aligner="random", compress_share=0.1),
    "secret_cohorts: does not go with deadline": dict(secret_cohorts=True, aligner="random", deadline=1.0),
    "secret_cohorts: needs population": dict(secret_cohorts=True, aligner="random", split="natural"),
    "sampling_rate: needs population with the natural split": dict(sampling_rate=0.1, split="natural"),
    "sampling_rate: must be at most 1": dict(sampling_rate=1.5),
    "target_delta: must be at most 0.5": dict(target_delta=0.9),
    "min_holders: must be at most cohort": dict(min_holders=21),
    "secure_bits: goes with aggregator mean": dict(secure_bits=8, noise_multiplier=None, aggregator="krum"),
    "secure_bits: must be at most 30": dict(secure_bits=31),
    "secure_bits: needs min_holders of at least 2": dict(secure_bits=8),
    "secure_bits: must be less, so that clip_norm x 2\\^secure_bits x cohort is below 2\\^31": dict(secure_bits=28, min_holders=2),
    "on_divergence: must not be rollback with noise": dict(on_divergence="rollback"),
    "clip_quantile: goes with noise": dict(noise_multiplier=None, clip_quantile=0.0),
    "sampling_rate: must be at least 1 / population": dict(sampling_rate=1e-9),
    "target_delta: must be below 1 / population": dict(target_delta=0.4),
    "noise_multiplier: must be at most 10000": dict(noise_multiplier=1e300),
}


@pytest.mark.parametrize("message", list(REFUSED))
def test_what_does_not_go_together_is_refused(message):
    with pytest.raises(ValueError, match=message):
        validate(dataclasses.replace(PRIVATE, **REFUSED[message]))
    validate(PRIVATE)
