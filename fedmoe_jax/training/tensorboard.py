"""Metrics of a run as TensorBoard scalars: a callback for `trainer.train`."""

import functools
from collections.abc import Callable
from typing import Any

from fedmoe_jax.training.metrics import METRIC_FIELDS, Record


def scalars(folder: str) -> Callable[[Any, Record], None]:
    """A callback that writes every number of a round to event files in `folder`.

    Raises:
      ValueError: if tensorboardX is not installed.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ValueError("tensorboard: install tensorboardX, pip install '.[tensorboard]' in a checkout") from None
    make = functools.cache(lambda: SummaryWriter(folder))  # at the first round, so that a mistake leaves no folder

    def callback(state: Any, record: Record) -> None:
        writer = make()
        for name in METRIC_FIELDS:
            if name != "round" and isinstance(record[name], int | float):
                writer.add_scalar(name, record[name], record["round"])
        writer.flush()

    return callback
