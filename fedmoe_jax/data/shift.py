"""Clients that differ in more than labels: domains whose images look different, or whose labels mean something else."""

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import Int

from fedmoe_jax.data.dataset import Dataset
from fedmoe_jax.data.partition import ClientIndices

KINDS = ("none", "features", "concepts", "both")
NUM_LOOKS = 8
"""Domains that images can look like: four quarter turns, each also as a negative."""
_OF_CLIENTS, _OF_TEST, _OF_LABELS = range(1, 4)  # different random numbers for each


def apply(dataset: Dataset, clients: ClientIndices, *, kind: str, num_domains: int = NUM_LOOKS, seed: int = 0) -> Dataset:
    """The data set with every client's examples in the domain of the client, and test examples in random ones.

    Clients are dealt to domains at random, as evenly as can be. What a domain looks like and the domain of a test example
    do not depend on the seed. Examples that no client owns stay as they are. Where images change they are copied in memory.

    Args:
      clients: the training examples of each client.
      kind: "features": images are turned by a quarter, half or three quarters, or are negatives, as their domain says.
        "concepts": each domain but the first has its labels permuted, which inputs do not tell. "both": the same domains do
        both, so that inputs tell which labels are meant. "none": nothing.
      num_domains: 2 to the number of clients, at most `NUM_LOOKS` where images change.
      seed: of who is in which domain.

    Raises:
      ValueError: if there is no such kind, or the data have no classes, or no square images where images change.
    """
    if kind not in KINDS:
        raise ValueError(f"shift must be one of {', '.join(KINDS)}, not {kind!r}")
    if kind == "none":
        return dataset
    _check(dataset, kind, num_domains, len(clients))
    domain = np.zeros(len(dataset.x), np.int64)
    domain[np.concatenate(clients)] = np.repeat(domains(len(clients), num_domains, seed), [len(rows) for rows in clients])
    of_test = np.random.default_rng(_OF_TEST).integers(0, num_domains, len(dataset.test_x))
    changes: dict[str, Any] = {}
    if kind != "concepts":
        least, most = (0, 255) if dataset.x.dtype == np.uint8 else (dataset.x.min(), dataset.x.max())
        changes |= dict(x=_looks(dataset.x, domain, least, most), test_x=_looks(dataset.test_x, of_test, least, most))
    if kind != "features":
        meaning = permutations(num_domains, dataset.num_classes)
        changes |= dict(y=meaning[domain, dataset.y], test_y=meaning[of_test, dataset.test_y])
    return dataclasses.replace(dataset, **changes)


def domains(num_clients: int, num_domains: int, seed: int = 0) -> Int[np.ndarray, " client"]:
    """The domain of each client."""
    return np.random.default_rng([seed, _OF_CLIENTS]).permutation(np.arange(num_clients) % num_domains)


def permutations(num_domains: int, num_classes: int) -> Int[np.ndarray, "domain class"]:
    """What each domain calls each class: the first its own name, the others permuted, no two alike.

    Raises:
      ValueError: if there are fewer permutations than domains.
    """
    if num_classes < 10 and num_domains > math.factorial(num_classes):
        raise ValueError(f"num_domains must be at most {math.factorial(num_classes)}, the permutations of {num_classes} classes")
    generator, found = np.random.default_rng(_OF_LABELS), {tuple(range(num_classes)): None}
    while len(found) < num_domains:
        found[tuple(generator.permutation(num_classes).tolist())] = None
    return np.array(list(found), np.int32)


def _looks(x, domain, least, most):
    """Images [example, row, column, ...] as their domains look, with pixels from `least` to `most`."""
    looks = np.empty_like(x)
    for own in np.unique(domain):
        rows = domain == own
        turned = np.rot90(x[rows], own % 4, (1, 2))
        looks[rows] = most - (turned - least) if own >= 4 else turned
    return looks


def _check(dataset, kind, num_domains, num_clients):
    if dataset.task != "classification":
        raise ValueError(f"shift {kind!r} needs a class for each example, and data {dataset.name} has none")
    if num_domains < 2:
        raise ValueError(f"num_domains must be at least 2, not {num_domains}")
    if num_domains > num_clients:
        raise ValueError(f"num_domains must be at most the number of clients, {num_clients}, not {num_domains}")
    if kind == "concepts":
        return
    if dataset.x.ndim < 3 or dataset.x.shape[1] != dataset.x.shape[2]:
        raise ValueError(f"shift {kind!r} turns square images, and examples of data {dataset.name} have shape {dataset.x.shape[1:]}")
    if num_domains > NUM_LOOKS:
        raise ValueError(f"num_domains must be at most {NUM_LOOKS} for shift {kind!r}, not {num_domains}")
