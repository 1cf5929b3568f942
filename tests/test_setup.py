"""What a run is set up from: every named optimizer, schedule, aligner and fitness, and what is shared between runs and clients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from fedmoe_jax.training import named, optimizers, setup
from fedmoe_jax.training.config import ALIGNERS, FITNESSES, OPTIMIZERS, SCHEDULES, TrainConfig

CONFIG = TrainConfig(population=20, cohort=5, experts=4, rounds=4, model_options={"hidden": 16})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_descends(name):
    make = optimizers.optimizer(name, 0.01)
    value = jnp.array([1.0, -2.0])
    state = make.init(value)
    updates, _ = make.update(2 * value, state, value)
    moved = optax.apply_updates(value, updates)
    assert float((moved**2).sum()) < float((value**2).sum())


def test_momentum_and_nesterov_differ_from_sgd():
    def two_steps(name):
        make, gradient = optimizers.optimizer(name, 0.1), jnp.ones(1)
        state, total = make.init(gradient), 0.0
        for _ in range(2):
            updates, state = make.update(gradient, state, gradient)
            total += float(updates[0])
        return total

    assert two_steps("sgd") == pytest.approx(-0.2)
    assert two_steps("momentum") == pytest.approx(-0.1 * (1 + 1.9))
    assert two_steps("nesterov") == pytest.approx(-0.1 * (1.9 + 2.71))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_pulls_to_zero(name):
    def moved(decay):
        make, value = optimizers.optimizer(name, 0.1, decay), jnp.array([1.0, -2.0])
        return make.update(jnp.zeros(2), make.init(value), value)[0]

    assert (jnp.sign(moved(0.5)) == jnp.array([-1, 1])).all()
    if name == "sgd":
        np.testing.assert_allclose(moved(0.5), [-0.05, 0.1], rtol=1e-4)
    if name == "adamw":
        np.testing.assert_allclose(moved(0.5) - moved(0.0), [-0.05, 0.1], rtol=1e-4)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_starts_at_the_rate_and_only_constant_stays(name):
    rate = optimizers.schedule(name, 0.5, 10)
    at = [float(rate(round)) if callable(rate) else rate for round in (0, 5, 10)]
    assert at == pytest.approx([0.5, 0.5, 0.5] if name == "constant" else [0.5, 0.25, 0.0])


def test_the_client_rate_follows_the_round():
    make = optimizers.client_optimizer(dataclasses.replace(CONFIG, client_schedule="linear", client_lr=0.4, rounds=4))
    gradient = jnp.ones(1)
    steps = [float(make(jnp.int32(round)).update(gradient, make(jnp.int32(round)).init(gradient), gradient)[0][0]) for round in (0, 2)]
    assert steps == pytest.approx([-0.4, -0.2])


def test_the_shared_part_may_have_a_server_optimizer_of_its_own():
    weights = ({"w": jnp.ones(2)}, {"v": jnp.ones(2)})

    def steps(**changes):
        made, gradient = optimizers.server_optimizer(dataclasses.replace(CONFIG, server_lr=0.5, **changes)), weights
        return [float(leaf[0]) for leaf in jax.tree.leaves(made.update(gradient, made.init(weights), weights)[0])]

    adam = -0.01 / (1 + 1e-3)
    assert steps() == pytest.approx([-0.5, -0.5])
    assert steps(shared_optimizer="fedadam", shared_lr=0.01) == pytest.approx([-0.5, adam])
    assert steps(shared_optimizer="fedadam") == pytest.approx([-0.5, 50 * adam])
    assert steps(shared_optimizer="sgd", server_optimizer="fedadam") == pytest.approx([50 * adam, -0.5])
    with pytest.raises(ValueError, match=r"shared_lr: 0\.01 is for shared_optimizer, which is not given"):
        steps(shared_lr=0.01)


def test_statistics_leave_solo_evaluation_as_it_is():
    shared, counted = (setup.build(dataclasses.replace(CONFIG, router=router)) for router in ("shared", "statistics"))
    assert shared.solo_examples == counted.solo_examples > 1
    one, other = shared.cost(), counted.cost()
    assert one.solo_shared_flops == other.solo_shared_flops and one.report_flops == 0 < other.report_flops


@pytest.mark.parametrize("aligner", ALIGNERS)
def test_every_aligner_and_fitness_can_be_made(aligner):
    for fitness in FITNESSES:
        made = named.make_aligner(dataclasses.replace(CONFIG, aligner=aligner, fitness=fitness))
        assert made.max_slots == (CONFIG.experts if aligner == "full" else CONFIG.slots)


def test_aligners_share_weights_and_split_and_seeds_share_only_the_split():
    data = setup.build(CONFIG)

    def built(**changes):
        return setup.variant(data, dataclasses.replace(CONFIG, **changes))

    def flat(made):
        return {key: value.get_value() for part in (made.parts.experts, made.parts.shared) for key, value in nnx.to_flat_state(part)}

    one, other, reseeded = built(aligner="random"), built(aligner="balanced"), built(aligner="random", seed=1)
    for key, value in flat(one).items():
        np.testing.assert_array_equal(value, flat(other)[key])
    assert any(not np.array_equal(value, flat(reseeded)[key]) for key, value in flat(one).items())
    for made in (other, reseeded):
        for ours, theirs in zip(jax.tree.leaves(one.population), jax.tree.leaves(made.population), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_scores_of_pairs_never_tried_are_not_known():
    built = setup.build(CONFIG)
    state = built.algorithm(1).init(jax.random.key(0), built.population)
    assert np.isnan(built.aligner_scores(state)).all()
    learnt = state.aligner.fitness
    learnt = dataclasses.replace(learnt, value=learnt.value.at[3, 1].set(0.5))
    scores = built.aligner_scores(dataclasses.replace(state, aligner=dataclasses.replace(state.aligner, fitness=learnt)))
    assert scores[3, 1] == 0.5 and np.isfinite(scores).sum() == 1
    of_accuracy = setup.build(dataclasses.replace(CONFIG, fitness="accuracy"))  # the prior is a score, too
    assert np.isfinite(of_accuracy.aligner_scores(of_accuracy.algorithm(1).init(jax.random.key(0), of_accuracy.population))).all()


def test_all_seeds_share_the_test_set():
    tests = [setup.build(dataclasses.replace(CONFIG, seed=seed)).test for seed in (0, 1)]
    for ours, theirs in zip(*tests, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_client_never_trains_on_its_own_test_examples():
    made = setup.build(CONFIG)

    def rows(population, client):
        batch = population.batch(jnp.int32(client), jnp.arange(population.max_examples))
        return {row.tobytes() for row in np.asarray(batch.x)[np.asarray(batch.mask)]}

    held = [rows(made.holdout, client) for client in range(CONFIG.population)]
    assert any(held)
    for client, own in enumerate(held):
        assert not own & rows(made.population, client)
