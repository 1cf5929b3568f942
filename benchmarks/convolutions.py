"""Convolutions with a kernel for each client: XLA's grouped convolution against products, of patches written down or not, as in `nn.Conv`.

    python benchmarks/convolutions.py > benchmarks/results/convolutions.jsonl

One JSON line for each layer, type and method: milliseconds of the forward and backward pass of it and the convolution, and how many
times as long it takes. Without kernels of our own, as on a CPU, `implicit` is `convolution`.
"""

import argparse
import concurrent.futures
import datetime
import itertools
import json
import os
import statistics
import time

import jax
import jax.numpy as jnp
from flax import nnx

from fedmoe_jax.nn.linear import Conv
from fedmoe_jax.training.metrics import environment

# clients, examples, height and width, channels in and out, stride
LAYERS = [
    (100, 20, 28, 1, 16, 1),
    (100, 20, 32, 3, 16, 1),
    (64, 32, 32, 8, 8, 1),
    (100, 20, 14, 16, 32, 1),
    (64, 32, 32, 16, 16, 1),
    (64, 32, 32, 16, 32, 2),
    (64, 32, 16, 32, 32, 1),
    (64, 32, 8, 64, 64, 1),
    (64, 32, 32, 64, 64, 1),
    (256, 16, 8, 64, 64, 1),
    (16, 32, 16, 128, 128, 1),
    (20, 40, 32, 64, 64, 1),
    (20, 40, 32, 64, 128, 2),
    (20, 40, 16, 128, 128, 1),
    (20, 40, 16, 128, 256, 2),
    (20, 40, 8, 256, 256, 1),
    (1, 2000, 28, 1, 16, 1),
    (1, 2000, 32, 16, 16, 1),
    (1, 2000, 14, 16, 32, 1),
]
METHODS, STRIDED = ("matmul", "implicit", "convolution"), ("matmul", "convolution")
SMALL = [(4, 4, 8, 1, 8, 1), (4, 4, 8, 16, 16, 2)]


def program(case):
    """The forward and backward pass, of kernels and inputs, of all clients at once: compiled, and its arguments."""
    (clients, examples, size, before, after, stride), dtype, method = case
    graph, _ = nnx.split(Conv(before, after, stride=stride, method=method, dtype=dtype, rngs=nnx.Rngs(0)))
    keys = jax.random.split(jax.random.key(0), clients)
    kernels = jax.vmap(lambda key: nnx.state(Conv(before, after, stride=stride, rngs=nnx.Rngs(key))))(keys)
    x = jax.random.normal(jax.random.key(1), (clients, examples, size, size, before), dtype)

    @jax.jit
    def both(kernels, x):
        gradient = jax.grad(lambda kernel, x: jnp.sum(jnp.sin(nnx.merge(graph, kernel)(x)), dtype=jnp.float32), argnums=(0, 1))
        return jax.vmap(gradient)(kernels, x)

    return both.lower(kernels, x).compile(), (kernels, x)


def milliseconds(compiled, given, repeats):
    """Median time."""
    jax.block_until_ready(compiled(*given))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*given))
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="two small layers, to try it out")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    about = environment()
    about = dict(device=about["device"], versions=about["versions"], date=datetime.date.today().isoformat())
    pairs = list(itertools.product(SMALL if arguments.small else LAYERS, (jnp.float32, jnp.bfloat16)))
    tried = {pair: METHODS if pair[0][-1] == 1 else STRIDED for pair in pairs}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        programs = {pair: [pool.submit(program, (*pair, method)) for method in methods] for pair, methods in tried.items()}
    for (layer, dtype), methods in tried.items():
        *ours, grouped = (milliseconds(*each.result(), arguments.repeats) for each in programs[layer, dtype])
        case = f"{'x'.join(map(str, layer))}, {dtype.__name__}"
        for method, value in zip(methods, ours, strict=False):
            figure = dict(bench="convolutions", case=case, metric=method, value=value, unit="ms", against=f"convolution, {grouped:.3f} ms")
            print(json.dumps(figure | dict(ratio=value / grouped) | about), flush=True)


if __name__ == "__main__":
    main()
