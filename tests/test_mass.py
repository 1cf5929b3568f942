"""The aggregate is what clients sent: held against dense sums, and faults of every kind in a round of several chunks, each of them seen."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_round import EXPERTS, KEY, algorithm, population

from fedmoe_jax import NO_EXPERT, Alignment, ExpertParam, aggregation, kernels, mass
from fedmoe_jax.base import ClientUpdate, Cohort, Feedback
from fedmoe_jax.experts import combine
from fedmoe_jax.kernels import DualDelta, History
from fedmoe_jax.local import cohort as cohorts
from fedmoe_jax.local.spread import Links

MEAN = importlib.import_module("fedmoe_jax.aggregation.mean")  # the function of that name hides it
HELD = [[0, 2], [1, NO_EXPERT], [2, 0], [3, 1], [1, 2]]
COHORT = Cohort(jnp.array([4, 0, 6, 1, 2]), jnp.array([True, True, True, True, False]), jnp.full(5, 2))


def holds(engine, aggregator=None, data=None, **options):
    """Whether the aggregate of one cohort in chunks of two is what its clients sent."""
    data = population(sizes=(3, 4, 4, 1, 2, 4, 3, 2)) if data is None else data  # one step each
    made = algorithm(engine=engine, aggregator=aggregator, chunk_size=2, check=True, **options)
    held = jnp.array(HELD)
    alignment = Alignment(held, held[:, :0], jnp.zeros(held.shape), jnp.zeros(len(held)))
    trainer = made.parts.trainer

    @jax.jit
    def run(state):
        delta, _, _, feedback, _, masses = trainer.train(KEY, state, data, COHORT, alignment, jnp.zeros(held.shape), trainer.cost(data, 0))
        return mass.conserved(trainer.aggregator.law, masses, delta, held, feedback, state.round)

    return bool(run(made.init(KEY, data)))


def into_the_next_expert(monkeypatch):
    def wrong(slots, held, weight, num_experts, **options):
        return combine(slots, jnp.where(held == NO_EXPERT, held, held + 1), weight, num_experts, **options)

    monkeypatch.setattr(MEAN, "combine", wrong)


def a_slot_lost(monkeypatch):
    """Its delta, but not its weight."""

    def wrong(slots, held, weight, num_experts, **options):
        held = held if isinstance(slots, jax.Array) else held.at[:, 1].set(NO_EXPERT)
        return combine(slots, held, weight, num_experts, **options)

    monkeypatch.setattr(MEAN, "combine", wrong)


def later_chunks_lost(monkeypatch):
    right = Links.add

    def wrong(self, aggregator, total, *args):
        return jax.tree.map(lambda old, new: jnp.where(total[2][2] > 0, old, new), total, right(self, aggregator, total, *args))

    monkeypatch.setattr(Links, "add", wrong)


def a_client_counted_twice(monkeypatch):
    """Rows that fill up the last chunk are not masked."""

    def wrong(rows, chunks, size):
        missing = chunks * size - rows.shape[0]
        return jnp.concatenate([rows, jnp.repeat(rows[-1:], missing, 0)]).reshape(chunks, size, *rows.shape[1:])

    monkeypatch.setattr(cohorts, "_chunked", wrong)


def clients_not_weighted(monkeypatch):
    right = Links.add

    def wrong(self, aggregator, total, update, *args):
        alike = dataclasses.replace(update, examples=jnp.minimum(update.examples, 1), tokens=jnp.minimum(update.tokens, 1))
        return right(self, aggregator, total, alike, *args)

    monkeypatch.setattr(Links, "add", wrong)


def wrong_denominators(of_experts):
    right = aggregation.mean()

    def finish(total):
        sums, signs, (tokens, clients, examples) = total
        return right.finish((sums, signs, (tokens + of_experts, clients, examples + (not of_experts))))

    return right._replace(finish=finish)


@pytest.mark.parametrize("engine", ["primal", "dual"])
def test_what_is_sent_arrives(engine):
    """Also where clients take one to three steps, and one of them is rejected."""
    assert holds(engine, data=population(broken=(0,)))


FAULTS = [into_the_next_expert, a_slot_lost, later_chunks_lost, a_client_counted_twice, clients_not_weighted]


QUICK = {("primal", a_client_counted_twice), ("dual", into_the_next_expert)}


@pytest.mark.parametrize(
    ("engine", "fault"),
    [
        pytest.param(engine, fault, marks=() if (engine, fault) in QUICK else pytest.mark.slow)
        for engine in ("primal", "dual")
        for fault in FAULTS
    ],
)
def test_a_fault_is_seen(engine, fault, monkeypatch):
    fault(monkeypatch)
    assert not holds(engine)


@pytest.mark.parametrize(
    ("engine", "of_experts"),
    [("primal", True), *(pytest.param(*case, marks=pytest.mark.slow) for case in [("dual", True), ("primal", False), ("dual", False)])],
)
def test_wrong_denominators_are_seen(engine, of_experts):
    assert not holds(engine, wrong_denominators(of_experts))


def test_rows_that_the_dual_engine_loses_are_seen(monkeypatch):
    right = kernels.grouped.outer
    monkeypatch.setattr(kernels.grouped, "outer", lambda rows, index, size: right(rows, index.at[0].set(size), size))
    assert not holds("dual")


RULES = {
    "median": aggregation.median(),
    "trimmed": aggregation.trimmed_mean(share=0.2),
    "krum": aggregation.krum(byzantine=0.2, keep=None),
    "geometric": aggregation.geometric_median(),
    "agreement": aggregation.mean(agreement=0.5),
    "few holders": aggregation.mean(few_holders=1.0),
    "fixed": aggregation.fixed_mean(clients=5.0, holders=2.5),
    "secure": aggregation.fixed_mean(clients=5.0, holders=2.5, fixed_point=aggregation.FixedPoint(16, clients=5)),
    "compressed": aggregation.chain(aggregation.sparsify(share=0.5), aggregation.quantize(bits=8), aggregation.mean()),
}


@pytest.mark.parametrize("rule", [pytest.param(rule, marks=() if rule == "fixed" else pytest.mark.slow) for rule in RULES])
def test_other_rules_hold_and_are_bounded(rule):
    """That the aggregate is ten times too large is seen whatever the rule."""
    right = RULES[rule]
    assert holds("primal", right)
    assert not holds("primal", right._replace(finish=lambda total: jax.tree.map(lambda leaf: 10 * leaf, right.finish(total))))


def test_noise_is_not_compared():
    noise = aggregation.gaussian_noise(noise_multiplier=1.0)
    assert aggregation.chain(aggregation.clip(norm=1.0), noise, RULES["fixed"]).law is None


def dual_delta(draw, tiles, experts=EXPERTS, clients=5, slots=2, dtype=jnp.float32):
    """Two steps of three rows a slot, or of two tiles of three rows whose slots are mixed."""
    normal = lambda *shape: jnp.asarray(draw.normal(size=shape), dtype)  # noqa: E731
    lanes, rows = (1, 2 * 3) if tiles else (slots, 3)
    slot = jnp.array(draw.integers(0, slots, (clients, 2))) if tiles else None
    history = [History(normal(clients, lanes, rows, 6), (normal(clients, lanes, rows, 7),), normal(clients, rows), slot) for _ in range(2)]
    return DualDelta(tuple(history), jnp.float32(draw.normal(size=clients)), jnp.float32(draw.normal(size=(experts, 6, 7))))


def looks(update):
    made = mass.of_update(update, 3)
    return np.asarray(made.experts), np.asarray(made.shared)


@pytest.mark.parametrize("tiles", [False, True])
def test_factors_give_what_the_delta_that_they_make_gives(tiles):
    draw = np.random.default_rng(0)
    experts, held = dual_delta(draw, tiles), jnp.array(HELD) % EXPERTS
    shared = dual_delta(draw, False, slots=1)
    shared = dataclasses.replace(shared, base=shared.base[0])
    places = jnp.array(draw.integers(0, 6, (5, 1, 3)))
    table = dataclasses.replace(shared, history=(dataclasses.replace(shared.history[0], inputs=places),))
    numbers = jnp.ones((5, 2), jnp.int32)

    def of_client(c):
        one = jax.tree.map(lambda leaf: leaf[c : c + 1], dataclasses.replace(experts, base=None))
        one = dataclasses.replace(one, base=experts.base)
        return kernels.expert_sum(one, held[c : c + 1], jnp.ones((1, 2)), EXPERTS)[held[c]]

    formed = jnp.stack([of_client(c) for c in range(5)])
    of_factors = looks(ClientUpdate({"a": shared, "b": table}, {"w": ExpertParam(experts)}, held, numbers[:, 0], numbers))
    dense = {"a": kernels.form(shared), "b": kernels.form(table)}
    of_arrays = looks(ClientUpdate(dense, {"w": ExpertParam(formed)}, held, numbers[:, 0], numbers))
    for found, expected in zip(of_factors, of_arrays, strict=True):
        np.testing.assert_allclose(found[..., 0], expected[..., 0], atol=2e-4)
        assert (found[..., 1] >= expected[..., 1] - 1e-4).all()


def crowd(clients, width, lost=False):
    """Whether the mean of a large cohort is what was sent; if `lost`, nothing of one client arrives."""
    draw = np.random.default_rng(clients)
    shape = clients, 2
    held = jnp.asarray(np.argsort(draw.random((clients, 8)), axis=1)[:, :2])
    tokens, examples = jnp.asarray(draw.integers(1, 40, shape)), jnp.asarray(draw.integers(1, 40, clients))
    drift = draw.normal(size=(1, *width))
    deltas = [jnp.float32(drift + 3 * draw.normal(size=(*lead, *width))) for lead in (shape, shape[:1])]
    update = ClientUpdate({"v": deltas[1]}, {"w": deltas[0]}, held, examples, tokens)
    rule = aggregation.mean()
    made = mass.of_update(update, 0)
    arrives = jax.tree.map(lambda leaf: leaf.at[0].set(0), deltas) if lost else deltas
    sent = dataclasses.replace(update, shared={"v": arrives[1]}, experts={"w": arrives[0]})
    delta = rule.finish(rule.add(rule.init({"w": jnp.zeros((8, *width))}, {"v": jnp.zeros(width)}), sent))
    nothing = jnp.zeros(shape)
    return bool(mass.conserved(rule.law, made, delta, held, Feedback(examples, tokens, nothing, nothing, nothing), 0))


@pytest.mark.parametrize("clients, width", [(2000, (4, 5)), (3, (1024, 1024))])
def test_large_sums_hold_and_one_client_less_is_seen(clients, width):
    assert crowd(clients, width) and not crowd(clients, width, lost=True)
