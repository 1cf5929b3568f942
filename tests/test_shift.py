"""Domains of clients: who is in which, what their images look like and what their labels mean."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmoe_jax import cli
from fedmoe_jax.data import partition, shift
from fedmoe_jax.data.dataset import from_arrays
from fedmoe_jax.training import setup
from fedmoe_jax.training.config import TrainConfig
from fedmoe_jax.training.evaluate import client_evaluation

CLIENTS, CLASSES = 20, 10


def data(dtype=np.uint8, side=6):
    draw = np.random.default_rng(0)
    x, test_x = (draw.integers(0, 200, (n, side, side, 1)).astype(dtype) for n in (400, 100))
    y, test_y = (draw.integers(0, CLASSES, n) for n in (400, 100))
    made = from_arrays(dict(x=x, y=y, test_x=test_x, test_y=test_y, num_classes=CLASSES), "some")
    return made, partition.iid(len(x), CLIENTS)


def looks(image, domain, most):
    """What a domain makes of one image, in plain words."""
    for _ in range(domain % 4):
        image = image.transpose(1, 0, 2)[::-1]  # a quarter turn to the left
    return image if domain < 4 else most - image


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_images_look_as_their_domain_says(dtype):
    made, clients = data(dtype)
    made.x[0, 0, 0] = 0
    made.x[1, 0, 0] = 201
    shifted = shift.apply(made, clients, kind="features", seed=3)
    assert shifted.x.dtype == made.x.dtype and made.x[1, 0, 0] == 201  # the data set itself stays
    own = shift.domains(CLIENTS, 8, seed=3)
    for client, rows in enumerate(clients):
        np.testing.assert_array_equal(shifted.x[rows], [looks(image, own[client], 201) for image in made.x[rows]])
    np.testing.assert_array_equal(shifted.y, made.y)
    found = [
        [np.array_equal(looks(image, domain, 201), new) for domain in range(8)].index(True)
        for image, new in zip(made.test_x, shifted.test_x, strict=True)
    ]
    assert set(found) == set(range(8))


def test_labels_mean_what_their_domain_says():
    made, clients = data()
    shifted = shift.apply(made, clients, kind="concepts", num_domains=5, seed=1)
    np.testing.assert_array_equal(shifted.x, made.x)
    own = shift.domains(CLIENTS, 5, seed=1)
    for domain in range(5):
        rows = np.concatenate([clients[client] for client in np.flatnonzero(own == domain)])
        called = {int(old): set(shifted.y[rows][made.y[rows] == old].tolist()) for old in np.unique(made.y[rows])}
        assert all(len(names) == 1 for names in called.values()) and len(set.union(*called.values())) == len(called)
        assert (domain == 0) == all(names == {old} for old, names in called.items())


def test_clients_are_dealt_evenly_by_the_seed_and_test_examples_are_not():
    counts = np.bincount(shift.domains(21, 8, seed=0))
    assert set(counts) == {2, 3} and (shift.domains(21, 8, seed=0) != shift.domains(21, 8, seed=1)).any()
    made, clients = data()
    first, second = (shift.apply(made, clients, kind="both", seed=seed) for seed in (0, 1))
    np.testing.assert_array_equal(first.test_x, second.test_x)
    np.testing.assert_array_equal(first.test_y, second.test_y)
    assert (first.y != second.y).any()


def test_inputs_tell_which_labels_are_meant():
    """With both, the domain of an image is that of its label."""
    made, clients = data()
    only_x, only_y, both = (shift.apply(made, clients, kind=kind) for kind in ("features", "concepts", "both"))
    np.testing.assert_array_equal(both.x, only_x.x)
    np.testing.assert_array_equal(both.y, only_y.y)
    np.testing.assert_array_equal(both.test_y, only_y.test_y)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shift", "feature"], "shift: 'feature' is unknown, did you mean 'features'; expected none, features, concepts, both"),
        (["--shift", "features", "--domains", "9"], "domains: must be at most 8 for shift 'features', not 9"),
        (["--domains", "1"], "domains: must be at least 2, got 1"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(flags, message, capsys, tmp_path):
    assert cli.main(["train", *flags, "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_data_that_cannot_be_shifted_are_refused():
    made, clients = data()
    flat = dataclasses.replace(made, x=made.x.reshape(400, 36), test_x=made.test_x.reshape(100, 36))
    with pytest.raises(ValueError, match=r"shift 'both' turns square images, and examples of data some have shape \(36,\)"):
        shift.apply(flat, clients, kind="both")
    assert shift.apply(flat, clients, kind="concepts").y.shape == made.y.shape
    text = np.zeros((40, 5), np.int32)
    with pytest.raises(ValueError, match="needs a class for each example"):
        shift.apply(from_arrays(dict(x=text, y=text), "text"), partition.iid(30, 3), kind="concepts")


def test_a_client_is_also_served_with_its_label_prior():
    """Against NumPy: with every expert held, from the logits of the whole model."""
    config = TrainConfig(population=20, cohort=5, experts=2, aligner="full", alpha=0.1, shift="features", model_options={"hidden": 16})
    made = setup.build(config)
    algorithm = made.algorithm(config.cohort)
    state = algorithm.init(jax.random.key(0), made.population)
    found = client_evaluation(made)(state)
    counts = np.stack([labels_of(made.population, client) for client in range(20)]) + 1
    prior = np.log(counts / counts.sum(1, keepdims=True))
    np.testing.assert_allclose(made.label_prior, prior, rtol=1e-5)
    assert found["client_accuracy_prior_mean"] > found["client_accuracy_mean"] + 0.2  # nothing is learnt yet, but for the labels
    most_common = [(labels_of(made.holdout, client)[prior[client].argmax()], labels_of(made.holdout, client).sum()) for client in range(20)]
    guess = np.mean([right / total for right, total in most_common if total])
    assert abs(found["client_accuracy_prior_mean"] - guess) <= 0.15
    assert set(found) == {f"client_accuracy{kind}_{of}" for kind in ("", "_prior") for of in ("mean", "p10")}


def labels_of(population, client):
    """How many examples of each class a client has."""
    batch = population.batch(jnp.int32(client), jnp.arange(population.max_examples))
    return np.bincount(np.asarray(batch.y)[np.asarray(batch.mask)], minlength=CLASSES)
