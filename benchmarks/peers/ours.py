"""fedmoe_jax on the workload: python ours.py W1 [primal | auto | dual [devices]]. Rounds run in one compiled loop.

On a CPU, where a network of convolutions leaves cores idle, they can be devices, which share the clients of a round.
"""

import dataclasses
import importlib.metadata
import sys

import jax
import jax.numpy as jnp
import networks
import numpy as np
import optax
import workload
from flax import nnx

import fedmoe_jax as fm
from fedmoe_jax.experts import Slots, SlotState, bind
from fedmoe_jax.nn.linear import Conv, Linear


def give(model, layers):
    """Sets variables to the workload's initial weights of these names."""
    given = workload.weights(model)
    for variable, name in layers:
        variable.set_value(jnp.asarray(given[name]).reshape(variable.get_value().shape))


class Shared(nnx.Module):
    """A network that all clients train. As a round wants an expert, the bias of its output is one, which all examples use."""

    def __init__(self):
        self.bias = fm.ExpertParam(jnp.zeros((1, 10)))
        self.slots = SlotState(Slots(jnp.ones(1, bool), jnp.zeros(1)))

    def note_use(self, x):
        """Notes that all examples use the expert."""
        slots = self.slots.get_value()
        self.slots.set_value(dataclasses.replace(slots, tokens=jnp.ones((len(x), 1)), penalty=jnp.zeros(())))


class Dense(Shared):
    """The MLP."""

    def __init__(self):
        super().__init__()
        rngs = nnx.Rngs(0)
        self.first, self.out = Linear(784, 128, rngs=rngs), Linear(128, 10, use_bias=False, rngs=rngs)
        give("mlp", [(self.first.kernel, "into"), (self.first.bias, "into_bias"), (self.out.kernel, "out")])

    def __call__(self, x):
        self.note_use(x)
        return self.out(jax.nn.relu(self.first(x.reshape(len(x), -1)))) + self.bias.get_value()[0]


class Convolutional(Shared):
    """Convolutions and a dense layer."""

    def __init__(self):
        super().__init__()
        rngs = nnx.Rngs(0)
        self.first, self.second = Conv(1, 16, rngs=rngs), Conv(16, 32, rngs=rngs)
        self.out = Linear(7 * 7 * 32, 10, use_bias=False, rngs=rngs)
        self.biases = nnx.List([nnx.Param(jnp.zeros(16)), nnx.Param(jnp.zeros(32))])
        give("cnn", [(self.first.linear.kernel, "first"), (self.second.linear.kernel, "second"), (self.out.kernel, "out")])

    def __call__(self, x):
        self.note_use(x)
        x = x[..., None]
        for layer, bias in zip((self.first, self.second), self.biases, strict=True):
            x = networks.activated(layer(x), bias.get_value())
        return self.out(x.reshape(len(x), -1)) + self.bias.get_value()[0]


NETWORKS = {"mlp": Dense, "cnn": Convolutional}


def main(name, engine="primal", devices="1"):
    work, devices = workload.WORKLOADS[name], int(devices)
    fm.distributed.split_cpu(devices)
    x, y, test_x, test_y = workload.data(work.clients)
    rows = np.arange(x.shape[0] * x.shape[1]).reshape(len(x), -1)
    population = fm.Population.from_arrays(x.reshape(-1, 28, 28), y.reshape(-1), list(rows))
    mesh = fm.distributed.mesh(devices)
    population = fm.distributed.place(population, mesh) if devices > 1 else population
    algorithm = fm.federated_moe(
        NETWORKS[work.model](), fm.models.losses.cross_entropy, client_optimizer=optax.sgd(workload.RATE),
        server_optimizer=optax.sgd(1.0), aligner=fm.alignment.full(num_experts=1), cohort_size=work.cohort,
        batch_size=workload.BATCH, local_epochs=1, solo_examples=0, engine=engine, mesh=mesh,
    )  # fmt: skip
    state, run = algorithm.init(jax.random.key(0), population), fm.rounds(algorithm.step, work.rounds)

    def some(number=None):
        nonlocal state
        state, _ = run(state, population, number)

    some(work.warm_up)
    some()
    model = trained(work.model, state)
    loss = -jnp.take_along_axis(jax.nn.log_softmax(model(jnp.asarray(test_x))), jnp.asarray(test_y)[:, None], 1).mean()
    seconds = workload.timed_loop(some, lambda: jax.block_until_ready(state))
    peer = f"fedmoe_jax, {engine}" + f", {devices} devices" * (devices > 1)
    workload.report(peer, f"{importlib.metadata.version('fedmoe_jax')}, JAX {jax.__version__}", name, seconds, float(loss))


def trained(model, state):
    """The network with the weights that were trained."""
    return bind(fm.partition(NETWORKS[model]()), state.experts, state.shared, Slots(jnp.ones(1, bool), jnp.zeros(1), None))


if __name__ == "__main__":
    main(*sys.argv[1:])
