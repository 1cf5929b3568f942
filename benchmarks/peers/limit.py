"""What the products of the workload alone would take at the rate of a large one, as a measure of what can be reached.

    python limit.py W1

The rate is that of a product of two large matrices of float32, in JAX's default precision.
"""

import statistics
import sys
import time

import jax
import workload


def seconds_of_product(size, repeats=7):
    """Median of a product of two square matrices."""
    a, b = (jax.random.normal(key, (size, size)) for key in jax.random.split(jax.random.key(0)))
    product, times = jax.jit(lambda a, b: a @ b), []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(product(a, b))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main(name):
    work, size = workload.WORKLOADS[name], 8192 if jax.default_backend() == "gpu" else 2048
    rate = 2 * size**3 / seconds_of_product(size)
    seconds = work.cohort * work.rounds * workload.flops(work) / rate
    workload.report("all products at the rate of a large one", f"JAX {jax.__version__}", name, seconds, None)


if __name__ == "__main__":
    main(*sys.argv[1:])
