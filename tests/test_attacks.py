"""The experiment on attacks, in small: what attackers send, whose labels are flipped, and a table of a run."""

import dataclasses
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_round import KEY, population

from fedmoe_jax import aggregation
from fedmoe_jax.base import ClientUpdate, client_keys

sys.path.insert(0, str(Path(__file__).parents[1]))
from experiments import attacks

CLIENTS = 8
BAD = jnp.arange(CLIENTS) % 4 == 1
SIZES = dict(population=20, cohort=6, experts=4, rounds=2, aligner="random", model_options=dict(hidden=8, expert_hidden=8))


@dataclasses.dataclass
class State:
    """As much of a round's state as an attack changes."""

    residuals: tuple


@functools.cache
def sent(name, rule):
    """What clients 5, 2 and 1 send, of whom the first and the last are bad, and what they would have."""
    draw = np.random.default_rng(0)
    deltas = (jnp.array(draw.normal(size=shape), jnp.float32) for shape in ((3, 5), (3, 2, 400)))
    update = ClientUpdate(*({"v": leaf} for leaf in deltas), jnp.array([[0, 1]] * 3), jnp.ones(3, jnp.int32), jnp.ones((3, 2), jnp.int32))
    encoder = attacks.attacked(rule).encoder
    start = State(residuals=encoder.init({"v": jnp.zeros((4, 400))}, {"v": jnp.zeros(5)}, CLIENTS, 1e9))
    kept = attacks.attack(start, population(), BAD, name, 3)[0].residuals
    client = jnp.array([5, 2, 1])
    got, _ = encoder.apply(kept, client_keys(KEY, client), client, jnp.ones(3, bool), update, (None,))
    return got, update


def norm(update, row):
    return np.sqrt(sum((np.asarray(leaf[row], float) ** 2).sum() for leaf in jax.tree.leaves((update.experts, update.shared))))


def test_bad_clients_send_what_the_attack_says_and_others_what_they_have():
    flipped, update = sent("sign flip", aggregation.mean())
    noisy, _ = sent("noise", aggregation.mean())
    for leaf, wrong, noise in zip(*map(jax.tree.leaves, (update, flipped, noisy)), strict=True):
        np.testing.assert_array_equal(leaf[1], wrong[1])
        np.testing.assert_array_equal(leaf[1], noise[1])
        if leaf.dtype == jnp.float32:
            np.testing.assert_allclose(wrong[jnp.array([0, 2])], -4 * leaf[jnp.array([0, 2])], rtol=1e-6)
    for row in (0, 2):
        assert 9 < norm(noisy, row) / norm(update, row) < 11


def test_a_clip_comes_after_the_attack():
    clipped, _ = sent("noise", aggregation.chain(aggregation.clip(norm=1.0), aggregation.mean()))
    np.testing.assert_allclose([norm(clipped, row) for row in range(3)], 1, rtol=1e-5)


def test_labels_are_flipped_of_bad_clients_only():
    data = population()
    _, flipped = attacks.attack(State(residuals=(None, None)), data, BAD, "label flip", 3)
    for client in range(CLIENTS):
        rows = np.asarray(data.order)[int(data.offsets[client]) : int(data.offsets[client + 1])]
        own = np.asarray(data.y)[rows]
        np.testing.assert_array_equal(np.asarray(flipped.y)[rows], 2 - own if BAD[client] else own)


@pytest.mark.slow
def test_a_run_of_each_kind_makes_a_table():
    runs = attacks.setups(2, SIZES)
    found = {"median": attacks.accuracies("median", runs, ("nobody", "label flip"))}
    assert all(0 <= value <= 1 for values in found["median"].values() for value in values) and len(found["median"]["nobody"]) == 2
    header, _, row = attacks.table(found).splitlines()
    assert header == "| rule | nobody | label flip |" and row.startswith("| median | 0.")
