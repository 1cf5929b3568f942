"""Tests of losses: the cross-entropy of a library, and augmented images."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedmoe_jax.base import Batch, stage_key
from fedmoe_jax.models import losses


@pytest.mark.parametrize("channels", [(), (2,)])
def test_augmented_images_are_mirrored_and_shifted(channels):
    random, examples, size = np.random.default_rng(0), 300, (16, 24)
    x = random.integers(1, 256, (examples, *size, *channels)).astype(np.uint8)
    new = np.asarray(jax.jit(losses.augment)(jax.random.key(0), jnp.asarray(x)))
    assert new.dtype == x.dtype
    padded = np.pad(x, ((0, 0), (2, 2), (3, 3), *((0, 0),) * len(channels)))
    found = []
    for image, source in zip(new, padded, strict=True):
        ways = [
            (row, column, mirrored)
            for row in range(5)
            for column in range(7)
            for mirrored in (False, True)
            if np.array_equal(image[:, ::-1] if mirrored else image, source[row : row + 16, column : column + 24])
        ]
        found += ways
    assert len(found) == examples  # each in exactly one way
    for value, column in zip((5, 7, 2), np.array(found).T, strict=True):
        counts = np.bincount(column, minlength=value)
        assert (np.abs(counts - examples / value) < 5 * np.sqrt(examples / value)).all()  # five deviations


def test_a_loss_of_augmented_images_is_the_loss_of_what_augment_makes():
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 2)).astype(np.uint8)
    data, key = Batch(jnp.asarray(images), jnp.arange(4), jnp.ones(4, bool)), jax.random.key(3)
    seen = []

    def loss_fn(model, batch, key):
        seen.append((batch, key))
        return jnp.zeros(4), {}

    losses.augmented(loss_fn)(None, data, key)
    losses.augmented(loss_fn)(None, data, jax.random.key(4))
    (first, used), (second, _) = seen
    np.testing.assert_array_equal(first.x, losses.augment(stage_key(key, "augment"), data.x))
    np.testing.assert_array_equal(first.y, data.y)
    assert not np.array_equal(first.x, second.x)
    assert used == key


def test_only_images_are_augmented():
    with pytest.raises(ValueError, match=r"x has shape \(4, 7\), only images"):
        losses.augment(jax.random.key(0), jnp.zeros((4, 7), jnp.int32))


def test_cross_entropy_is_that_of_a_library_but_of_ignored_and_impossible_labels():
    logits = jax.random.normal(jax.random.key(0), (5, 7))
    y = jnp.array([0, 6, 3, -1, 7])

    def ours(logits, y):
        return losses.cross_entropy(lambda x: x, Batch(logits, y, jnp.ones(len(y), bool)), jax.random.key(0))[0]

    def library(logits, y):
        return optax.softmax_cross_entropy_with_integer_labels(logits, y)

    np.testing.assert_allclose(ours(logits, y)[:3], library(logits[:3], y[:3]), rtol=1e-6)
    assert ours(logits, y)[3] == 0 and jnp.isnan(ours(logits, y)[4])
    slopes = [jax.grad(lambda x, of=of: of(x, y[:3]).sum())(logits[:3]) for of in (ours, library)]
    np.testing.assert_allclose(*slopes, atol=1e-6)
    program = jax.jit(jax.grad(lambda x: ours(x, y).sum())).lower(logits).as_text()
    assert "gather" not in program and "scatter" not in program
