"""One workload for all simulators: synthetic clients, initial weights and cohorts, from NumPy alone.

W1 and W2 train an MLP 784-128-10, W3 a network of two 3 x 3 convolutions (16 and 32 channels, each with ReLU and 2 x 2 pooling,
in the order that suits a simulator) and a dense layer. Every client has 60 examples and makes one pass over them in batches of 20,
with SGD of rate 0.05; the server takes the mean.
"""

import dataclasses
import json
import time

import numpy as np

EXAMPLES, BATCH, RATE, CLASSES = 60, 20, 0.05, 10


@dataclasses.dataclass(frozen=True)
class Workload:
    """Clients in all and of a round, the model, and rounds before and while the clock runs."""

    clients: int
    cohort: int
    model: str
    warm_up: int
    rounds: int


WORKLOADS = {
    "W1": Workload(1000, 100, "mlp", 3, 20),
    "W2": Workload(10000, 1000, "mlp", 3, 5),
    "W3": Workload(1000, 100, "cnn", 3, 5),
    "tiny": Workload(20, 5, "mlp", 1, 2),
    "tiny-cnn": Workload(20, 5, "cnn", 1, 2),
}


def data(clients: int):
    """Images [client, example, 28, 28] and labels [client, example]; then 2,000 examples to test on."""
    means = np.random.default_rng(0).standard_normal((CLASSES, 30, 30)).astype(np.float32)
    smooth = sum(means[:, i : i + 28, j : j + 28] for i in range(3) for j in range(3)) / 12

    def draw(seed, *shape):
        random = np.random.default_rng(seed)
        y = random.integers(0, CLASSES, shape).astype(np.int32)
        return 0.6 * smooth[y] + random.standard_normal((*shape, 28, 28), dtype=np.float32), y

    return (*draw(1, clients, EXAMPLES), *draw(2, 2000))


def weights(model: str) -> dict[str, np.ndarray]:
    """Initial weights: kernels [in, out] or [row, column, in, out], and biases."""
    random = np.random.default_rng(3)

    def kernel(*shape):
        return (random.standard_normal(shape) / np.sqrt(np.prod(shape[:-1]))).astype(np.float32)

    if model == "mlp":
        kernels = dict(into=kernel(784, 128), out=kernel(128, CLASSES))
    else:
        kernels = dict(first=kernel(3, 3, 1, 16), second=kernel(3, 3, 16, 32), out=kernel(7 * 7 * 32, CLASSES))
    return kernels | {f"{name}_bias": np.zeros(w.shape[-1], np.float32) for name, w in kernels.items()}


def flops(workload: Workload) -> int:
    """Of the products of a client's round: forward, of kernels, and of what is not the first layer's input; padding counts as pixels."""
    if workload.model == "mlp":
        products = 2 * 784 * 128 + 3 * 128 * CLASSES
    else:
        products = 2 * 28 * 28 * 9 * 16 + 3 * 14 * 14 * 9 * 16 * 32 + 3 * 7 * 7 * 32 * CLASSES
    return 2 * EXAMPLES * products


def cohort(number: int, workload: Workload) -> np.ndarray:
    """The clients of a round."""
    return np.random.default_rng(1000 + number).choice(workload.clients, workload.cohort, replace=False)


def report(peer: str, version: str, name: str, seconds: float, loss: float | None) -> None:
    """Prints what a run gave, as one JSON line."""
    workload = WORKLOADS[name]
    rate = workload.cohort * workload.rounds / seconds
    loss = None if loss is None else float(loss)
    print(json.dumps(dict(peer=peer, version=version, workload=name, clients_per_second=rate, test_loss=loss)), flush=True)


def timed(one_round, workload: Workload, finish) -> float:
    """Seconds of the rounds after the warm-up, `one_round(number)` each; `finish()` waits until all is done."""
    for number in range(workload.warm_up):
        one_round(number)
    finish()
    start = time.perf_counter()
    for number in range(workload.warm_up, workload.warm_up + workload.rounds):
        one_round(number)
    finish()
    return time.perf_counter() - start


def timed_loop(loop, finish) -> float:
    """Seconds of a loop of all rounds, the mean of as many as half a second takes; `finish()` waits until all is done."""
    finish()
    start, count = time.perf_counter(), 0
    while not count or time.perf_counter() - start < 0.5:
        loop()
        finish()
        count += 1
    return (time.perf_counter() - start) / count
