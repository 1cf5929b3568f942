"""Plain JAX on the workload: python plain.py W1 [vmap | scan | vmap drawn]. All rounds in one scan, the data on the device.

Clients side by side (vmap) or one after the other (scan). If `drawn`, each round draws its clients and shuffles their examples, as
FedAvg does; else the clients of all rounds are given, and their examples keep their order.
"""

import sys

import jax
import jax.numpy as jnp
import networks
import numpy as np
import workload


def main(name, clients="vmap", drawn=""):
    if drawn and clients != "vmap":
        raise SystemExit("drawn goes with vmap")
    work = workload.WORKLOADS[name]
    x, y, test_x, test_y = map(jnp.asarray, workload.data(work.clients))
    batches = workload.EXAMPLES // workload.BATCH

    def client(start, x, y):
        def step(weights, batch):
            gradient = jax.grad(networks.loss)(weights, *batch)
            return jax.tree.map(lambda w, g: w - workload.RATE * g, weights, gradient), None

        shaped = x.reshape(batches, workload.BATCH, 28, 28), y.reshape(batches, workload.BATCH)
        return jax.lax.scan(step, start, shaped)[0]

    def drawn_rows(key):
        of_clients, of_orders = jax.random.split(key)
        chosen = jax.random.choice(of_clients, work.clients, (work.cohort,), replace=False)
        orders = jax.vmap(lambda key: jax.random.permutation(key, workload.EXAMPLES))(jax.random.split(of_orders, work.cohort))
        return chosen[:, None], orders

    def one(weights, chosen):
        if clients == "vmap":
            rows = drawn_rows(chosen) if drawn else chosen
            each = jax.vmap(client, (None, 0, 0))(weights, x[rows], y[rows])
            return jax.tree.map(lambda a: a.mean(0), each), None

        def add(total, index):
            return jax.tree.map(jnp.add, total, client(weights, x[index], y[index])), None

        total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, weights), chosen)
        return jax.tree.map(lambda a: a / work.cohort, total), None

    run = jax.jit(lambda weights, cohorts: jax.lax.scan(one, weights, cohorts)[0])
    rounds = work.warm_up + work.rounds
    given = [workload.cohort(number, work) for number in range(rounds)]
    cohorts = jax.random.split(jax.random.key(1), rounds) if drawn else np.stack(given)
    weights = run(jax.device_put(workload.weights(work.model)), cohorts[: work.warm_up])
    compiled = run.lower(weights, cohorts[work.warm_up :]).compile()

    def rest():
        nonlocal weights
        weights = compiled(weights, cohorts[work.warm_up :])

    rest()
    loss = jax.jit(networks.loss)(weights, test_x, test_y)
    seconds = workload.timed_loop(rest, lambda: jax.block_until_ready(weights))
    workload.report(", ".join(filter(None, ("plain JAX", clients, drawn))), jax.__version__, name, seconds, loss)


if __name__ == "__main__":
    main(*sys.argv[1:])
