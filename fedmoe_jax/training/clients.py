"""Who the clients of a run are: their examples and domains, what they can afford, and whose accuracy is measured."""

import jax
import jax.numpy as jnp
import numpy as np

from fedmoe_jax.base import ClientProfile, stage_key
from fedmoe_jax.data import shift, sources
from fedmoe_jax.data.dataset import digest_of
from fedmoe_jax.sampling import cohort as sample
from fedmoe_jax.training import profiles
from fedmoe_jax.training.config import PROFILE_FILES, TrainConfig, num_clients
from fedmoe_jax.training.foreign import foreign

MAX_CLIENTS = 1000
"""Clients whose own accuracy is measured, at most."""


def split(config: TrainConfig, dataset: sources.Dataset) -> list[np.ndarray]:
    """The examples of each client."""
    try:
        clients = sources.split(
            dataset, kind=config.split, num_clients=num_clients(config), alpha=config.alpha, classes_per_client=config.classes_per_client,
            seed=config.seed,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(str(error).replace("num_clients", "population")) from None
    if config.cohort > len(clients):
        raise ValueError(f"cohort: must be at most the number of clients ({len(clients)}), got {config.cohort}")
    return clients


def shifted(config: TrainConfig, dataset: sources.Dataset, clients: list[np.ndarray]) -> sources.Dataset:
    """The data as the domains of their clients have them."""
    try:
        return shift.apply(dataset, clients, kind=config.shift, num_domains=config.domains, seed=config.seed)
    except ValueError as error:
        raise ValueError(str(error).removeprefix("num_").replace(" ", ": ", 1)) from None


def label_prior(dataset: sources.Dataset, owned: list[np.ndarray], chosen: np.ndarray | None = None) -> jax.Array:
    """Log of how much more frequent a label is with a client than with all of those `chosen`: [client, class].

    One is added to every count. A model of all clients knows their common frequencies already.

    Args:
      owned: the training examples of each client.
      chosen: by default those that are `evaluated`.
    """
    chosen = np.asarray(evaluated(len(owned))) if chosen is None else chosen
    counts = np.ones((len(chosen), dataset.num_classes), np.float32)
    for row, client in zip(counts, chosen, strict=True):
        labels = dataset.y[owned[client]]
        row += np.bincount(labels[labels >= 0], minlength=dataset.num_classes)
    own, common = counts / counts.sum(1, keepdims=True), counts.sum(0) / counts.sum()
    return jnp.asarray(np.log(own / common))


def evaluated(num_clients: int) -> jax.Array:
    """The clients whose own accuracy is measured: all, or of a larger population a random sample, the same for every seed."""
    most = min(num_clients, MAX_CLIENTS)
    return jnp.arange(num_clients) if most == num_clients else sample(jax.random.key(0), num_clients, most)


def digest(profile: ClientProfile) -> str:
    """A digest of what all clients can afford."""
    return digest_of(map(np.asarray, jax.tree.leaves(profile)))


def profile(config: TrainConfig, num_clients: int) -> ClientProfile:
    """What each client can afford; a file of as many clients gives client i its row i, and is drawn from otherwise."""
    source: str | ClientProfile = config.profile
    if config.profile.endswith(PROFILE_FILES):
        source = profiles.read(config.profile)
        if len(source.memory_bytes) == num_clients:
            return source
    elif ":" in config.profile:
        return foreign(config.profile, "profile", ClientProfile, num_clients=num_clients)
    return ClientProfile.sample(stage_key(jax.random.key(config.seed), "profile"), num_clients, source=source)
