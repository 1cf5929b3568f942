"""Plain JAX on the workload: python plain.py W1 [vmap | scan]. All rounds in one scan, the data on the device.

Clients side by side (vmap) or one after the other (scan).
"""

import sys

import jax
import jax.numpy as jnp
import networks
import numpy as np
import workload


def main(name, clients="vmap"):
    work = workload.WORKLOADS[name]
    x, y, test_x, test_y = map(jnp.asarray, workload.data(work.clients))
    batches = workload.EXAMPLES // workload.BATCH

    def client(start, x, y):
        def step(weights, batch):
            gradient = jax.grad(networks.loss)(weights, *batch)
            return jax.tree.map(lambda w, g: w - workload.RATE * g, weights, gradient), None

        shaped = x.reshape(batches, workload.BATCH, 28, 28), y.reshape(batches, workload.BATCH)
        return jax.lax.scan(step, start, shaped)[0]

    def one(weights, chosen):
        if clients == "vmap":
            each = jax.vmap(client, (None, 0, 0))(weights, x[chosen], y[chosen])
            return jax.tree.map(lambda a: a.mean(0), each), None

        def add(total, index):
            return jax.tree.map(jnp.add, total, client(weights, x[index], y[index])), None

        total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, weights), chosen)
        return jax.tree.map(lambda a: a / work.cohort, total), None

    run = jax.jit(lambda weights, cohorts: jax.lax.scan(one, weights, cohorts)[0])
    cohorts = np.stack([workload.cohort(number, work) for number in range(work.warm_up + work.rounds)])
    weights = run(jax.device_put(workload.weights(work.model)), cohorts[: work.warm_up])
    compiled = run.lower(weights, cohorts[work.warm_up :]).compile()

    def rest():
        nonlocal weights
        weights = compiled(weights, cohorts[work.warm_up :])

    rest()
    loss = jax.jit(networks.loss)(weights, test_x, test_y)
    seconds = workload.timed_loop(rest, lambda: jax.block_until_ready(weights))
    workload.report(f"plain JAX, {clients}", jax.__version__, name, seconds, loss)


if __name__ == "__main__":
    main(*sys.argv[1:])
