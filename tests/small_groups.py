"""Two layers with assignments of their own for tests: a model, fixed experts for each client, and the model in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from moe_oracle import oracle
from small_round import CLASSES, CLIENTS, EXPERTS, FEATURES, KEY, SIZES

from fedmoe_jax import NO_EXPERT, Aligner, Alignment, nn, sampling
from fedmoe_jax.base import Feedback, stage_key

HIDDEN, WIDTHS = 8, (6, 5)
HELD = np.array(  # of layer 0, then of layer 1, where nobody has expert 2
    [[0, 2, 4, 5], [1, 2, 7, 5], [3, -1, 4, 7], [2, 0, -1, -1], [-1, -1, 5, 4], [3, 1, 7, 4], [0, 1, 5, -1], [2, 3, 7, 5]], np.int32
)
PROBED = np.array([[1, 6], [3, 4], [0, 6], [1, -1], [-1, 7], [0, 5], [2, 6], [1, 4]], np.int32)


class Net(nnx.Module):
    """Two MoE layers of different width."""

    def __init__(self, names=("first", "second"), top_k=1, seed=0):
        rngs = nnx.Rngs(seed)
        self.into = nn.Linear(FEATURES, HIDDEN, rngs=rngs)
        quiet = dict(top_k=top_k, balance_weight=0.0, z_weight=0.0, rngs=rngs)
        self.moe = nnx.List([nn.MoE(HIDDEN, width, EXPERTS, group=name, **quiet) for width, name in zip(WIDTHS, names, strict=True)])
        self.head = nn.Linear(HIDDEN, CLASSES, rngs=rngs)

    def __call__(self, x):
        h = jax.nn.relu(self.into(x))
        for layer in self.moe:
            h = h + layer(h)
        return self.head(h)


def fixed():
    """HELD and PROBED by client; the state is the last feedback."""

    def init(num_clients):
        slots = jnp.zeros((num_clients, 4))
        return Feedback(jnp.zeros(num_clients, jnp.int32), slots.astype(jnp.int32), slots, slots, jnp.zeros((num_clients, 6)))

    def align(key, state, cohort):
        held = jnp.where(cohort.present[:, None], jnp.array(HELD)[cohort.client], NO_EXPERT)
        nothing = jnp.zeros(held.shape)
        return Alignment(held, jnp.array(PROBED)[cohort.client], nothing, nothing[:, :2]), state

    return Aligner(init, align, lambda state, cohort, alignment, feedback: feedback, 2, 1, EXPERTS, 2)


def everyone():
    """The order of the clients in the first round of a cohort of all."""
    return np.asarray(sampling.cohort(stage_key(jax.random.fold_in(KEY, 0), "cohort"), CLIENTS, CLIENTS))


def examples(data, client):
    batch = data.batch(jnp.int32(client), jnp.arange(SIZES[client]))
    return np.asarray(batch.x, np.float64), np.asarray(batch.y)


def forward(net, x, held):
    """Logits, and the tokens of each layer, in NumPy: layer l has the experts that the mask held[l] marks."""
    h, counts = np.maximum(x @ np.asarray(net.into.kernel.get_value()) + np.asarray(net.into.bias.get_value()), 0), []
    for layer, mask in zip(net.moe, held, strict=True):
        values = {name: np.asarray(getattr(layer, name).get_value(), np.float64) for name in ("router", "w_in", "w_out", "b_in", "b_out")}
        rows, nothing = h[:, None], np.zeros(EXPERTS)
        y, tokens, _ = oracle(values, rows, mask, nothing, np.ones(len(x), bool), top_k=1, at=(values["router"], rows))
        h = h + y[:, 0]
        counts.append(tokens.sum(0))
    return h @ np.asarray(net.head.kernel.get_value()) + np.asarray(net.head.bias.get_value()), counts


def masks(row):
    """HELD of one client as a mask for each layer."""
    return [np.isin(np.arange(EXPERTS) + layer * EXPERTS, row[2 * layer : 2 * layer + 2]) for layer in range(2)]


def mean_loss(logits, y):
    return float(optax.softmax_cross_entropy_with_integer_labels(jnp.array(logits), jnp.array(y)).mean())
