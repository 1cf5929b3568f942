"""Splits over clients: each example once, nobody empty, as skewed as asked."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_jax.data import partition

seeds = st.integers(0, 2**32)


@st.composite
def labelled(draw):
    """(labels, num_clients), with gaps between the classes and any imbalance."""
    labels = np.array(draw(st.lists(st.integers(0, 5), min_size=1, max_size=60))) * 3
    return labels, draw(st.integers(1, len(labels)))


def assert_partition(clients, num_examples, num_clients):
    assert len(clients) == num_clients
    assert all(rows.ndim == 1 and rows.dtype.kind == "i" and len(rows) for rows in clients)
    np.testing.assert_array_equal(np.sort(np.concatenate(clients)), np.arange(num_examples))


def same(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@settings(deadline=None)
@given(data=labelled(), seed=seeds)
def test_iid_is_a_partition_of_equal_sizes(data, seed):
    labels, num_clients = data
    clients = partition.iid(len(labels), num_clients, seed)
    assert_partition(clients, len(labels), num_clients)
    sizes = [len(rows) for rows in clients]
    assert max(sizes) - min(sizes) <= 1


@settings(deadline=None)
@given(data=labelled(), alpha=st.sampled_from([1e-8, 0.05, 0.3, 1.0, 1e6]), seed=seeds)
def test_dirichlet_is_a_partition_without_empty_clients(data, alpha, seed):
    labels, num_clients = data
    clients = partition.dirichlet(labels, num_clients, alpha, seed)
    assert_partition(clients, len(labels), num_clients)
    assert same(clients, partition.dirichlet(labels, num_clients, alpha, seed))


@settings(deadline=None)
@given(data=labelled(), per_client=st.integers(1, 6), seed=seeds)
def test_classes_is_a_partition_of_few_classes(data, per_client, seed):
    labels, num_clients = data
    num_classes = len(np.unique(labels))
    if per_client > num_classes or per_client * num_clients < num_classes:
        with pytest.raises(ValueError, match="classes_per_client must be"):
            partition.classes(labels, num_clients, per_client, seed)
        return
    clients = partition.classes(labels, num_clients, per_client, seed)
    assert_partition(clients, len(labels), num_clients)
    assert max(len(np.unique(labels[rows])) for rows in clients) <= per_client


def test_classes_are_balanced_on_balanced_data():
    labels = np.repeat(np.arange(10), 600)
    clients = partition.classes(labels, 100, 2, seed=3)
    assert {len(rows) for rows in clients} == {60}
    assert {len(np.unique(labels[rows])) for rows in clients} == {2}


def test_classes_share_follows_the_size_of_the_class():
    labels = np.repeat([0, 1], [900, 100])
    clients = partition.classes(labels, 10, 1, seed=0)
    assert sorted(len(rows) for rows in clients) == [100] * 10


def test_dirichlet_shares_have_the_moments_of_the_distribution():
    num_clients, alpha, size = 20, 0.3, 2000
    labels = np.repeat(np.arange(100), size)
    clients = partition.dirichlet(labels, num_clients, alpha, seed=1)
    shares = np.stack([np.bincount(labels[rows], minlength=100) for rows in clients]) / size
    mean = 1 / num_clients
    variance = mean * (1 - mean) / (num_clients * alpha + 1)
    np.testing.assert_allclose(shares.sum(0), 1)
    assert abs(shares.var() / variance - 1) < 0.15


def test_dirichlet_skew_falls_with_alpha():
    labels = np.repeat(np.arange(10), 500)

    def top_share(alpha):
        clients = partition.dirichlet(labels, 20, alpha, seed=0)
        return np.mean([np.bincount(labels[rows]).max() / len(rows) for rows in clients])

    assert top_share(0.05) > 0.7 > top_share(0.5) > top_share(100.0) > 0.1
    assert top_share(1e6) < 0.12


def test_examples_within_a_class_are_dealt_at_random():
    labels = np.zeros(1000, int)
    clients = partition.dirichlet(labels, 2, 1e6, seed=0)
    assert 400 < clients[0].mean() < 600


def test_empty_clients_get_examples_of_the_largest():
    clients = [np.arange(10), np.array([], int), np.arange(10, 16), np.array([], int), np.array([], int)]
    filled = partition._fill_empty(clients, np.random.default_rng(0))
    assert_partition(filled, 16, 5)
    assert [len(rows) for rows in filled] == [7, 1, 6, 1, 1]
    assert all(rows[0] < 10 for rows in (filled[1], filled[3], filled[4]))


@pytest.mark.parametrize("split", [lambda s: partition.iid(40, 5, s), lambda s: partition.dirichlet(np.arange(40) % 4, 5, 0.5, s)])
def test_seed_decides(split):
    assert same(split(1), split(1)) and not same(split(1), split(2))


@pytest.mark.parametrize("ids", [np.array([5, 2, 5, 9]), np.array(["b", "a", "b", "c"])])
def test_natural_groups_by_id(ids):
    assert [list(rows) for rows in partition.natural(ids)] == [[1], [0, 2], [3]]


@settings(deadline=None)
@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=8), fraction=st.floats(0.01, 0.99), seed=seeds)
def test_holdout_keeps_a_training_example(sizes, fraction, seed):
    clients = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    train, test = partition.holdout(clients, fraction, seed)
    for rows, kept, held in zip(clients, train, test, strict=True):
        np.testing.assert_array_equal(np.sort(np.concatenate([kept, held])), rows)
        if len(rows) < 2:
            assert len(held) == 0 and len(kept) == len(rows)
        else:
            expected = min(max(round(fraction * len(rows)), 1), len(rows) - 1)
            assert len(held) == expected and len(kept) >= 1


def test_holdout_is_random_and_seeded():
    clients = [np.arange(100)]
    first, second = (partition.holdout(clients, 0.2, seed)[1][0] for seed in (0, 1))
    assert len(first) == 20 and not np.array_equal(np.sort(first), np.sort(second))
    assert np.array_equal(first, partition.holdout(clients, 0.2, 0)[1][0])
    assert [len(rows) for rows in partition.holdout(clients, 0.0)[1]] == [0]


LABELS = np.array([0, 1, 1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: partition.iid(3, 0), "num_clients must be at least 1"),
        (lambda: partition.iid(3, 4), "num_clients must be at most the number of examples, 3, not 4"),
        (lambda: partition.iid(3, 1, -1), "seed must not be negative"),
        (lambda: partition.dirichlet(LABELS, 2, 0.0), "alpha must be above 0"),
        (lambda: partition.dirichlet(LABELS, 2, -1.0), "alpha must be above 0"),
        (lambda: partition.dirichlet(LABELS, 2, float("nan")), "alpha must be above 0"),
        (lambda: partition.dirichlet(LABELS, 2, float("inf")), "alpha must be above 0"),
        (lambda: partition.dirichlet(LABELS, 4, 1.0), "num_clients must be at most"),
        (lambda: partition.dirichlet(LABELS[:0], 1, 1.0), "labels must be one integer an example"),
        (lambda: partition.classes(LABELS, 2, 0), "classes_per_client must be 1 to 2"),
        (lambda: partition.classes(LABELS, 2, 3), "classes_per_client must be 1 to 2"),
        (lambda: partition.classes(LABELS, 1, 1), "classes_per_client must be larger"),
        (lambda: partition.natural(LABELS[:0]), "client_ids must be one ID an example"),
        (lambda: partition.holdout([LABELS], 1.0), "fraction must be at least 0 and below 1"),
        (lambda: partition.holdout([LABELS], -0.1), "fraction must be at least 0 and below 1"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
