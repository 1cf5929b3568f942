"""Turns the shared data files into ordinary .npz files that `fedmoe train --data FILE` reads.

    python experiments/shared_data.py ../shared/data OUT

writes OUT/fashion_mnist.npz, OUT/cifar10.npz and OUT/shakespeare.npz; names after OUT choose some of them.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np

from fedmoe_jax.data import partition, text

MIN_CHARACTERS = 1000
TEST_FRACTION = 0.1


def decoder(shared):
    """The module `decode` of the shared folder."""
    spec = importlib.util.spec_from_file_location("shared_decode", Path(shared) / "decode.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def images(shared, names):
    """(x uint8 [example, height, width, channel], y int32) of residual files, one after the other."""
    parts = [decoder(shared).load(Path(shared) / f"{name}_res.npz")[:2] for name in names]
    return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))


def fashion_mnist(shared, out):
    """60,000 training and 10,000 test images of 28x28 pixels, 10 classes."""
    return _write_images(shared, Path(out) / "fashion_mnist.npz", ["fmnist_train0"], "fmnist_test")


def cifar10(shared, out, shards=5):
    """10,000 training images a shard (1 to 5 shards, each stratified) and 10,000 test images of 32x32x3 pixels, 10 classes."""
    return _write_images(shared, Path(out) / "cifar10.npz", [f"cifar10_train{shard}" for shard in range(shards)], "cifar10_test")


def shakespeare(shared, out, length=64, seed=0):
    """Next-character windows of every speaking role with 1,000 characters or more; a role is a natural client.

    A tenth of each role's windows, at random, is the test set.
    """
    x, y, client_ids, vocabulary = text.sequences(roles(shared), length)
    train, test = (np.sort(np.concatenate(part)) for part in partition.holdout(partition.natural(client_ids), TEST_FRACTION, seed))
    path = Path(out) / "shakespeare.npz"
    np.savez(
        path,
        x=x[train],
        y=y[train],
        test_x=x[test],
        test_y=y[test],
        client_ids=client_ids[train],
        num_classes=len(vocabulary),
        vocabulary=vocabulary,
        task="next_token",
    )
    return path


def roles(shared):
    """The text of each role with enough characters: its speeches in the order of the play."""
    with np.load(Path(shared) / "shakespeare_roles.npz", allow_pickle=False) as file:
        characters, offset, role = file["text"], file["utt_offset"], file["utt_role"]
    role_of_character = np.repeat(role, np.diff(offset))
    size = np.bincount(role_of_character)
    by_role = np.split(characters[np.argsort(role_of_character, kind="stable")], np.cumsum(size)[:-1])
    return [role_text for role_text in by_role if len(role_text) >= MIN_CHARACTERS]


def _write_images(shared, path, train, test):
    (x, y), (test_x, test_y) = images(shared, train), images(shared, [test])
    np.savez(path, x=x, y=y, test_x=test_x, test_y=test_y, num_classes=10)
    return path


WRITERS = {"fashion_mnist": fashion_mnist, "cifar10": cifar10, "shakespeare": shakespeare}


def main(arguments):
    """Writes the named files, or all of them; returns the exit status."""
    if len(arguments) < 2 or set(arguments[2:]) - set(WRITERS):
        print(f"usage: shared_data.py SHARED OUT [{' | '.join(WRITERS)}]...", file=sys.stderr)
        return 2
    shared, out, *names = arguments
    Path(out).mkdir(parents=True, exist_ok=True)
    for name in names or WRITERS:
        print(WRITERS[name](shared, out))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
