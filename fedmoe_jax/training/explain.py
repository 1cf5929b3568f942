"""How local training would treat each weight of a run, and why, in words and figures."""

import math

from fedmoe_jax.training.config import TrainConfig
from fedmoe_jax.training.memory import memory_bytes
from fedmoe_jax.training.setup import build


def explain(config: TrainConfig) -> str:
    """A table of the plan: engine of each weight, the cost of it in both, and why; and how many clients train side by side.

    Costs are those of one client's local training in billions of FLOPs, memory traffic counted as the FLOPs that take as long.

    Raises:
      ValueError: naming the field of `config` that cannot be.
    """
    setup = build(config)
    chunk = setup.chunk(memory_bytes())
    rows = [("weight", "engine", "primal", "dual", "why")]
    for choice in setup.algorithm(chunk).plan(setup.population):
        costs = ("", "") if not choice.primal else (_billions(choice.primal), _billions(choice.dual))
        group, _, name = choice.name.partition(".")
        rows.append((f"{('experts', 'shared')[int(group)]} {name}", "dual" if choice.use else "primal", *costs, choice.reason))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    clients = f"{chunk} of {config.cohort} clients train side by side; costs are a client's, in billions of FLOPs"
    return "\n".join([f"engine: {config.engine}; {clients}", *lines])


def _billions(flops: float) -> str:
    digits = max(0, 2 - math.floor(math.log10(flops / 1e9))) if flops else 0
    return f"{flops / 1e9:.{min(digits, 6)}f}"
