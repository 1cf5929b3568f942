"""Local training by the primal and by the dual engine: FedAvg of an MLP, and experts of several widths.

    python benchmarks/engines.py --engines primal auto dual > benchmarks/results/engines.jsonl

One JSON line a figure: milliseconds of a round, the rounds being in one compiled loop, and the same of one centralised step
on as many tokens. The MLP is 784-128-10 with 60 examples a client, batches of 20; experts get tokens in bfloat16, each sent
to one of a client's slots, with a token capacity of 1. Experts are spread evenly over clients, or at random (uneven), and extremes
have many tokens a client, few, or wide experts. Updates of the MLP are as they are, or clipped to a norm.
"""

import argparse
import dataclasses
import datetime
import functools
import itertools
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import fedmoe_jax as fm
from fedmoe_jax.experts import Slots, SlotState
from fedmoe_jax.training.metrics import environment

# clients, experts, slots, tokens of a step, width, hidden, steps
EXPERTS = [(256, 64, 2, 128, 512, 2048, 4), (256, 64, 4, 256, 512, 2048, 4), (64, 16, 2, 512, 1024, 4096, 4)]
EXTREMES = [(64, 16, 2, 2048, 512, 2048, 4), (512, 64, 2, 32, 512, 2048, 8), (64, 16, 2, 512, 2048, 8192, 2)]
SMALL = [(16, 8, 2, 32, 64, 128, 3)]
FEDAVG = [(1000, 100), (10000, 1000)]
CASES = ["fedavg", "clipped", "experts", "uneven", "extremes", "small"]


class Dense(nnx.Module):
    """An MLP that all clients train, with the bias of its output for an expert."""

    def __init__(self, features, hidden, out):
        rngs = nnx.Rngs(0)
        self.first, self.second = fm.nn.Linear(features, hidden, rngs=rngs), fm.nn.Linear(hidden, out, use_bias=False, rngs=rngs)
        self.bias = fm.ExpertParam(jnp.zeros((1, out)))
        self.slots = SlotState(Slots(jnp.ones(1, bool), jnp.zeros(1)))

    def __call__(self, x):
        slots = self.slots.get_value()
        self.slots.set_value(dataclasses.replace(slots, tokens=jnp.ones((len(x), 1)), penalty=jnp.zeros(())))
        return self.second(jax.nn.relu(self.first(x))) + self.bias.get_value()[0]


class Experts(nnx.Module):
    """One MoE layer."""

    def __init__(self, features, hidden, out, num_experts, **options):
        self.moe = fm.nn.MoE(features, hidden, num_experts, out_features=out, rngs=nnx.Rngs(0), **options)

    def __call__(self, x):
        return self.moe(x)


def squared_error(model, batch, key):
    return ((model(batch.x).astype(jnp.float32) - batch.y) ** 2).mean(-1), {}


def fedavg(clients, cohort):
    """Population and round of FedAvg."""
    draw = np.random.default_rng(0)
    mean, y = 0.15 * draw.standard_normal((10, 784)), draw.integers(0, 10, 60 * clients)
    x = (mean[y] + draw.standard_normal((len(y), 784), dtype=np.float32)).astype(np.float32)
    model = Dense(784, 128, 10)
    options = dict(aligner=fm.alignment.full(num_experts=1), cohort_size=cohort, batch_size=20, client_optimizer=optax.sgd(0.05))
    return split(x, y.astype(np.int32), clients), model, fm.models.losses.cross_entropy, options


def experts(clients, number, slots, tokens, width, hidden, steps, aligner=fm.alignment.load_only):
    """Population and round of a layer of experts, of which all have as many clients with `load_only`."""
    draw = np.random.default_rng(0)
    x, y = (draw.standard_normal((clients * tokens * steps, width), dtype=np.float32) for _ in range(2))
    model = Experts(width, hidden, width, number, token_capacity=1.0, use_bias=False, dtype=jnp.bfloat16)
    return (
        split(x, y, clients),
        model,
        squared_error,
        dict(
            aligner=aligner(num_experts=number, max_slots=slots),
            cohort_size=clients,
            batch_size=tokens,
            client_optimizer=optax.sgd(0.02),
        ),
    )


