"""Profiles drawn from kinds of device: shares and quantiles as the tables say, and the tables as the data say."""

import importlib.util
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from fedmoe_jax import devices
from fedmoe_jax.alignment import capacity
from fedmoe_jax.base import ClientProfile

REPOSITORY = Path(__file__).parents[1]
SHARED = REPOSITORY.parent / "shared" / "data"
N = 20_000
DEVIATIONS = 4.5  # of a share of N draws: one share in 100,000 is outside


def near(share, wanted):
    """Whether the share that N draws have is within what chance does to a share of `wanted`."""
    return abs(share - wanted) <= DEVIATIONS * math.sqrt(wanted * (1 - wanted) / N) + 1e-9


@pytest.fixture(scope="module")
def phones():
    return jax.tree.map(np.asarray, ClientProfile.sample(jax.random.key(0), N))


@pytest.fixture(scope="module")
def derive():
    """The module experiments/derive_devices.py."""
    spec = importlib.util.spec_from_file_location("derive_devices", REPOSITORY / "experiments" / "derive_devices.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data files are not here")
def test_the_tables_follow_from_the_data(derive):
    source = Path(devices.__file__).read_text(encoding="utf-8")
    for name, rows in (("PHONES", derive.phones(SHARED)), ("NETWORKS", derive.networks(SHARED))):
        np.testing.assert_array_equal(getattr(devices, name), rows)
        assert "\n" + derive.literal(name, rows) + "\n" in source


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data files are not here")
def test_the_phones_have_the_quantiles_of_all_phones(derive):
    """37 of 333: the median is that of all, and any share of the phones below a score or memory is off by less than one row."""
    with np.load(SHARED / "flash_devices.npz", allow_pickle=False) as file:
        columns = file["ai_scores"][:, file["ai_cols"].tolist().index(derive.SCORE)], file["ai_ram_gb"]
    score, memory = np.array(devices.PHONES).T
    assert np.median(score) == np.median(columns[0]) and np.median(memory) == np.median(columns[1])
    for value in score:
        assert abs((score <= value).mean() - (columns[0] <= value).mean()) < 1 / len(score)
    assert abs(memory.mean() / columns[1].mean() - 1) < 0.05
    assert abs(np.corrcoef(score, memory)[0, 1] - np.corrcoef(*columns)[0, 1]) < 0.1


def test_the_tables_make_sense():
    score, memory = np.array(devices.PHONES).T
    assert (np.diff(score) > 0).all() and len(score) % 2 == 1  # each row has a score of its own, and one is the median
    assert ((memory >= 0.5) & (memory <= 16)).all()
    assert np.shape(devices.NETWORKS) == (19, 4) and (np.array(devices.NETWORKS) > 0).all()


def test_every_phone_comes_as_often_and_with_its_own_memory(phones):
    score, memory = np.array(devices.PHONES).T
    rate = devices.PLAIN.flops_per_second * score / np.median(score)
    row = np.abs(np.log(phones.flops_per_second[:, None] / rate)).argmin(1)
    np.testing.assert_allclose(phones.flops_per_second, rate[row], rtol=1e-6)
    np.testing.assert_allclose(phones.memory_bytes, devices.MEMORY_SHARE * 1e9 * memory[row], rtol=1e-6)
    shares = np.bincount(row, minlength=len(score)) / N
    assert all(near(share, 1 / len(score)) for share in shares)


def test_the_median_phone_is_the_plain_phone(phones):
    plain = capacity.uniform(1).flops_per_second[0]
    assert near((phones.flops_per_second < 0.999 * plain).mean(), 18 / 37)
    assert near((phones.flops_per_second <= 1.001 * plain).mean(), 19 / 37)


def below(column, speed):
    """Chance that each network's link in one direction is at most `speed` kB/s: of a normal that ends at a share of its mean."""
    mean, deviation = np.array(devices.NETWORKS)[:, 2 * column : 2 * column + 2].T
    return np.where(speed >= devices.SLOWEST_LINK * mean, norm.cdf((speed - mean) / deviation), 0)


