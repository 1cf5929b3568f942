"""Private rounds: what the server learns beside noisy sums, noise on every expert, options that change nothing, and the command."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from small_round import CLIENTS, EXPERTS, KEY, SIZES, algorithm, aligner, distance, population, run, weights
from test_cli import TINY

from fedmoe_jax import aggregation, cli, sampling
from fedmoe_jax.aggregation.privacy import update_multiplier
from fedmoe_jax.data.population import Population
from fedmoe_jax.training import metrics, report, setup, trainer
from fedmoe_jax.training.config import TrainConfig

NOISE, NORM, DEVIATION, RATE = 1.5, 0.1, 2.0, 0.4
FIXED = aggregation.fixed_mean(clients=5.0, holders=2.5)
CHAIN = aggregation.chain(
    aggregation.adaptive_clip(norm=NORM, deviation=DEVIATION), aggregation.gaussian_noise(noise_multiplier=NOISE), FIXED
)


@functools.cache
def private():
    """The least trained experts first, scores withheld, clipping that adapts, Poisson samples of at most 5 clients, in chunks."""
    return algorithm(aggregator=CHAIN, aligner=aligner("load_only"), solo_examples=4, deadline=30.0, sampling_rate=RATE, chunk_size=2)


def other_data():
    """Clients of the same sizes and profiles with other examples, one of them with none that are numbers."""
    data, draw = population(), np.random.default_rng(9)
    x = draw.normal(size=data.x.shape).astype(np.float32) * 3
    owned = np.split(np.arange(sum(SIZES)), np.cumsum(SIZES)[:-1])
    x[owned[4]] = np.nan
    return Population.from_arrays(x, draw.integers(0, 3, len(x)), owned, data.profile)


def learnt(state):
    """All that the server keeps but weights, norms and what only metrics read."""
    return jax.tree.map(np.asarray, (state.aligner, state.last_trained, state.pace, state.cache))


def test_with_withheld_scores_nothing_but_the_models_depends_on_the_data():
    (one, first), (other, second) = (run(private(), data, 3) for data in (population(), other_data()))
    jax.tree.map(np.testing.assert_array_equal, learnt(one), learnt(other))
    np.testing.assert_array_equal(first.load, second.load)
    assert first.tokens.tolist() != second.tokens.tolist()  # what the server would learn without noise
    assert (one.aligner.fitness.value == 1).all() and distance(weights(one), weights(other)) > 1e-3
    np.testing.assert_array_equal(one.last_trained, [2] * EXPERTS)
    assert abs(float(one.private.norm) - NORM) > 1e-3


def test_where_nobody_is_every_number_still_gets_noise_of_the_stated_scale():
    absent = population(memory_bytes=1.0)
    before = private().init(KEY, absent)
    after, info = private().step(before, absent)
    assert info.clients == 0
    for which, by in ((0, 2.5), (1, 5.0)):
        leaves = zip(*(jax.tree.leaves(weights(state)[which]) for state in (after, before)), strict=True)
        rows = [np.asarray(a - b, float) / (update_multiplier(NOISE, DEVIATION) * NORM / by) for a, b in leaves]
        rows = [row.reshape(len(row) if which == 0 else 1, -1) for row in rows]
        flat = np.concatenate(rows, axis=1)
        for row in flat:
            assert abs((row**2).sum() - row.size) < 5 * np.sqrt(2 * row.size)
        assert stats.kstest(flat.ravel(), "norm").pvalue > 1e-3
    again, _ = private().step(after, absent)
    first, second = (
        np.asarray(b.shared["head"]["kernel"].get_value() - a.shared["head"]["kernel"].get_value())
        for a, b in ((before, after), (after, again))
    )
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.9  # other noise in each round


def test_rounds_with_a_sampling_rate_train_those_who_are_drawn():
    data, found = population(), []
    state = private().init(KEY, data)
    for number in range(4):
        state, info = private().step(state, data)
        found.append(int(info.clients))
        assert info.clients == sampling.drawn(KEY, jnp.int32(number), CLIENTS, 5, RATE).sum() and info.unavailable_clients == 0
    assert len(set(found)) > 1
    with pytest.raises(ValueError, match=r"sampling_rate is 1.5, it must be above 0 and at most 1"):
        algorithm(sampling_rate=1.5)


def test_it_trains_with_the_primal_engine_and_says_why():
    with pytest.raises(ValueError, match="engine: 'dual' cannot serve, since the aggregator needs deltas of each client"):
        algorithm(aggregator=CHAIN, engine="dual")
    assert algorithm(aggregator=CHAIN, engine="auto").plan(population())[0].reason == "the aggregator needs deltas of each client"


@pytest.mark.parametrize("options", [dict(router="personal"), dict(router="statistics"), dict(control_variates=True)])
def test_what_clients_return_without_noise_is_refused(options):
    made = aggregation.chain(
        aggregation.adaptive_clip(norm=NORM, deviation=DEVIATION), aggregation.gaussian_noise(noise_multiplier=1.0), FIXED
    )
    with pytest.raises(ValueError, match=r"what clients return for it has no noise, so that it does not go with gaussian_noise"):
        algorithm(aggregator=made, **options)


def test_a_poisson_sample_draws_each_client_by_a_coin_of_its_own():
    rate, size, rounds = 0.3, CLIENTS, 2000
    there = jax.vmap(lambda round: sampling.drawn(KEY, round, CLIENTS, size, rate))(jnp.arange(rounds))
    who = jax.vmap(lambda round: sampling.of_round(KEY, round, CLIENTS, size))(jnp.arange(rounds))
    drawn = np.zeros((rounds, CLIENTS), bool)
    np.put_along_axis(drawn, np.asarray(who), np.asarray(there), axis=1)
    assert np.abs(drawn.mean(0) - rate).max() < 5 * np.sqrt(rate * (1 - rate) / rounds)
    assert np.abs(np.corrcoef(drawn.T) - np.eye(CLIENTS)).max() < 5 / np.sqrt(rounds)
    counts = np.bincount(drawn.sum(1), minlength=CLIENTS + 1)
    expected = rounds * stats.binom.pmf(np.arange(CLIENTS + 1), CLIENTS, rate)
    pooled = [np.append(row[:5], row[5:].sum()) for row in (counts, expected)]
    assert stats.chisquare(*pooled).pvalue > 1e-3
    assert sampling.drawn(KEY, jnp.int32(0), CLIENTS, 3, None).all()


def test_the_command_ends_with_what_is_spent(tmp_path, capsys):
    pytest.importorskip("dp_accounting", reason="accounts need the extra privacy")
    asked = ["--clip_norm", "0.5", "--noise_multiplier", "1", "--clip_quantile", "0.5", "--min_holders", "2", "--secure_bits", "20"]
    folder = tmp_path / "run"
    assert cli.main(["train", *TINY, *asked, "--out", str(folder)]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    spent = json.loads((folder / "summary.json").read_text())["privacy"]
    assert last.startswith(f"privacy: epsilon {spent['epsilon']:.3g} at delta 1e-05 after 4 rounds: zero-out")
    assert 9 < spent["epsilon"] < 11 and spent["rounds"] == 4
    page = (folder / "report.html").read_text()
    assert "<h2>Privacy</h2>" in page and f"epsilon {spent['epsilon']:.3g} at delta 1e-05" in page
    summary = json.loads((folder / "summary.json").read_text())
    del summary["privacy"]
    metrics.write_json(folder / "summary.json", summary)  # as where a run has not ended
    assert cli.main(["report", str(folder)]) == 0 and (folder / "report.html").read_text() == page
    assert cli.main(["train", *TINY, "--noise_multiplier", "1", "--out", str(tmp_path / "other")]) == 2
    assert capsys.readouterr().err == "fedmoe train: noise_multiplier: needs clip_norm, the most that a client's update may count\n"


def test_noise_follows_from_no_seed():
    config = TrainConfig(population=6, cohort=3, experts=4, rounds=2, clip_norm=1.0, noise_multiplier=1.0, model_options={"hidden": 8})
    built = setup.build(config)
    made = trainer.Run(built)
    first = made.state
    made.start(built)
    keys = [jax.random.key_data(state.private.key) for state in (first, made.state)]
    assert (keys[0] != keys[1]).any()
    same = [dataclasses.replace(state, private=None) for state in (first, made.state)]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(*map(np.asarray, map(_raw, (a, b)))), *same)


def _raw(leaf):
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def test_a_report_tells_what_was_saved_and_names_what_is_damaged():
    saved = {"epsilon": None, "delta": 1e-6, "rounds": 7, "assumption": "none"}
    assert "infinite epsilon at delta 1e-06 after 7 rounds: none" in report._privacy({"privacy": saved}, {}, 0)
    assert report._privacy({}, {"clip_norm": 1.0}, 3) == ""
    assert "not known" in report._privacy({}, {"noise_multiplier": 1.0, "no_field": 2}, 3)
    for damaged in ([1], {"epsilon": 1.0}, {**saved, "epsilon": "much"}):
        with pytest.raises(ValueError, match=r"summary.json: its privacy is damaged"):
            report._privacy({"privacy": damaged}, {}, 0)
