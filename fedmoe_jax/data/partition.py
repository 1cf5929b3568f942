"""Splits of a data set over clients: seeded, in NumPy, with every example in exactly one client."""

import heapq
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Shaped

ClientIndices = list[np.ndarray]
"""For each client the rows of the data set that it owns."""


def iid(num_examples: int, num_clients: int, seed: int = 0) -> ClientIndices:
    """Random clients of equal size, give or take one example.

    Raises:
      ValueError: if there is no client or there are more clients than examples.
    """
    _check_clients(num_clients, num_examples)
    return np.array_split(_generator(seed).permutation(num_examples), num_clients)


def dirichlet(labels: Int[np.ndarray, " example"], num_clients: int, alpha: float, seed: int = 0) -> ClientIndices:
    """Clients with skewed labels and unequal sizes: the shares of each class are Dirichlet distributed [1, 2].

    For each class a share for every client is drawn from Dirichlet(alpha, ..., alpha), and the class's shuffled
    examples are cut at the cumulative shares. Then, while a client has no example, it gets a random one of the client
    that is largest at that moment. So no client is empty.

    Args:
      labels: the class of each example.
      num_clients: at most the number of examples.
      alpha: above 0. Small: a client sees few classes. Large: close to `iid`.
      seed: the split is a function of the arguments.

    Raises:
      ValueError: if an argument is out of its range.

    References:
      [1] Hsu, Qi and Brown, "Measuring the effects of non-identical data distribution", arXiv:1909.06335, 2019.
      [2] Yurochkin et al., "Bayesian nonparametric federated learning of neural networks", ICML 2019.
    """
    labels = _check_labels(labels)
    _check_clients(num_clients, len(labels))
    if not 0 < alpha < np.inf:
        raise ValueError(f"alpha must be above 0 and finite, not {alpha}")
    generator = _generator(seed)
    owner = np.empty(len(labels), np.int64)
    for rows in natural(labels):
        shares = generator.dirichlet(np.full(num_clients, alpha))
        cuts = np.round(np.cumsum(shares)[:-1] * len(rows))
        owner[generator.permutation(rows)] = np.searchsorted(cuts, np.arange(len(rows)), side="right")
    return _fill_empty(_by_owner(owner, num_clients), generator)


def classes(labels: Int[np.ndarray, " example"], num_clients: int, classes_per_client: int, seed: int = 0) -> ClientIndices:
    """Clients that each see at most a few classes [1].

    One client after the other, in random order, takes the `classes_per_client` classes with the most examples per
    client so far, those that nobody has first and ties at random. A class's examples are then dealt evenly to its
    clients. Where a class has fewer examples than clients, some of them see fewer classes; a client left empty gets a
    random example of the client that is largest at that moment.

    Args:
      labels: the class of each example.
      num_clients: at most the number of examples.
      classes_per_client: 1 to the number of classes; with `num_clients` enough for every class to have a client.
      seed: the split is a function of the arguments.

    Raises:
      ValueError: if an argument is out of its range.

    References:
      [1] McMahan et al., "Communication-efficient learning of deep networks from decentralized data", AISTATS 2017.
    """
    labels = _check_labels(labels)
    _check_clients(num_clients, len(labels))
    rows_of_class = natural(labels)
    num_classes = len(rows_of_class)
    if not 1 <= classes_per_client <= num_classes:
        raise ValueError(f"classes_per_client must be 1 to {num_classes}, the number of classes, not {classes_per_client}")
    if num_clients * classes_per_client < num_classes:
        raise ValueError(
            f"classes_per_client must be larger: {num_clients} clients of {classes_per_client} classes cannot cover all {num_classes}"
        )
    generator = _generator(seed)
    size = np.array([len(rows) for rows in rows_of_class], float)
    taken = np.zeros(num_classes, np.int64)
    clients_of_class: list[list[int]] = [[] for _ in range(num_classes)]
    for client in generator.permutation(num_clients):
        order = np.lexsort((generator.random(num_classes), -size / (taken + 1), taken > 0))
        chosen = order[:classes_per_client]
        taken[chosen] += 1
        for label in chosen:
            clients_of_class[label].append(client)
    owner = np.empty(len(labels), np.int64)
    for rows, clients in zip(rows_of_class, clients_of_class, strict=True):
        owner[generator.permutation(rows)] = np.resize(generator.permutation(clients), len(rows))
    return _fill_empty(_by_owner(owner, num_clients), generator)


def natural(client_ids: Shaped[np.ndarray, " example"]) -> ClientIndices:
    """One client for each distinct ID, in the order of the IDs; IDs are integers or strings."""
    if client_ids.ndim != 1 or len(client_ids) == 0:
        raise ValueError(f"client_ids must be one ID an example, not an array of shape {client_ids.shape}")
    _, owner = np.unique(client_ids, return_inverse=True)
    return _by_owner(owner, int(owner.max()) + 1)


def holdout(client_indices: Sequence[np.ndarray], fraction: float, seed: int = 0) -> tuple[ClientIndices, ClientIndices]:
    """Splits each client's examples into (train, test), at random.

    A client with two or more examples keeps at least one of each kind, and round(fraction * size) test examples where
    that allows it. One with a single example trains on it. With fraction 0 nobody has test examples.

    Raises:
      ValueError: if `fraction` is not at least 0 and below 1.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction must be at least 0 and below 1, not {fraction}")
    generator = _generator(seed)
    train, test = [], []
    for rows in client_indices:
        shuffled = generator.permutation(rows)
        least = 1 if fraction > 0 else 0
        num_test = max(min(max(round(fraction * len(rows)), least), len(rows) - 1), 0)
        test.append(shuffled[:num_test])
        train.append(shuffled[num_test:])
    return train, test


def _by_owner(owner: np.ndarray, num_clients: int) -> ClientIndices:
    order = np.argsort(owner, kind="stable")
    ends = np.cumsum(np.bincount(owner, minlength=num_clients))
    return np.split(order, ends[:-1])


def _fill_empty(client_indices: ClientIndices, generator: np.random.Generator) -> ClientIndices:
    """Gives each empty client a random example of the largest client, which is the first of those that tie."""
    empty = [client for client, rows in enumerate(client_indices) if len(rows) == 0]
    if not empty:
        return client_indices
    largest_first = [(-len(rows), client) for client, rows in enumerate(client_indices) if len(rows)]
    heapq.heapify(largest_first)
    shuffled = [generator.permutation(rows) for rows in client_indices]
    for client in empty:
        negative_size, donor = heapq.heappop(largest_first)
        left = -negative_size - 1
        shuffled[client] = shuffled[donor][left : left + 1]
        heapq.heappush(largest_first, (-left, donor))
    sizes = {donor: -negative_size for negative_size, donor in largest_first}
    return [rows[: sizes.get(client, 1)] for client, rows in enumerate(shuffled)]


def _generator(seed: int) -> np.random.Generator:
    if seed < 0:
        raise ValueError(f"seed must not be negative, and is {seed}")
    return np.random.default_rng(seed)


def _check_clients(num_clients: int, num_examples: int) -> None:
    if num_clients < 1:
        raise ValueError(f"num_clients must be at least 1, not {num_clients}")
    if num_clients > num_examples:
        raise ValueError(f"num_clients must be at most the number of examples, {num_examples}, not {num_clients}")


def _check_labels(labels: np.ndarray) -> np.ndarray:
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) == 0:
        raise ValueError(f"labels must be one integer an example, not {labels.dtype} of shape {labels.shape}")
    return labels
