"""What does it cost to keep the clients' examples on the host, in arrays or in files, instead of on the device?

    python benchmarks/streaming.py > benchmarks/results/streaming.jsonl

One JSON line a figure: seconds of a round with all examples on the device; with those of a few rounds at a time, read ahead while
the device computes; and the same read only when they are needed. All sides take turns in one process. Files are read once before,
so that they come from the system's cache where memory suffices.
"""

import argparse
import dataclasses
import datetime
import json
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rounds import CLASSES, EXAMPLES, FEATURES, algorithm, in_turns

import fedmoe_jax as fm
from fedmoe_jax.training.metrics import environment
from fedmoe_jax.training.stream import Stream

KEY = jax.random.key(0)


def examples(clients, folder):
    """Examples of all clients as files: x of standard normal numbers, and y."""
    draw, count = np.random.default_rng(0), clients * EXAMPLES
    x = np.lib.format.open_memmap(folder / "x.npy", "w+", np.float32, (count, FEATURES))
    for part in np.array_split(np.arange(count), max(1, count // 100_000)):
        x[part] = draw.standard_normal((len(part), FEATURES), dtype=np.float32)
    x.flush()
    np.save(folder / "y.npy", draw.integers(0, CLASSES, count).astype(np.int32))


def side(made, arguments, first, windows):
    """A function that trains all rounds on the populations of `windows()` and gives the seconds of one."""
    run = fm.rounds(made.step, arguments.block)
    start = made.init(KEY, first)

    def once():
        state = jax.block_until_ready(jax.tree.map(jnp.copy, start))
        begin = time.perf_counter()
        for count, population in windows():
            state, _ = jax.block_until_ready(run(state, population, count))
        return (time.perf_counter() - begin) / arguments.rounds

    return once


def measure(arguments, folder):
    examples(arguments.clients, folder)
    files = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("x", "y")]
    owned = list(np.arange(len(files[0])).reshape(-1, EXAMPLES))
    arrays = [np.array(file) for file in files]
    resident = fm.Population.from_arrays(*arrays, owned)
    made = algorithm(arguments.experts, arguments.cohort)
    stops = [*range(arguments.block, arguments.rounds, arguments.block), arguments.rounds]
    spans = list(zip([0, *stops[:-1]], stops, strict=True))

    start = made.init(KEY, resident)

    def ahead(stream):
        return lambda: stream.windows(start, cohort_size=arguments.cohort, stops=stops)

    def when_needed(stream):
        def windows():
            for first, last in spans:  # the thread finds nothing to read ahead
                state = dataclasses.replace(start, round=jnp.int32(first))
                yield from stream.windows(state, cohort_size=arguments.cohort, stops=[last])

        return windows

    streams = {"arrays": Stream.from_arrays(*arrays, owned), "files": Stream.from_arrays(*files, owned)}
    sides = {"on the device": side(made, arguments, resident, lambda: ((last - first, resident) for first, last in spans))}
    for name, stream in streams.items():
        sides[f"in {name}, read ahead"] = side(made, arguments, stream.index, ahead(stream))
        sides[f"in {name}, read when needed"] = side(made, arguments, stream.index, when_needed(stream))
    base, *others = in_turns(*sides.values(), repeats=arguments.repeats)
    yield "on the device", base, None
    for name, seconds in zip(list(sides)[1:], others, strict=True):
        yield name, seconds, seconds / base


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument("--cohort", type=int, default=1000)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--block", type=int, default=5, help="rounds whose examples are on the device at once")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    about = environment()
    about = dict(device=about["device"], versions=about["versions"], date=datetime.date.today().isoformat())
    case = f"{arguments.clients} clients of {EXAMPLES} x {FEATURES}, cohort {arguments.cohort}, {arguments.block} rounds at a time"
    with tempfile.TemporaryDirectory() as folder:
        for metric, value, ratio in measure(arguments, Path(folder)):
            figure = dict(bench="streaming", case=case, metric=f"round, {metric}", value=value, unit="s")
            print(json.dumps(figure | dict(against=ratio and "on the device", ratio=ratio) | about), flush=True)


if __name__ == "__main__":
    main()