@pytest.mark.parametrize("speed", [400, 700, 1000, 2000, 3000, 4000, 6000, 8000, 12000, 20000])
def test_links_have_the_distribution_of_the_networks(phones, speed):
    down, up = phones.downlink_bytes_per_second <= 1e3 * speed, phones.uplink_bytes_per_second <= 1e3 * speed
    assert near(down.mean(), below(0, speed).mean())
    assert near(up.mean(), below(1, speed).mean())
    assert near((down & up).mean(), (below(0, speed) * below(1, speed)).mean())  # both of one network, given that independent


def test_no_link_is_slower_than_a_tenth_of_a_mean(phones):
    least = 1e3 * devices.SLOWEST_LINK * np.array(devices.NETWORKS).min(axis=0)
    np.testing.assert_allclose(phones.downlink_bytes_per_second.min(), least[0], rtol=1e-6)
    assert phones.uplink_bytes_per_second.min() >= least[2] * (1 - 1e-6)


def test_links_do_not_depend_on_the_phone(phones):
    for link in (phones.downlink_bytes_per_second, phones.uplink_bytes_per_second):
        assert abs(np.corrcoef(phones.flops_per_second, link)[0, 1]) < DEVIATIONS / math.sqrt(N)


def test_tiers_come_whole_and_in_equal_shares():
    profile = ClientProfile.sample(jax.random.key(1), N, source="tiers")
    rows = np.stack(jax.tree.leaves(profile), axis=1)
    found, counts = np.unique(rows, axis=0, return_counts=True)
    np.testing.assert_array_equal(found, np.array(list(devices.TIERS.values()), np.float32))
    assert all(near(count / N, 1 / 3) for count in counts)


def test_rows_of_a_profile_come_whole_and_in_equal_shares():
    source = ClientProfile(*(jnp.arange(1.0, 6.0) * 10**power for power in range(4)))
    profile = ClientProfile.sample(jax.random.key(2), N, source=source)
    for power, column in enumerate(jax.tree.leaves(profile)):
        np.testing.assert_array_equal(column, profile.flops_per_second * 10**power)
    assert all(near(share, 1 / 5) for share in np.bincount(np.asarray(profile.flops_per_second, int))[1:] / N)


def test_uniform_is_the_plain_phone_for_all():
    for profile in (ClientProfile.sample(jax.random.key(3), 4, source="uniform"), capacity.uniform(4)):
        np.testing.assert_array_equal(np.stack(jax.tree.leaves(profile), axis=1), np.tile(np.float32(devices.PLAIN), (4, 1)))


@pytest.mark.parametrize("source", [*devices.SOURCES, ClientProfile(*[jnp.arange(1.0, 9.0)] * 4)], ids=str)
def test_a_draw_is_a_function_of_the_key_also_under_jit(source):
    def draw(key):
        return ClientProfile.sample(key, 7, source=source)

    key = jax.random.key(5)
    once, again, compiled = draw(key), draw(key), jax.jit(draw)(key)
    for column, same, jitted in zip(*map(jax.tree.leaves, (once, again, compiled)), strict=True):
        assert column.shape == (7,) and column.dtype == jnp.float32 and (column > 0).all()
        np.testing.assert_array_equal(column, same)
        np.testing.assert_allclose(column, jitted, rtol=1e-6)
    if source != "uniform":
        assert (draw(jax.random.key(6)).flops_per_second != once.flops_per_second).any()


def test_a_draw_can_be_vmapped():
    profile = jax.vmap(lambda key: ClientProfile.sample(key, 3))(jax.random.split(jax.random.key(0), 2))
    assert all(column.shape == (2, 3) for column in jax.tree.leaves(profile))


def unchecked(column, last=None):
    """A profile that the constructor would refuse where types are checked."""
    return jax.tree.unflatten(jax.tree.structure(capacity.uniform(1)), [column] * 3 + [column if last is None else last])


@pytest.mark.parametrize(
    ("n", "source", "message"),
    [
        (0, "phones", "n is 0"),
        (-1, capacity.uniform(2), "n is -1"),
        (1, "phone", "source is 'phone', it must be uniform, tiers, phones or a ClientProfile"),
        (1, ClientProfile(*[jnp.ones(0)] * 4), "source has columns of shape"),
        (1, unchecked(jnp.ones(())), "source has columns of shape"),
        (1, unchecked(jnp.ones(2), jnp.ones(3)), "source has columns of shape"),
    ],
)
def test_errors_name_the_argument(n, source, message):
    with pytest.raises(ValueError, match=message):
        ClientProfile.sample(jax.random.key(0), n, source)
