"""FedJAX's federated averaging on the workload: python with_fedjax.py W1."""

import importlib.metadata
import sys

import jax

for name in ("tree_map", "tree_leaves", "tree_flatten", "tree_unflatten", "tree_structure"):
    setattr(jax, name, getattr(jax.tree_util, name))  # the wheel wants names that JAX has dropped

import fedjax  # noqa: E402
import networks  # noqa: E402
import workload  # noqa: E402
from fedjax.algorithms import fed_avg  # noqa: E402


def main(name):
    work = workload.WORKLOADS[name]
    x, y, test_x, test_y = workload.data(work.clients)
    clients = fedjax.InMemoryFederatedData({b"%d" % i: dict(x=x[i], y=y[i]) for i in range(work.clients)})
    fedjax.set_for_each_client_backend("jit")
    gradient = jax.jit(jax.grad(lambda weights, batch, key: networks.loss(weights, batch["x"], batch["y"])))
    batches = fedjax.ShuffleRepeatBatchHParams(batch_size=workload.BATCH, num_epochs=1, skip_shuffle=True)
    algorithm = fed_avg.federated_averaging(gradient, fedjax.optimizers.sgd(workload.RATE), fedjax.optimizers.sgd(1.0), batches)
    state = algorithm.init(jax.device_put(workload.weights(work.model)))

    def one(number):
        nonlocal state
        keys = jax.random.split(jax.random.PRNGKey(number), work.cohort)
        chosen = [b"%d" % i for i in workload.cohort(number, work)]
        state, _ = algorithm.apply(state, [(i, clients.get_client(i), key) for i, key in zip(chosen, keys, strict=True)])

    seconds = workload.timed(one, work, lambda: jax.block_until_ready(state.params))
    loss = jax.jit(networks.loss)(state.params, test_x, test_y)
    workload.report("FedJAX", f"{importlib.metadata.version('fedjax')}, JAX {jax.__version__}", name, seconds, loss)


if __name__ == "__main__":
    main(*sys.argv[1:])