def clipped(clients, cohort):
    """FedAvg of clipped updates."""
    population, model, loss, options = fedavg(clients, cohort)
    clip = fm.aggregation.clip(norm=0.5)
    return population, model, loss, options | dict(aggregator=fm.aggregation.chain(clip, fm.aggregation.mean()))


def split(x, y, clients):
    return fm.Population.from_arrays(x, y, list(np.arange(len(x)).reshape(clients, -1)))


def central(clients, number, slots, tokens, width, hidden, steps):
    """Milliseconds of one gradient step of all experts on as many tokens, spread evenly."""
    keys = jax.random.split(jax.random.key(0), 4)
    shape = number, clients * tokens * steps // number, width
    x, y = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys[:2])
    weights = [
        jax.random.normal(keys[2], (number, width, hidden)) * width**-0.5,
        jax.random.normal(keys[3], (number, hidden, width)) * hidden**-0.5,
    ]

    def loss(weights):
        into, out = (w.astype(jnp.bfloat16) for w in weights)
        return ((jax.nn.relu(x @ into) @ out - y).astype(jnp.float32) ** 2).mean()

    step = jax.jit(lambda weights: jax.tree.map(lambda w, g: w - 0.1 * g, weights, jax.grad(loss)(weights)))
    return milliseconds(lambda: step(weights), 5)


def milliseconds(run, rounds):
    """Median of three, of a round."""
    jax.block_until_ready(run())
    times = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(rounds):
            result = run()
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / rounds)
    return 1e3 * statistics.median(times)


def algorithm(made, engine):
    _, model, loss, options = made
    common = dict(server_optimizer=optax.sgd(1.0), local_epochs=1, solo_examples=0, engine=engine)
    return fm.federated_moe(model, loss, **options, **common)


def measure(made, engine, rounds):
    """Milliseconds of a round, seconds of the first call, the training loss after it, and the tokens that experts got in it."""
    population, round_ = made[0], algorithm(made, engine)
    state = round_.init(jax.random.key(0), population)
    run = fm.rounds(round_.step, rounds)
    start = time.perf_counter()
    state, info = jax.block_until_ready(run(state, population))
    first = time.perf_counter() - start

    def again():
        nonlocal state
        state, _ = run(state, population)
        return state.round

    return milliseconds(again, 1) / rounds, first, float(info.train_loss[rounds - 1]), float(info.tokens[rounds - 1].sum())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES[:-1])
    parser.add_argument("--engines", nargs="+", choices=("primal", "auto", "dual"), default=["primal", "auto"])
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    about = environment()
    about = dict(device=about["device"], versions=about["versions"], date=datetime.date.today().isoformat())

    def say(case, metric, value, unit, against=None, ratio=None):
        figure = dict(bench="engines", case=case, metric=metric, value=value, unit=unit, against=against, ratio=ratio)
        print(json.dumps(figure | about), flush=True)

    rows = (
        [("fedavg", fedavg, row) for row in FEDAVG]
        + [("clipped", clipped, row) for row in FEDAVG]
        + [("experts", experts, row) for row in EXPERTS]
        + [("uneven", functools.partial(experts, aligner=fm.alignment.random), row) for row in (EXPERTS[0], EXPERTS[2])]
        + [("extremes", experts, row) for row in EXTREMES]
        + [("small", experts, row) for row in SMALL]
    )
    for name, make, row in (entry for entry in rows if entry[0] in arguments.cases):
        case, made, before = f"{name} {'x'.join(map(str, row))}", make(*row), None
        if make is experts:
            say(case, "centralised step", central(*row), "ms")
        for engine, precision in itertools.product(arguments.engines, ("default", "highest") if make is fedavg else ("default",)):
            with jax.default_matmul_precision(None if precision == "default" else precision):
                time_of_round, first, loss, _ = measure(made, engine, arguments.rounds)
            against, before = before if engine != arguments.engines[0] and precision == "default" else None, before or time_of_round
            label = f"{engine}, {precision} precision"
            say(case, f"round, {label}", time_of_round, "ms", against and arguments.engines[0], against and against / time_of_round)
            say(case, f"first call, {label}", first, "s")
            say(case, f"training loss, {label}", loss, "")


if __name__ == "__main__":
    main()
