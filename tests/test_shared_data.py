"""The shared real data, through the files that experiments/shared_data.py writes."""

from pathlib import Path

import numpy as np
import pytest

from fedmoe_jax.data.sources import load, split

REPOSITORY = Path(__file__).parents[1]
SHARED = REPOSITORY.parent / "shared" / "data"
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data files are not here")


def test_fashion_mnist(shared_data, tmp_path):
    x, y = shared_data.images(SHARED, ["fmnist_test"])
    np.savez(tmp_path / "fashion.npz", x=x, y=y, test_x=x[:10], test_y=y[:10])
    data = load(tmp_path / "fashion.npz")
    assert data.x.shape == (10_000, 28, 28, 1) and data.x.dtype == np.uint8 and set(np.bincount(data.y)) == {1000}
    assert abs(data.x.mean() - 73.147) < 0.001  # the training set has 72.940
    assert len(split(data, kind="dirichlet", num_clients=200)) == 200


def test_shakespeare(shared_data, tmp_path):
    data = load(shared_data.shakespeare(SHARED, tmp_path))
    assert (data.task, data.num_classes, data.x.shape[1]) == ("next_token", 78, 64)
    clients = split(data, kind="natural")
    assert len(clients) == 636 and min(map(len, clients)) >= 13
    share = len(data.test_x) / (len(data.x) + len(data.test_x))
    assert abs(share - 0.1) < 0.005
    real = data.y[:, 1:] >= 0
    np.testing.assert_array_equal(data.x[:, 1:][real], data.y[:, :-1][real])
