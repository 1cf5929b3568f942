"""Real clients for tests: a data set in a server's file and in clients' folders, and the same run in the simulation."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from fedmoe_jax import Population
from fedmoe_jax.base import ClientProfile
from fedmoe_jax.deploy.client import Client
from fedmoe_jax.deploy.server import Server
from fedmoe_jax.training import setup
from fedmoe_jax.training.config import TrainConfig

SIZES, FEATURES, CLASSES = (16, 7, 16, 7), 6, 3
FAST = {"flops_per_second": 1e11, "memory_bytes": 4e9, "downlink_bytes_per_second": 1e8, "uplink_bytes_per_second": 1e8}


def data(seed=0, sizes=SIZES):
    """(x, y, rows of each client, test x, test y) of three Gaussian classes."""
    draw = np.random.default_rng(seed)
    centres = draw.normal(size=(CLASSES, FEATURES))
    y = draw.integers(0, CLASSES, sum(sizes) + 40)
    y[-CLASSES:] = np.arange(CLASSES)
    x = (centres[y] + 0.5 * draw.normal(size=(len(y), FEATURES))).astype(np.float32)
    owned = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    return x[:-40], y[:-40], owned, x[-40:], y[-40:]


def text(seed=0, length=6):
    """As `data`, of texts of CLASSES letters and their next ones."""
    x, _, owned, test_x, _ = data(seed)
    letters = np.random.default_rng(seed).integers(0, CLASSES, (len(x) + len(test_x), length + 1))
    x, y = letters[:, :-1].astype(np.int32), letters[:, 1:].astype(np.int32)
    return x[: len(x) - 40], y[: len(y) - 40], owned, x[-40:], y[-40:]


def write(folder, made):
    """server.npz, and client-N/data.npz for each client."""
    x, y, owned, test_x, test_y = made
    np.savez(folder / "server.npz", x=made[0][:8], y=made[1][:8], test_x=test_x, test_y=test_y)
    for number, rows in enumerate(owned):
        (folder / f"client-{number}").mkdir()
        np.savez(folder / f"client-{number}" / "data.npz", x=x[rows], y=y[rows])


def config(folder, **changes):
    small = dict(
        population=5, cohort=5, experts=8, slots=2, rounds=3, batch_size=4, eval_every=3, aligner="greedy", client_schedule="constant"
    )
    small["model_options"] = {"hidden": 8, "expert_hidden": 6}
    return TrainConfig(data=str(folder / "server.npz"), **(small | changes))


def clients(folder, count=4, **options):
    """The clients, with a profile as if measured."""
    made = [Client(folder / f"client-{n}", folder / f"client-{n}" / "kept", number=n, **options) for n in range(count)]
    for client in made:
        (client.shelf.folder / "profile.json").write_text(json.dumps(FAST))
    return made


def simulated(made, of, rounds=3):
    """The states and infos of the same rounds in the simulation, and its setup. Clients that are not there have no examples."""
    x, y, owned, test_x, test_y = made
    owned = [*owned, *[np.zeros(0, int)] * (of.population - len(owned))]
    fast = ClientProfile(**{name: jnp.full(len(owned), value, jnp.float32) for name, value in FAST.items()})
    population = Population.from_arrays(x, y, owned, fast)
    built = setup.assemble(
        of,
        population,
        population,
        (jnp.asarray(test_x), jnp.asarray(test_y)),
        dict(num_classes=CLASSES, label_prior=jnp.zeros((0, CLASSES))),
    )
    algorithm = built.algorithm(of.cohort)
    states = [algorithm.init(jax.random.key(of.seed), population)]
    infos = []
    for _ in range(rounds):
        state, info = algorithm.step(states[-1], population)
        states.append(state)
        infos.append(info)
    return states, infos, built


def served(folder, of, members, note=lambda line: None):
    """A server that these clients have come to."""
    server = Server(of, folder / "run", note=note)
    for number, client in enumerate(members):
        assert server.enter(f"node-{number}", client.hello()) == number
    server.start()
    return server


def updates(tasks, members):
    """What these clients return, by node."""
    return {node: members[int(node.removeprefix("node-"))].train(task) for node, task in tasks.items()}
