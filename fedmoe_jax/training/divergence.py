"""Whether a block of rounds went well, and what a run does that has diverged: go on, stop, or go back and take another way."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedmoe_jax import invariants
from fedmoe_jax.info import Info
from fedmoe_jax.round import State
from fedmoe_jax.training.interrupt import StoppedError

MOST_RETURNS = 3
"""Times that a run goes back to the same checkpoint before it stops."""


class DivergedError(StoppedError):
    """Training in which nothing is finite any more, in one line that names the round."""


def check_invariants(infos: Info, done: int, count: int, width: int) -> None:
    """Looks at a block of `count` rounds after `done`, of `width` runs.

    Raises:
      StoppedError: naming the first round and invariant that does not hold.
    """
    if infos.invariants is None:
        return
    holds = infos.invariants.reshape(width, -1, len(invariants.NAMES))[:, :count].all(axis=0)
    for row, name in zip(*np.nonzero(~holds), strict=True):
        raise StoppedError(f"round {done + row}: it does not hold that {invariants.NAMES[name]}")


def check_finite(state: State, infos: Info, results: Sequence[dict[str, Any]], done: int, count: int) -> None:
    """Looks at the end of a block of `count` rounds after `done`, and at what evaluation gave.

    Raises:
      DivergedError: if no update of the last round, not the test loss, or not every weight is finite.
    """
    none_left = np.asarray((infos.rejected_updates > 0) & (infos.clients == infos.rejected_updates))
    refused = none_left.reshape(len(results), -1)[:, count - 1]
    lost = any(not math.isfinite(given.get("eval_loss", 0.0)) for given in results)
    if refused.any() or lost or not _all_finite((state.experts, state.shared)):
        what = "training has diverged: no update, not the test loss or not every weight is finite; lower client_lr or server_lr"
        raise DivergedError(f"round {done + count - 1}: {what}")


@jax.jit
def _all_finite(weights):
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(weights)]).all()
