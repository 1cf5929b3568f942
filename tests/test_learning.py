"""Training on the real data of experiments/: in full where marked slow, else a small version of each."""

from pathlib import Path

import pytest

from fedmoe_jax.training import trainer
from fedmoe_jax.training.config import TrainConfig, from_toml

REPOSITORY = Path(__file__).parents[1]
SHARED = REPOSITORY.parent / "shared" / "data"
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data files are not here")


def run(name, data, out, **changes):
    config = TrainConfig(**{**from_toml(REPOSITORY / "experiments" / f"{name}.toml"), "data": str(data), **changes})
    return trainer.train(config, out)["last"]


def test_fashion_mnist_in_small(shared_data, tmp_path):
    data = shared_data.fashion_mnist(SHARED, tmp_path)
    small = dict(population=50, cohort=5, experts=4, rounds=20, eval_every=20, local_steps=10, aligner="greedy")
    assert run("fashion_mnist", data, tmp_path / "run", **small)["eval_accuracy"] >= 0.6


def test_shakespeare_in_small(shared_data, tmp_path):
    data = shared_data.shakespeare(SHARED, tmp_path)
    small = dict(population=20, cohort=4, experts=4, rounds=4, eval_every=4, local_steps=10, aligner="greedy")
    model = dict(layers=1, features=32, expert_hidden=64)
    assert run("shakespeare", data, tmp_path / "run", **small, model_options=model)["eval_loss"] <= 3.2


@pytest.mark.slow
def test_fashion_mnist(shared_data, tmp_path):
    assert run("fashion_mnist", shared_data.fashion_mnist(SHARED, tmp_path), tmp_path / "run")["eval_accuracy"] >= 0.85


@pytest.mark.slow
def test_shakespeare(shared_data, tmp_path):
    assert run("shakespeare", shared_data.shakespeare(SHARED, tmp_path), tmp_path / "run")["eval_loss"] < 2.2
