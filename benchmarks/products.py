"""Products with experts, and the sums of their updates: in kernels of our own, and as the library multiplies them.

    python benchmarks/products.py > benchmarks/results/products.jsonl

One JSON line a figure: milliseconds of a product of all groups of rows with the experts that hold them, alone and with what the
history of three steps adds, and of the sum over four steps of each expert's updates; and how far the product with history is off
that of NumPy in float64, in the norm of some groups. Experts are spread evenly, or at random. Elsewhere than on a Hopper GPU both
sides are one.
"""

import argparse
import contextlib
import datetime
import json

import jax
import jax.numpy as jnp
import numpy as np
from engines import milliseconds

from fedmoe_jax import gpu, grouped
from fedmoe_jax.training.metrics import environment

# groups, rows of a group, width, hidden, experts
CASES = [(512, 64, 512, 2048, 64), (512, 64, 2048, 512, 64), (128, 256, 1024, 4096, 16), (4000, 32, 1024, 4096, 64)]
SMALL = [(12, 16, 64, 128, 3)]
STEPS = 4


def arrays(groups, rows, width, hidden, experts, spread):
    """Rows, weights, the expert of each group, a history of the steps before, and rows of all steps."""
    keys = iter(jax.random.split(jax.random.key(0), 3 * STEPS + 3))

    def normal(*shape):
        return jax.random.normal(next(keys), shape, jnp.bfloat16)

    draw = np.random.default_rng(0)
    index = draw.permutation(np.arange(groups) % experts) if spread == "evenly" else draw.integers(0, experts, groups)
    weights = (normal(experts, width, hidden) * width**-0.5).astype(jnp.bfloat16)
    history = [grouped.Part(0.1 * normal(groups, rows, rows), normal(groups, rows, hidden)) for _ in range(STEPS - 1)]
    x = normal(groups, rows, width)
    seen = [grouped.Rows(x, normal(groups, rows, hidden), jnp.full((groups, rows), 0.5)) for _ in range(STEPS)]
    return x, weights, jnp.int32(index), history, seen


def error(found, x, weights, index, history, groups=4):
    """Of some groups, relative to their norm."""
    some = np.linspace(0, len(x) - 1, groups).astype(int)
    want = np.stack([np.float64(x[g]) @ np.float64(weights[index[g]]) for g in some])
    want = 0.5 * want + sum(np.float64(part.mix[some]) @ np.float64(part.values[some]) for part in history)
    return float(np.linalg.norm(np.float64(found[some]) - want) / np.linalg.norm(want))


def figures(case, spread):
    """Metric, value, unit and ratio of each figure."""
    x, weights, index, history, seen = arrays(*case, spread)
    runs = {
        "product": lambda x, weights, index: grouped.matmul(x, weights, index),
        "product with history": lambda x, weights, index, *history: grouped.matmul(x, weights, index, 0.5, history),
        "sum of updates": lambda index, *seen: grouped.outer(list(seen), index, case[-1]),
    }
    given = {"product": (x, weights, index), "product with history": (x, weights, index, *history), "sum of updates": (index, *seen)}
    for metric, run in runs.items():
        before = None
        for side in ("library", "kernels"):
            jax.clear_caches()  # of what was traced for the other side
            with gpu.portable() if side == "library" else contextlib.nullcontext():
                program = jax.jit(run)
                time = milliseconds(lambda program=program, args=given[metric]: program(*args), 20)
            yield f"{metric}, {side}", time, "ms", before and before / time
            before = time
            if metric == "product with history":
                yield f"error, {side}", error(program(*given[metric]), x, weights, index, history), "", None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    cases = SMALL if parser.parse_args().small else CASES
    about = environment()
    about = dict(device=about["device"], versions=about["versions"], date=datetime.date.today().isoformat())
    for case in cases:
        for spread in ("evenly", "at random"):
            name = f"{'x'.join(map(str, case))}, spread {spread}"
            for metric, value, unit, ratio in figures(case, spread):
                figure = dict(bench="products", case=name, metric=metric, value=value, unit=unit, ratio=ratio)
                print(json.dumps(figure | about), flush=True)


if __name__ == "__main__":
    main()
