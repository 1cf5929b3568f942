"""Fitness: the moving average against a plain loop over dictionaries, for every kind of score."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_jax.alignment import fitness
from fedmoe_jax.base import NO_EXPERT, Alignment, Cohort, Feedback

POPULATION, CLIENTS, EXPERTS, SLOTS, PROBES = 9, 5, 4, 2, 1
FACTORIES = {
    "solo": fitness.solo,
    "loss": fitness.loss_driven,
    "accuracy": fitness.accuracy_driven,
    "usage": fitness.usage_driven,
}


def make_round(seed):
    """A cohort with padding that repeats a client, random alignment and feedback, some of it not finite."""
    rng = np.random.default_rng(seed)
    client = rng.permutation(POPULATION)[:CLIENTS]
    present = rng.random(CLIENTS) < 0.7
    client[~present] = client[0]
    chosen = np.stack([rng.permutation(EXPERTS)[: SLOTS + PROBES] for _ in range(CLIENTS)])
    chosen[rng.random(chosen.shape) < 0.2] = NO_EXPERT
    solo_loss = rng.exponential(size=chosen.shape)
    solo_loss[rng.random(chosen.shape) < 0.1] = np.nan
    loss = rng.exponential(size=(CLIENTS, SLOTS))
    loss[rng.random(loss.shape) < 0.1] = np.inf
    return (
        Cohort(jnp.array(client), jnp.array(present), jnp.full(CLIENTS, SLOTS)),
        Alignment(jnp.array(chosen[:, :SLOTS]), jnp.array(chosen[:, SLOTS:]), jnp.zeros((CLIENTS, SLOTS)), jnp.zeros(CLIENTS)),
        Feedback(
            examples=jnp.array(rng.integers(0, 3, CLIENTS)),
            tokens=jnp.array(rng.integers(0, 3, (CLIENTS, SLOTS))),
            correct=jnp.array(rng.random((CLIENTS, SLOTS))),
            loss=jnp.array(loss),
            solo_loss=jnp.array(solo_loss),
        ),
    )


def scores_of(kind, aligned, feedback, row, alpha):
    """(expert, score) of each pair that one row of feedback scores."""
    pairs = []
    tokens = np.asarray(feedback.tokens[row])
    if kind == "solo":
        if feedback.examples[row] > 0:
            experts = [*aligned.held[row].tolist(), *aligned.probed[row].tolist()]
            pairs = [(e, math.exp(-alpha * float(v))) for e, v in zip(experts, feedback.solo_loss[row], strict=True)]
    elif kind == "usage":
        if tokens.sum():
            pairs = [(e, t / tokens.sum()) for e, t in zip(aligned.held[row].tolist(), tokens.tolist(), strict=True)]
    else:
        for slot, e in enumerate(aligned.held[row].tolist()):
            if tokens[slot] > 0:
                value = float(feedback.correct[row, slot])
                if kind == "loss":
                    value = float(jnp.exp(-alpha * feedback.loss[row, slot]))
                    if not math.isfinite(float(feedback.loss[row, slot])):
                        value = 0.0  # exp(-inf)
                pairs.append((e, value))
    return [(e, s) for e, s in pairs if e != NO_EXPERT and math.isfinite(s)]


class Oracle:
    """Every pair of the population, every round."""

    def __init__(self, kind, beta, alpha, prior, exploration, forget):
        self.kind, self.beta, self.alpha = kind, beta, alpha
        self.prior, self.exploration, self.forget = prior, exploration, forget
        self.value = np.full((POPULATION, EXPERTS), prior)
        self.count = np.zeros((POPULATION, EXPERTS))
        self.spread = self.told = 0

    def update(self, cohort, aligned, feedback):
        scored, spreads = np.zeros_like(self.value, bool), []
        for row in range(CLIENTS):
            if not cohort.present[row]:
                continue
            client = int(cohort.client[row])
            pairs = scores_of(self.kind, aligned, feedback, row, self.alpha)
            if len(pairs) > 1:
                values = [score for _, score in pairs]
                spreads.append(np.std(values, ddof=1) / max(np.mean(values), 1e-6))
            for expert, score in pairs:
                self.value[client, expert] = (1 - self.beta) * self.value[client, expert] + self.beta * score
                self.count[client, expert] += 1
                scored[client, expert] = True
        if spreads:
            self.spread += fitness.SPREAD_RATE * (np.mean(spreads) - self.spread)
            self.told += 1
        self.value = np.where(scored, self.value, self.prior + (self.value - self.prior) * (1 - self.forget))
        self.count = np.where(scored, self.count, self.count * (1 - self.forget))

    def score(self):
        bonus = np.sqrt(np.log1p(self.count.sum(1, keepdims=True)) / (1 + self.count))
        return self.value + self.exploration * bonus


@pytest.mark.parametrize("kind", FACTORIES)
@settings(deadline=None, max_examples=8)
@given(
    seed=st.integers(0, 1000),
    beta=st.floats(0.01, 1.0),
    prior=st.floats(-1.0, 2.0),
    exploration=st.sampled_from([0.0, 0.5]),
    forget=st.sampled_from([0.0, 0.2, 1.0]),
)
def test_scores_match_the_oracle(kind, seed, beta, prior, exploration, forget):
    alpha = 0.7
    options = {"beta": beta, "prior": prior, "exploration": exploration, "forget": forget}
    rule = FACTORIES[kind](**options, **({"alpha": alpha} if kind in ("solo", "loss") else {}))
    state, oracle = rule.init(POPULATION, EXPERTS), Oracle(kind, alpha=alpha, **options)
    for step in range(4):
        inputs = make_round(seed + 1000 * step)
        state = rule.update(state, *inputs)
        oracle.update(*inputs)
    everyone = jnp.arange(POPULATION)
    np.testing.assert_allclose(rule.score(state, everyone), oracle.score(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state.spread, oracle.spread, rtol=1e-4, atol=1e-6)
    assert state.told == oracle.told
    np.testing.assert_array_equal(rule.score(state, everyone[::-2]), rule.score(state, everyone)[::-2])


def test_prior_until_scored():
    rule = fitness.solo(prior=0.25)
    assert rule.probes == 1 and fitness.loss_driven().probes == 0
    assert (rule.score(rule.init(3, 5), jnp.array([0, 2])) == 0.25).all()


@pytest.mark.parametrize("kind", FACTORIES)
def test_absent_clients_change_nothing(kind):
    rule = FACTORIES[kind](exploration=0.1, forget=0.0)
    state = rule.init(POPULATION, EXPERTS)
    cohort, aligned, feedback = make_round(0)
    after = rule.update(state, Cohort(cohort.client, jnp.zeros(CLIENTS, bool), cohort.slots), aligned, feedback)
    np.testing.assert_array_equal(after.value, state.value)
    np.testing.assert_array_equal(after.count, state.count)


def test_a_million_clients_cost_only_the_cohort():
    """The compiled update touches [cohort, expert] values; the population is only scattered into."""
    rule = fitness.solo(forget=0.1)
    state = jax.eval_shape(lambda: rule.init(1_000_000, 8))
    jaxpr = jax.make_jaxpr(rule.update)(state, *make_round(0))

    def big(equations):
        for equation in equations:
            inner = [v.jaxpr for v in equation.params.values() if hasattr(v, "jaxpr")]
            yield from (e for j in inner for e in big(j.eqns))
            if not inner and any(v.aval.size >= 1_000_000 for v in equation.outvars):
                yield equation.primitive.name

    assert set(big(jaxpr.eqns)) <= {"scatter"}


def test_no_counts_are_kept_without_exploration():
    assert fitness.solo().init(10, 4).count.shape == (10, 0)
    assert fitness.solo(exploration=1.0).init(10, 4).count.shape == (10, 4)


@pytest.mark.parametrize(
    ("name", "value"),
    [("beta", 0.0), ("beta", 1.5), ("alpha", -1.0), ("probes", -1), ("exploration", -0.1), ("forget", 1.1), ("prior", float("nan"))],
)
def test_bad_arguments_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}, it must be"):
        fitness.solo(**{name: value})
