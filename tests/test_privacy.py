"""Private aggregation: what one client can change, the scale of the noise, adaptive clipping, feedback, and orders that are refused."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedmoe_jax import NO_EXPERT, Alignment, Cohort, Feedback, aggregation
from fedmoe_jax.aggregation.privacy import Private, update_multiplier
from fedmoe_jax.base import ClientUpdate

CLIENTS, SLOTS, EXPERTS, NORM = 6, 2, 4, 0.7
EXPECTED = dict(clients=5.0, holders=2.5)
EXPERT_ZEROS = {"w": jnp.zeros((EXPERTS, 2, 3)), "b": jnp.zeros(EXPERTS)}
SHARED_ZEROS = {"v": jnp.zeros((3,)), "s": jnp.zeros(())}
SEEDS = st.integers(0, 2**32 - 1)
KEY = jax.random.key(3)
RULES = {
    "fixed": (aggregation.clip(norm=NORM), aggregation.fixed_mean(**EXPECTED)),
    "fixed point": (aggregation.clip(norm=NORM), aggregation.fixed_mean(**EXPECTED, fixed_point=aggregation.FixedPoint(20, CLIENTS))),
    "adaptive": (aggregation.adaptive_clip(norm=NORM, deviation=2.0), aggregation.fixed_mean(**EXPECTED)),
}


def update(seed, largest=1.0):
    """Deltas of very different norms; each client holds distinct experts, some slots are empty, some clients are absent."""
    draw = np.random.default_rng(seed)
    held = np.stack([draw.permutation(EXPERTS)[:SLOTS] for _ in range(CLIENTS)])
    held[draw.random(held.shape) < 0.3] = NO_EXPERT
    examples = draw.integers(0, 4, CLIENTS)
    tokens = np.where((held == NO_EXPERT) | (examples == 0)[:, None], 0, draw.integers(0, 20, held.shape))
    size = largest * 10.0 ** draw.uniform(-2, 1, CLIENTS)

    def deltas(tree, lead, skip):
        shapes = {name: (*lead, *a.shape[skip:]) for name, a in tree.items()}
        normal = {name: draw.normal(size=shape) for name, shape in shapes.items()}
        return {name: jnp.asarray(a * size.reshape(-1, *(1,) * (a.ndim - 1)), jnp.float32) for name, a in normal.items()}

    ints = (jnp.asarray(a, jnp.int32) for a in (held, examples, tokens))
    return ClientUpdate(deltas(SHARED_ZEROS, (CLIENTS,), 0), deltas(EXPERT_ZEROS, (CLIENTS, SLOTS), 1), *ints)


@functools.cache
def program(name, multiplier=0.0, chunk=CLIENTS):
    """(update, key) -> ((expert deltas, shared deltas), next norm), what comes before the aggregator left out."""
    clipped, rule = RULES[name]
    made = aggregation.chain(clipped, aggregation.gaussian_noise(noise_multiplier=multiplier), rule)

    @jax.jit
    def run(clients, key):
        total = made.init(EXPERT_ZEROS, SHARED_ZEROS, made.private.start(KEY).norm)
        for start in range(0, CLIENTS, chunk):
            total = made.add(total, jax.tree.map(lambda a, start=start: a[start : start + chunk], clients))
        return made.finish(total, key)

    return run


def once(made, clients):
    return jax.jit(
        lambda clients: made.finish(made.add(made.init(EXPERT_ZEROS, SHARED_ZEROS, made.private.start(KEY).norm), clients), KEY)
    )(clients)


def of_client(clients, row):
    """What a client sends, as {name: [(expert or None, delta)]}, in float64."""
    if not int(clients.examples[row]):
        return []
    parts = [(name, None, np.asarray(leaf[row], float)) for name, leaf in clients.shared.items()]
    for slot, expert in enumerate(np.asarray(clients.held[row])):
        if expert != NO_EXPERT and int(clients.tokens[row, slot]):
            parts += [(name, expert, np.asarray(leaf[row, slot], float)) for name, leaf in clients.experts.items()]
    return parts


def oracle(clients, norm=NORM):
    """The definition, in loops: (sums over fixed numbers, clients whose norm is at most `norm` less those above)."""
    experts = {name: np.zeros(leaf.shape) for name, leaf in EXPERT_ZEROS.items()}
    shared, below = {name: np.zeros(leaf.shape) for name, leaf in SHARED_ZEROS.items()}, 0
    for row in range(CLIENTS):
        parts = of_client(clients, row)
        whole = math.sqrt(sum((delta**2).sum() for *_, delta in parts))
        below += (1 if whole <= norm else -1) if parts else 0
        for name, expert, delta in parts:
            delta = delta * min(1, norm / whole)
            if expert is None:
                shared[name] += delta / EXPECTED["clients"]
            else:
                experts[name][expert] += delta / EXPECTED["holders"]
    return (experts, shared), below


def distance(a, b):
    """Of two sums, before they are divided."""
    parts = zip(a, b, (EXPECTED["holders"], EXPECTED["clients"]), strict=True)
    pairs = [(x, y, by) for one, other, by in parts for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)]
    return math.sqrt(sum((by**2 * (np.asarray(x, float) - np.asarray(y, float)) ** 2).sum() for x, y, by in pairs))


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_without_noise_it_is_the_sum_of_clipped_updates_over_fixed_numbers_in_any_chunks(seed):
    clients = update(seed)
    expected, below = oracle(clients)
    for name, atol in (("fixed", 1e-5), ("fixed point", 1e-5), ("adaptive", 1e-5)):
        for chunk in (CLIENTS, 2) if name == "adaptive" else (CLIENTS,):
            found, norm = program(name, chunk=chunk)(clients, KEY)
            jax.tree.map(lambda x, y, atol=atol: np.testing.assert_allclose(x, y, rtol=1e-4, atol=atol), found, expected)
            share = 0.5 + below / 2 / EXPECTED["clients"]
            np.testing.assert_allclose(norm, NORM * np.exp(-0.2 * (share - 0.5)) if name == "adaptive" else NORM, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(0, CLIENTS - 1), st.sampled_from([1e-3, 1.0, 1e6, 1e30]))
def test_without_one_client_the_sum_changes_by_at_most_the_norm(seed, row, largest):
    clients = update(seed, largest)
    gone = dataclasses.replace(clients, examples=clients.examples.at[row].set(0), tokens=clients.tokens.at[row].set(0))
    for name in RULES:
        (one, norm), (other, without) = program(name)(clients, KEY), program(name)(gone, KEY)
        assert distance(one, other) <= NORM * (1 + 1e-4)
        if name == "adaptive":  # half a client in the number of those below
            assert abs(math.log(norm / without)) <= 0.2 * 0.5 / EXPECTED["clients"] * (1 + 1e-3)


def test_a_client_that_sends_no_numbers_counts_as_nothing():
    clients = update(0)
    for bad in (jnp.nan, jnp.inf):
        broken = dataclasses.replace(clients, shared=jax.tree.map(lambda leaf, bad=bad: leaf.at[2].set(bad), clients.shared))
        gone = dataclasses.replace(clients, examples=clients.examples.at[2].set(0), tokens=clients.tokens.at[2].set(0))
        (found, _), (expected, _) = program("adaptive")(broken, KEY), program("adaptive")(gone, KEY)
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def noise(name, multiplier, seeds):
    """The noise of many keys on an aggregate, as (experts, shared), [key, ...], divided by what it should be."""
    clients, keys = update(1), jax.random.split(jax.random.key(0), seeds)
    (quiet, _), (noisy, norms) = program(name)(clients, KEY), jax.vmap(lambda key: program(name, multiplier)(clients, key))(keys)
    deviation = update_multiplier(multiplier, 2.0) if name == "adaptive" else multiplier
    by = [deviation * NORM / EXPECTED[which] for which in ("holders", "clients")]
    pairs = zip(noisy, quiet, by, strict=True)
    return [jax.tree.map(lambda x, y, by=by: (np.asarray(x, float) - np.asarray(y)) / by, a, b) for a, b, by in pairs], norms


@pytest.mark.parametrize("name", list(RULES))
def test_noise_is_gaussian_of_the_stated_scale_on_every_number(name):
    (experts, shared), _ = noise(name, 1.3, 2000)
    flat = np.concatenate([leaf.reshape(2000, -1) for leaf in jax.tree.leaves((experts, shared))], axis=1)
    assert flat.shape[1] == EXPERTS * 7 + 4
    squares = (flat**2).sum(0)  # chi-square of 2,000 degrees of freedom for each number
    low, high = stats.chi2.ppf([1e-5, 1 - 1e-5], 2000)
    assert (squares > low).all() and (squares < high).all()
    assert stats.kstest(flat.ravel(), "norm").pvalue > 1e-3
    mixed = np.corrcoef(flat.T) - np.eye(flat.shape[1])
    assert np.abs(mixed).max() < 5 / math.sqrt(2000)  # no two numbers share their noise


def test_the_number_below_the_norm_has_noise_of_its_own():
    (experts, _), norms = noise("adaptive", 1.3, 2000)
    quiet = program("adaptive")(update(1), KEY)[1]
    number = (np.log(float(quiet)) - np.log(np.asarray(norms, float))) / 0.2 * EXPECTED["clients"]
    low, high = stats.chi2.ppf([1e-4, 1 - 1e-4], 2000)
    assert low < (number**2).sum() / 2.0**2 < high
    assert abs(np.corrcoef(number, experts["b"][:, 0])[0, 1]) < 0.1


def test_clipping_adapts_to_the_quantile():
    draw = np.random.default_rng(0)
    rule = aggregation.chain(
        aggregation.adaptive_clip(norm=100.0, deviation=1.0, quantile=0.75),
        aggregation.gaussian_noise(noise_multiplier=0.5),
        aggregation.fixed_mean(clients=40.0, holders=20.0),
    )
    norms = np.sort(draw.uniform(1, 9, 40))
    rows = draw.normal(size=(40, 3))
    rows *= (norms / np.linalg.norm(rows, axis=1))[:, None]
    held, ones = jnp.full((40, 1), NO_EXPERT), jnp.ones(40, jnp.int32)
    clients = ClientUpdate({"v": jnp.asarray(rows, jnp.float32)}, {"b": jnp.zeros((40, 1))}, held, ones, jnp.zeros((40, 1), jnp.int32))

    @jax.jit
    def one(norm, key):
        total = rule.add(rule.init({"b": jnp.zeros(EXPERTS)}, {"v": jnp.zeros(3)}, norm), clients)
        norm = rule.finish(total, key)[1]
        return norm, norm

    _, path = jax.lax.scan(one, rule.private.start(KEY).norm, jax.random.split(KEY, 300))
    assert path[0] < 100 and abs((norms <= np.asarray(path[100:]).mean()).mean() - 0.75) < 0.05


def test_noise_of_update_and_number_costs_what_was_asked_for():
    for z, deviation in ((1.0, 0.6), (0.5, 5.0), (3.0, 2.0)):
        assert (update_multiplier(z, deviation) ** -2 + (2 * deviation) ** -2) ** -0.5 == pytest.approx(z)
    assert update_multiplier(1.0, math.inf) == 1.0 and update_multiplier(0.0, 1.0) == 0.0
    with pytest.raises(ValueError, match=r"deviation is 1.0, it must be above 1.0, half of noise_multiplier"):
        update_multiplier(2.0, 1.0)


def test_with_equal_clients_and_no_noise_it_is_the_mean():
    clients = update(5)
    held = jnp.asarray([[0, 1], [2, 3], [0, 1], [2, 3], [1, 0], [3, 2]])
    alike = dataclasses.replace(clients, held=held, examples=jnp.full(CLIENTS, 4), tokens=jnp.full(held.shape, 7))
    parts = (aggregation.gaussian_noise(noise_multiplier=0.0), aggregation.fixed_mean(clients=float(CLIENTS), holders=3.0))
    rule = aggregation.chain(aggregation.clip(norm=1e9), *parts)
    found, _ = once(rule, alike)
    mean = aggregation.mean()
    expected = mean.finish(mean.add(mean.init(EXPERT_ZEROS, SHARED_ZEROS), alike))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), found, expected)


def feedback(seed):
    """(cohort, alignment, feedback) of 4 clients, of which the last is absent, with an empty slot and a loss that is not known."""
    draw = np.random.default_rng(seed)
    present, held = jnp.array([True, True, True, False]), jnp.array([[0, 1], [2, NO_EXPERT], [1, 3], [NO_EXPERT, NO_EXPERT]])
    probed = jnp.array([[2], [0], [NO_EXPERT], [NO_EXPERT]])
    there = jnp.concatenate([held, probed], 1) != NO_EXPERT
    solo = jnp.where(there, jnp.asarray(draw.exponential(size=(4, 3)), jnp.float32), 0).at[0, 2].set(jnp.nan)
    slots = jnp.zeros((4, 2))
    tokens = jnp.where(held != NO_EXPERT, jnp.asarray(draw.integers(0, 50, (4, 2)), jnp.int32), 0)
    examples = jnp.asarray(draw.integers(0, 9, 4), jnp.int32) * present
    told = Feedback(examples, tokens, slots + 0.3 * (tokens > 0), slots + draw.random(), solo)
    return Cohort(jnp.array([7, 3, 9, 2]), present, jnp.array([2, 2, 2, 0])), Alignment(held, probed, slots, slots[:, 0]), told


def test_withheld_feedback_tells_nothing_but_who_holds_what():
    cohort, alignment, one = feedback(0)
    private = Private(aggregation.clip(norm=1.0).bound, 1.0, None)
    first, second = (private.reported(KEY, cohort, alignment, told) for told in (one, feedback(1)[2]))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    np.testing.assert_array_equal(first.tokens, alignment.held != NO_EXPERT)
    np.testing.assert_array_equal(first.examples, [1, 1, 1, 0])
    assert np.isnan(first.solo_loss[0]).all() and first.solo_loss[1, 1] == 0 and np.isnan(first.loss[0, 0])


def test_noisy_scores_have_the_stated_noise_and_one_client_changes_them_by_half_the_diagonal():
    multiplier, size = 1.5, math.sqrt(3) / 2
    cohort, alignment, told = feedback(0)
    private = Private(aggregation.clip(norm=1.0).bound, 1.0, multiplier)
    exact = np.exp(-np.asarray(private._replace(feedback_multiplier=1e-9).reported(KEY, cohort, alignment, told).solo_loss))
    known = np.isfinite(told.solo_loss) & (told.examples > 0)[:, None] & (np.asarray(exact) < 1)
    np.testing.assert_allclose(exact[known], np.exp(-np.asarray(told.solo_loss))[known], atol=1e-5)
    np.testing.assert_allclose(exact[0, 2], 0.5, atol=1e-5)
    assert np.linalg.norm(exact[0] - 0.5) <= size
    told = dataclasses.replace(told, solo_loss=jnp.where(told.solo_loss == 0, 0, jnp.log(2.0)), examples=jnp.ones(4, jnp.int32))
    keys = jax.random.split(KEY, 4000)
    noisy = np.exp(-np.asarray(jax.vmap(lambda key: private.reported(key, cohort, alignment, told).solo_loss)(keys)))
    for cut in (0.2, 0.8):  # scores are cut off at 0 and 1 after the noise
        expected = stats.norm.cdf((cut - 0.5) / (multiplier * size))
        assert abs((noisy[:, 0] < cut).mean() - expected) < 5 * math.sqrt(0.25 / noisy[:, 0].size)
    assert abs(np.corrcoef(noisy[:, 0, 0] < 0.5, noisy[:, 2, 0] < 0.5)[0, 1]) < 0.08
    assert (noisy[:, 3] == 1).all()  # absent


def test_scores_have_the_noise_of_the_client_and_not_of_its_place():
    cohort, alignment, told = feedback(0)
    private, order = Private(aggregation.clip(norm=1.0).bound, 1.0, 1.5), jnp.array([2, 0, 3, 1])
    rows = jax.tree.map(lambda a: a[order], (cohort, alignment, told))
    jax.tree.map(
        np.testing.assert_array_equal,
        private.reported(KEY, *rows),
        jax.tree.map(lambda a: a[order], private.reported(KEY, cohort, alignment, told)),
    )


def test_what_arrives_is_clipped_again_after_compression():
    transforms = (aggregation.clip(norm=NORM), aggregation.sparsify(share=0.5), aggregation.quantize(bits=3))
    made = aggregation.chain(*transforms, aggregation.gaussian_noise(noise_multiplier=0.0), aggregation.fixed_mean(**EXPECTED))
    plain = aggregation.chain(*transforms, aggregation.mean())
    assert made.encoder.num_bytes(100, 32) == plain.encoder.num_bytes(100, 32) and made.needs == "deltas" and not made.collects
    lone = dataclasses.replace(update(3), examples=jnp.asarray([3, 0, 0, 0, 0, 0]))
    found, _ = once(made, lone)
    nothing = (jax.tree.map(jnp.zeros_like, EXPERT_ZEROS), jax.tree.map(jnp.zeros_like, SHARED_ZEROS))
    assert math.sqrt(sum((delta**2).sum() for *_, delta in of_client(lone, 0))) > NORM
    assert distance(found, nothing) == pytest.approx(NORM, rel=1e-5)


CLIP, NOISE, FIXED = aggregation.clip(norm=1.0), aggregation.gaussian_noise(noise_multiplier=1.0), aggregation.fixed_mean(**EXPECTED)
ADAPTIVE, EIGHT = aggregation.adaptive_clip(norm=1.0, deviation=1.0), aggregation.quantize(bits=8)
REFUSED = {
    "chain has gaussian_noise before clip, it must come after it": (NOISE, CLIP, FIXED),
    "chain has gaussian_noise before quantize, it must come after it": (CLIP, NOISE, EIGHT, FIXED),
    "chain has gaussian_noise twice": (CLIP, NOISE, NOISE, FIXED),
    "chain has gaussian_noise without clip or adaptive_clip, one of them must come before it": (EIGHT, NOISE, FIXED),
    "chain has gaussian_noise before an aggregator that weighs clients": (CLIP, NOISE, aggregation.mean()),
    "chain has clip and adaptive_clip, one must go": (CLIP, ADAPTIVE, NOISE, FIXED),
    "chain has adaptive_clip without gaussian_noise, it must be followed by it": (ADAPTIVE, FIXED),
    "deviation is 1.0, it must be above 1.5": (ADAPTIVE, aggregation.gaussian_noise(noise_multiplier=3.0), FIXED),
    "chain has quantize before clip": (EIGHT, CLIP, NOISE, FIXED),
}


@pytest.mark.parametrize("message", list(REFUSED))
def test_wrong_chains_are_refused(message):
    with pytest.raises(ValueError, match=message):
        aggregation.chain(*REFUSED[message])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: aggregation.gaussian_noise(noise_multiplier=-1.0), "noise_multiplier is -1.0, it must be at least 0"),
        (lambda: aggregation.gaussian_noise(noise_multiplier=math.nan), "noise_multiplier is nan"),
        (
            lambda: aggregation.gaussian_noise(noise_multiplier=1.0, feedback_multiplier=0.0),
            "feedback_multiplier is 0.0, it must be above 0",
        ),
        (lambda: aggregation.fixed_mean(clients=0.0, holders=1.0), "clients is 0.0, it must be above 0"),
        (lambda: aggregation.fixed_mean(clients=1.0, holders=math.inf), "holders is inf, it must be above 0"),
        (lambda: aggregation.adaptive_clip(norm=0.0, deviation=1.0), "norm is 0.0, it must be above 0"),
        (lambda: aggregation.adaptive_clip(norm=1.0, deviation=0.0), "deviation is 0.0"),
        (lambda: aggregation.adaptive_clip(norm=1.0, deviation=1.0, quantile=1.1), "quantile is 1.1, it must be from 0 to 1"),
        (lambda: aggregation.adaptive_clip(norm=1.0, deviation=1.0, rate=math.inf), "rate is inf"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.filterwarnings("ignore:optax.global_norm:DeprecationWarning")
def test_clipping_is_that_of_jax_privacy():
    oracle = pytest.importorskip("jax_privacy.clipping", reason="an oracle that the package does not need")
    clients = update(2)
    found, _ = program("fixed")(clients, KEY)
    rows = []
    for row in range(CLIENTS):
        sends = {(name, expert): jnp.asarray(delta, jnp.float32) for name, expert, delta in of_client(clients, row)}
        rows.append(oracle.clip_pytree(sends, NORM)[0])
    for name, leaf in found[1].items():
        expected = sum(row.get((name, None), 0) for row in rows) / EXPECTED["clients"]
        np.testing.assert_allclose(leaf, expected, rtol=1e-4, atol=1e-6)
    for name, leaf in found[0].items():
        for expert in range(EXPERTS):
            expected = sum(row.get((name, expert), jnp.zeros(leaf.shape[1:])) for row in rows) / EXPECTED["holders"]
            np.testing.assert_allclose(leaf[expert], expected, rtol=1e-4, atol=1e-6)
