"""Small rounds for tests: a model, a population and an algorithm, and how far weights are apart."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedmoe_jax import ClientProfile, Population, alignment, federated_moe
from fedmoe_jax.models import create
from fedmoe_jax.models.losses import cross_entropy

FEATURES, CLASSES, EXPERTS, CLIENTS, BATCH = 6, 3, 4, 8, 4
SIZES = (3, 9, 4, 1, 7, 5, 8, 2)
KEY = jax.random.key(0)


def model(num_experts=EXPERTS, top_k=1, **options):
    small = dict(hidden=8, expert_hidden=6, balance_weight=0.0, z_weight=0.0)
    shape = dict(input_shape=(FEATURES,), num_classes=CLASSES, num_experts=num_experts, top_k=top_k, seed=0)
    return create("mlp", **shape, **(small | options))


def population(memory_bytes=1e9, sizes=SIZES, broken=()):
    """Clients of unequal sizes; those in `broken` have NaN features."""
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(sum(sizes), FEATURES)).astype(np.float32), draw.integers(0, CLASSES, sum(sizes))
    owned = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    for client in broken:
        x[owned[client]] = np.nan
    fast = jnp.full(len(sizes), 1e9)
    return Population.from_arrays(x, y, owned, ClientProfile(fast, jnp.full(len(sizes), float(memory_bytes)), fast, fast))


def aligner(name="random", num_experts=EXPERTS, max_slots=2):
    return getattr(alignment, name)(num_experts=num_experts, max_slots=max_slots)


def algorithm(of=None, **options):
    defaults = dict(client_optimizer=optax.sgd(0.3), server_optimizer=optax.sgd(1.0), cohort_size=5, batch_size=BATCH, engine="primal")
    options = defaults | {"aligner": options.get("aligner") or aligner(), "solo_examples": 0} | options
    if "local_steps" not in options:
        options.setdefault("local_epochs", 1)
    return federated_moe(model() if of is None else of, cross_entropy, **options)


def run(alg, data, count=1, key=KEY):
    """The state and the last Info after `count` rounds, step by step."""
    state = alg.init(key, data)
    for _ in range(count):
        state, info = alg.step(state, data)
    return state, info


def weights(state):
    return state.experts, state.shared


def distance(a, b):
    return sum(float(((x - y) ** 2).sum()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)) ** 0.5
