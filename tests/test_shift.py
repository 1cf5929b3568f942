"""Domains of clients: who is in which, what their images look like and what their labels mean."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmoe_jax import cli
from fedmoe_jax.data import partition, shift
from fedmoe_jax.data.dataset import from_arrays
from fedmoe_jax.experts import Slots, bind
from fedmoe_jax.training import setup
from fedmoe_jax.training.clients import label_prior
from fedmoe_jax.training.config import TrainConfig
from fedmoe_jax.training.evaluate import client_evaluation

CLIENTS, CLASSES = 20, 10


def data(dtype=np.uint8, side=6):
    draw = np.random.default_rng(0)
    x, test_x = (draw.integers(0, most, (n, side, side, 1)).astype(dtype) for n, most in ((400, 200), (100, 255)))
    y, test_y = (draw.integers(0, CLASSES, n) for n in (400, 100))
    made = from_arrays(dict(x=x, y=y, test_x=test_x, test_y=test_y, num_classes=CLASSES), "some")
    return made, partition.iid(len(x), CLIENTS)


def looks(image, domain, most):
    """What a domain makes of one image, in plain words."""
    for _ in range(domain % 4):
        image = image.transpose(1, 0, 2)[::-1]  # a quarter turn to the left
    return image if domain < 4 else most - image


def domain_of(images, shifted, most):
    """Which domain each image was put into, by trying all."""
    pairs = zip(images, shifted, strict=True)
    return np.array([[np.array_equal(looks(old, domain, most), new) for domain in range(8)].index(True) for old, new in pairs])


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_images_look_as_their_domain_says(dtype):
    made, clients = data(dtype)
    shifted, most = shift.apply(made, clients, kind="features", seed=3), 255 if dtype == np.uint8 else made.x.max()
    assert shifted.x.dtype == made.x.dtype and shifted.x is not made.x
    own = shift.domains(CLIENTS, 8, seed=3)
    for client, rows in enumerate(clients):
        assert (domain_of(made.x[rows], shifted.x[rows], most) == own[client]).all()
    np.testing.assert_array_equal(shifted.y, made.y)
    assert set(domain_of(made.test_x, shifted.test_x, most)) == set(range(8))


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
    """With both, the domain of an image is that of its label, for clients and in the test set."""
    made, clients = data()
    both, meaning = shift.apply(made, clients, kind="both", seed=2), shift.permutations(8, CLASSES)
    np.testing.assert_array_equal(both.y, meaning[domain_of(made.x, both.x, 255), made.y])
    np.testing.assert_array_equal(both.test_y, meaning[domain_of(made.test_x, both.test_x, 255), made.test_y])


def test_no_two_domains_mean_the_same():
    for num_domains, num_classes in ((2, 2), (6, 3), (8, 10), (20, 4)):
        meaning = shift.permutations(num_domains, num_classes)
        assert (np.sort(meaning, axis=1) == np.arange(num_classes)).all() and len(np.unique(meaning, axis=0)) == num_domains
    with pytest.raises(ValueError, match="num_domains must be at most 2, the permutations of 2 classes"):
        shift.permutations(3, 2)


def test_what_no_client_owns_stays():
    made, clients = data()
    shifted = shift.apply(made, clients[:8], kind="both")
    rest = np.concatenate(clients[8:])
    np.testing.assert_array_equal(shifted.x[rest], made.x[rest])
    np.testing.assert_array_equal(shifted.y[rest], made.y[rest])
    with pytest.raises(ValueError, match="num_domains must be at most the number of clients, 7, not 8"):
        shift.apply(made, clients[:7], kind="both")


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
    """Against NumPy, from the logits of the whole model, which every client holds."""
    config = TrainConfig(population=20, cohort=5, experts=2, aligner="full", alpha=0.1, shift="features", model_options={"hidden": 16})
    made = setup.build(config)
    state = made.algorithm(config.cohort).init(jax.random.key(0), made.population)
    counts = np.stack([np.bincount(labels(made.population, client), minlength=CLASSES) for client in range(20)]) + 1
    prior = np.log(counts / counts.sum(1, keepdims=True)) - np.log(counts.sum(0) / counts.sum())
    np.testing.assert_allclose(made.label_prior, prior, rtol=1e-4, atol=1e-5)
    whole = jax.jit(lambda x: bind(made.parts, state.experts, state.shared, Slots(jnp.ones(2, bool), jnp.zeros(2), None))(x))
    right = []
    for client in range(20):
        x, y, there = examples(made.holdout, client)
        if there.any():
            logits, y = np.asarray(whole(x))[there], y[there]
            right.append([(np.argmax(logits + extra, 1) == y).mean() for extra in (0, prior[client])])
    plain, served = np.array(right).T
    found = client_evaluation(made)(state)
    assert found["client_accuracy_mean"] == pytest.approx(plain.mean(), abs=1e-5)
    assert found["client_accuracy_prior_mean"] == pytest.approx(served.mean(), abs=1e-5) and served.mean() > plain.mean() + 0.1
    assert found["client_accuracy_prior_p10"] == pytest.approx(np.quantile(served, 0.1), abs=1e-5)


def test_the_prior_of_text_counts_what_is_no_padding():
    y = np.array([[0, 1, -1], [1, 1, 2], [2, 2, 2]], np.int32)
    text = from_arrays(dict(x=np.maximum(y, 0), y=y, test_x=y[:1].clip(0), test_y=y[:1], task="next_token"), "text")
    counts = np.array([[2, 4, 2], [1, 1, 4]])
    expected = np.log(counts / counts.sum(1, keepdims=True) / (counts.sum(0) / counts.sum()))
    np.testing.assert_allclose(label_prior(text, [np.array([0, 1]), np.array([2])]), expected, rtol=1e-5)


def examples(population, client):
    """(x, y, which rows are there) of a client: as many rows for each."""
    batch = population.batch(jnp.int32(client), jnp.arange(max(population.max_examples, 1)))
    return batch.x, np.asarray(batch.y), np.asarray(batch.mask)


def labels(population, client):
    _, y, there = examples(population, client)
    return y[there]
