"""Assignments per layer in runs: what a configuration may ask for, own models and aligners, and a transformer trained."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from small_groups import Net
from small_round import CLASSES, CLIENTS, EXPERTS, FEATURES, KEY

from fedmoe_jax import alignment, models, partition
from fedmoe_jax.base import Cohort
from fedmoe_jax.experts import groups
from fedmoe_jax.training import config, named, setup, trainer


def alike(*, num_experts, max_slots, fitness, load):
    """An aligner that knows nothing of groups, nor says for how many experts it is."""
    return alignment.random(num_experts=num_experts, max_slots=max_slots)._replace(num_experts=None)


def test_an_aligner_of_ones_own_serves_every_group():
    made = named.make_aligner(config.TrainConfig(experts=EXPERTS, aligner="test_groups_training:alike"), 2)
    cohort = Cohort(jnp.arange(CLIENTS), jnp.ones(CLIENTS, bool), jnp.full(CLIENTS, 2))
    held = made.align(KEY, made.init(CLIENTS), cohort)[0].held
    assert (made.groups, made.num_experts) == (2, EXPERTS)
    np.testing.assert_array_equal(held // EXPERTS, np.tile([0, 0, 1, 1], (CLIENTS, 1)))


def grouped_net(*, input_shape, num_classes, num_experts, top_k, seed, dtype, **names):
    return Net(seed=seed, **names)


def test_what_a_configuration_may_ask_for():
    small = config.TrainConfig(population=20, cohort=5, experts=EXPERTS, assignment="per_layer", model_options={"hidden": 16})
    assert setup.build(small).aligner.groups == 1  # mlp has one such layer
    with pytest.raises(ValueError, match="assignment: 'layer' is unknown"):
        config.validate(dataclasses.replace(small, assignment="layer"))
    shape = dict(input_shape=(FEATURES,), num_classes=CLASSES, num_experts=EXPERTS, top_k=1, seed=0)
    with pytest.raises(ValueError, match="has no groups of experts for an assignment per layer: set `group`"):
        models.create("test_groups_training:grouped_net", names=(None, None), per_layer=True, **shape)
    assert len(groups(partition(models.create("test_groups_training:grouped_net", per_layer=True, **shape)).experts)) == 2
    with pytest.raises(ValueError, match="multiple values for keyword argument 'group'"):
        models.create("transformer", group="x", per_layer=True, **(shape | dict(input_shape=(6,))))


@pytest.mark.slow
def test_a_transformer_trains_with_an_assignment_per_layer(tmp_path):
    draw = np.random.default_rng(0)
    text = (np.cumsum(draw.integers(1, 3, (120, 7)), axis=1) % 5).astype(np.int32)
    np.savez(tmp_path / "text.npz", x=text[:, :-1], y=text[:, 1:])
    small = config.TrainConfig(
        data=str(tmp_path / "text.npz"), split="iid", population=8, cohort=4, model="transformer", experts=EXPERTS, rounds=2, eval_every=2,
        aligner="greedy", assignment="per_layer", model_options=dict(layers=2, features=8, heads=2, expert_hidden=6),
    )  # fmt: skip
    built = setup.build(small)
    records = [record for (record,) in trainer.Run(built).blocks()]
    assert [len(record["load"]) for record in records] == [2 * EXPERTS] * 2
    assert sum(records[0]["load"]) == 4 * 2 * 2 and records[-1]["client_accuracy_mean"] is not None
    state = built.algorithm(2).init(KEY, built.population)
    assert built.aligner_scores(state).shape == (8, 2 * EXPERTS)
    assert groups(built.parts.experts) == ("layers.0", "layers.1")
    with pytest.raises(ValueError, match=r"assignment: .* has 2 groups of experts"):
        setup.build(dataclasses.replace(small, assignment="shared", model="test_groups_training:transformer_in_groups"))


def transformer_in_groups(**arguments):
    return models.create("transformer", per_layer=True, **arguments)
