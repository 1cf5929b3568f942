"""Clients that differ in more than labels: domains whose images look different, or whose labels mean something else."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Int

from fedmoe_jax.data.dataset import Dataset
from fedmoe_jax.data.partition import ClientIndices

KINDS = ("none", "features", "concepts", "both")
LOOKS = 8
"""Domains that images can look like: four quarter turns, each also as a negative."""


def apply(dataset: Dataset, clients: ClientIndices, *, kind: str, num_domains: int = LOOKS, seed: int = 0) -> Dataset:
    """The data set with every client's examples in the domain of the client, and test examples in random ones.

    Clients are dealt to domains at random, as evenly as can be. What a domain looks like and the domain of a test example
    do not depend on the seed. Examples that no client owns stay as they are.

    Args:
      clients: the training examples of each client.
      kind: "features": images are turned by a quarter, half or three quarters, or are negatives, as their domain says.
        "concepts": each domain but the first has its labels permuted, which inputs do not tell. "both": the same domains do
        both, so that inputs tell which labels are meant. "none": nothing.
      num_domains: 2 or more, at most `LOOKS` where images change.
      seed: of who is in which domain.

    Raises:
      ValueError: if there is no such kind, or the data have no classes, or no square images where images change.
    """
    if kind not in KINDS:
        raise ValueError(f"shift must be one of {', '.join(KINDS)}, not {kind!r}")
    if kind == "none":
        return dataset
    _check(dataset, kind, num_domains)
    domain = np.zeros(len(dataset.x), np.int64)
    for rows, own in zip(clients, domains(len(clients), num_domains, seed), strict=True):
        domain[rows] = own
    of_test = np.random.default_rng(0).integers(0, num_domains, len(dataset.test_x))
    changes: dict[str, Any] = {}
    if kind != "concepts":
        least, most = dataset.x.min(), dataset.x.max()
        changes |= dict(x=_looks(dataset.x, domain, least, most), test_x=_looks(dataset.test_x, of_test, least, most))
    if kind != "features":
        meaning = permutations(num_domains, dataset.num_classes)
        changes |= dict(y=meaning[domain, dataset.y], test_y=meaning[of_test, dataset.test_y])
    return dataclasses.replace(dataset, **changes)


def domains(num_clients: int, num_domains: int, seed: int = 0) -> Int[np.ndarray, " client"]:
    """The domain of each client."""
    return np.random.default_rng(seed).permutation(np.arange(num_clients) % num_domains)


def permutations(num_domains: int, num_classes: int) -> Int[np.ndarray, "domain class"]:
    """What each domain calls each class: the first its own name, the others permuted."""
    generator = np.random.default_rng(0)
    others = [generator.permutation(num_classes) for _ in range(num_domains - 1)]
    return np.stack([np.arange(num_classes), *others]).astype(np.int32)


def _looks(x, domain, least, most):
    """Images [example, row, column, ...] as their domains look, with pixels from `least` to `most`."""
    looks = np.empty_like(x)
    for own in np.unique(domain):
        rows = domain == own
        turned = np.rot90(x[rows], own % 4, (1, 2))
        looks[rows] = most - (turned - least) if own >= 4 else turned
    return looks


def _check(dataset, kind, num_domains):
    if dataset.task != "classification":
        raise ValueError(f"shift {kind!r} needs a class for each example, and data {dataset.name} has none")
    if num_domains < 2:
        raise ValueError(f"num_domains must be at least 2, not {num_domains}")
    if kind == "concepts":
        return
    if dataset.x.ndim < 3 or dataset.x.shape[1] != dataset.x.shape[2]:
        raise ValueError(f"shift {kind!r} turns square images, and examples of data {dataset.name} have shape {dataset.x.shape[1:]}")
    if num_domains > LOOKS:
        raise ValueError(f"num_domains must be at most {LOOKS} for shift {kind!r}, not {num_domains}")
