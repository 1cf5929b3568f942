"""Population: a client's examples, found on the device by index."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_jax.base import ClientProfile
from fedmoe_jax.data.population import Population
from fedmoe_jax.devices import PLAIN

NUM_EXAMPLES, NUM_CLIENTS = 12, 5


@st.composite
def owners(draw):
    """The client of each example, -1 for the two that nobody owns: always two, so that no shape varies."""
    owner = st.lists(st.integers(0, NUM_CLIENTS - 1), min_size=NUM_EXAMPLES - 2, max_size=NUM_EXAMPLES - 2)
    return np.array(draw(st.permutations([-1, -1, *draw(owner)])))


def indices(owner, generator):
    return [generator.permutation(np.flatnonzero(owner == client)) for client in range(NUM_CLIENTS)]


def arrays():
    x = np.arange(NUM_EXAMPLES * 6, dtype=np.uint8).reshape(NUM_EXAMPLES, 3, 2)
    return x, np.arange(NUM_EXAMPLES, dtype=np.int32) * 10


STRUCTURE = jax.tree.structure(Population.from_arrays(*arrays(), [np.arange(3)]))


@jax.jit
def everything(population, client, position):
    return jax.vmap(population.num_examples)(client), jax.vmap(population.batch, (0, None))(client, position)


@settings(max_examples=25, deadline=None)
@given(owner=owners(), seed=st.integers(0, 1000))
def test_batches_equal_slow_lookup(owner, seed):
    x, y = arrays()
    rows = indices(owner, np.random.default_rng(seed))
    population = Population.from_arrays(x, y, rows)
    largest = max(map(len, rows))
    assert population.num_clients == NUM_CLIENTS
    assert population.max_examples == largest and type(population.max_examples) is int
    population = jax.tree.unflatten(STRUCTURE, jax.tree.leaves(population))  # without a new static size, which would compile again
    client, position = np.arange(-1, NUM_CLIENTS + 1), np.arange(-2, NUM_EXAMPLES + 2)
    sizes, batch = everything(population, jnp.asarray(client), jnp.asarray(position))
    assert batch.x.dtype == np.uint8
    for i, c in enumerate(client):
        mine = rows[c] if 0 <= c < NUM_CLIENTS else []
        assert sizes[i] == len(mine)
        for j, p in enumerate(position):
            assert batch.mask[i, j] == (0 <= p < len(mine))
            if batch.mask[i, j]:
                np.testing.assert_array_equal(batch.x[i, j], x[mine[p]])
                assert batch.y[i, j] == y[mine[p]]


def test_padding_of_float_data_is_finite():
    x, y = arrays()
    population = Population.from_arrays(x / 7, y, [np.array([11]), np.array([], int)])
    batch = population.batch(jnp.array(1), jnp.array([0, 5, -1, 2**31 - 1]))
    assert not batch.mask.any() and jnp.isfinite(batch.x).all()
    assert batch.x.dtype == jnp.float32


def test_device_arrays_are_shared():
    x, y = map(jnp.asarray, arrays())
    train = Population.from_arrays(x, y, [np.arange(6)])
    test = Population.from_arrays(x, y, [np.arange(6, 12)])
    assert train.x is test.x and train.y is test.y


def test_default_profile_has_one_positive_entry_a_client():
    population = Population.from_arrays(*arrays(), [np.array([0]), np.array([1])])
    for values in jax.tree.leaves(population.profile):
        assert values.shape == (2,) and (values > 0).all() and jnp.isfinite(values).all()
    for values, plain in zip(jax.tree.leaves(population.profile), PLAIN, strict=True):
        np.testing.assert_array_equal(values, np.float32(plain))


def test_given_profile_is_kept():
    profile = ClientProfile(*(jnp.full(2, float(value)) for value in range(1, 5)))
    assert Population.from_arrays(*arrays(), [np.array([0]), np.array([1])], profile).profile is profile


def test_a_large_population_is_cheap_per_client():
    num_clients = 200_000
    rows = np.split(np.arange(num_clients), num_clients)
    population = Population.from_arrays(np.zeros((num_clients, 1), np.uint8), np.arange(num_clients), rows)
    lowered = jax.jit(lambda p, c: p.batch(c, jnp.arange(2)).y).lower(population, jnp.array(7))
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 10_000
    assert population.batch(jnp.array(199_999), jnp.arange(2)).y[0] == 199_999


def profile_of(size, **columns):
    return dataclasses.replace(ClientProfile(*(jnp.ones(size) for _ in range(4))), **columns)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.array(["a"] * 12)}, "x must hold real numbers"),
        ({"y": np.ones(12, complex)}, "y must hold real numbers"),
        ({"y": np.array(3)}, "y must have one row"),
        ({"y": np.arange(11)}, "y must have as many rows as x: 11 against 12"),
        ({"client_indices": []}, "client_indices must have at least one client"),
        ({"client_indices": [np.array([], int)]}, "client_indices must give at least one"),
        ({"client_indices": [np.array([0]), np.array([0.5])]}, "client_indices must hold .* client 1 is float64"),
        ({"client_indices": [np.array([True])]}, "client_indices must hold .* bool"),
        ({"client_indices": [np.array([[0]])]}, "client_indices must hold one-dimensional"),
        ({"client_indices": [np.array([0, 12])]}, "client_indices must lie in 0 to 11"),
        ({"client_indices": [np.array([-1])]}, "client_indices must lie in 0 to 11"),
        ({"client_indices": [np.array([3, 1]), np.array([2, 3])]}, "example 3 is there twice"),
        ({"profile": profile_of(3)}, r"profile.flops_per_second must have shape \(2,\)"),
        ({"profile": profile_of(2, memory_bytes=jnp.array([1, np.nan]))}, "profile.memory_bytes of client 1 is nan, it must be above 0"),
        ({"profile": profile_of(2, uplink_bytes_per_second=jnp.array([0.0, 1]))}, "profile.uplink_bytes_per_second of client 0 is 0.0"),
    ],
)
def test_errors_name_the_argument(change, message):
    x, y = arrays()
    good = {"x": x, "y": y, "client_indices": [np.array([0, 1]), np.array([2])], "profile": profile_of(2)}
    with pytest.raises(ValueError, match=message):
        Population.from_arrays(**(good | change))


def test_batches_tell_the_label_prior_of_their_client():
    x, y = arrays()
    prior = np.arange(2 * NUM_CLIENTS, dtype=np.float32).reshape(NUM_CLIENTS, 2)
    rows = indices(np.arange(NUM_EXAMPLES) % NUM_CLIENTS, np.random.default_rng(0))
    population = Population.from_arrays(x, y, rows, label_prior=prior)
    _, batch = everything(population, jnp.arange(NUM_CLIENTS), jnp.arange(2))
    np.testing.assert_array_equal(batch.label_prior, prior)
    for wrong in (prior[:-1], prior[0]):
        with pytest.raises(ValueError, match=rf"label_prior must have shape \({NUM_CLIENTS}, classes\), not"):
            Population.from_arrays(x, y, rows, label_prior=wrong)
