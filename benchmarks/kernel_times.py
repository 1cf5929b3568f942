"""Where the time of a round goes on a GPU: its kernels, by what they do.

    python benchmarks/kernel_times.py > benchmarks/results/kernel_times.jsonl

One JSON line a figure: milliseconds of a round, the rounds being in one compiled loop, of alignment alone too; and of that, as
the profiler sees it, how long the device works, multiplies matrices (cuBLAS, cuDNN and Triton), moves rows (gathers, scatters,
copies) and does anything else, and how many kernels it starts. Elsewhere than on a GPU there is the first figure only.
"""

import argparse
import datetime
import functools
import gzip
import json
import pathlib
import tempfile
import time

import jax
from engines import EXPERTS, FEDAVG, SMALL, algorithm, experts, fedavg
from roofline import TRANSFORMER, transformer
from rounds import CALLS, alignment

import fedmoe_jax as fm
from fedmoe_jax.training.metrics import environment

PRODUCTS = "gemm", "nvjet", "cutlass", "fmha", "flash"
MOVES = "gather", "scatter", "concatenate", "transpose", "slice", "pad", "memcpy", "sort"
ROUNDS = {
    "fedavg 1000x100": functools.partial(fedavg, *FEDAVG[0]),
    "fedavg 10000x1000": functools.partial(fedavg, *FEDAVG[1]),
    **{f"experts {'x'.join(map(str, row))}": functools.partial(experts, *row) for row in EXPERTS},
    f"transformer {'x'.join(map(str, TRANSFORMER))}": functools.partial(transformer, *TRANSFORMER),
}


def kernels(folder):
    """(begin, microseconds, name) of what the GPU did, from a folder that the profiler wrote."""
    (file,) = (path for path in pathlib.Path(folder).rglob("*.trace.json.gz") if "perfetto" not in path.name)
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    named = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
    streams = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e.get("name") == "thread_name"}
    found = [
        (e["ts"], e["dur"], e["name"])
        for e in events
        if e.get("ph") == "X" and "GPU" in named.get(e["pid"], "") and "Stream" in streams.get((e["pid"], e["tid"]), "")
    ]
    return sorted(found)


def kind(name):
    """What a kernel does, by its name."""
    lower = name.lower()
    return "products" if any(word in lower for word in PRODUCTS) else "moves" if any(word in lower for word in MOVES) else "others"


def times(found, rounds):
    """Milliseconds a round of each kind and in all, counting once what runs at the same time, and kernels a round."""
    total, end = dict(busy=0.0, products=0.0, moves=0.0, others=0.0), 0.0
    for begin, duration, name in found:
        own = max(begin + duration - max(begin, end), 0.0)
        end = max(end, begin + duration)
        total["busy"] += own
        total[kind(name)] += own
    return {name: 1e-3 * value / rounds for name, value in total.items()}, len(found) / rounds


def of_rounds(make, rounds=4):
    """A function that runs so many rounds in one loop, and how many."""
    made = make()
    population, round_ = made[0], algorithm(made, "auto")
    run, state = fm.rounds(round_.step, rounds), round_.init(jax.random.key(0), population)

    def once():
        nonlocal state
        state, _ = jax.block_until_ready(run(state, population))

    return once, rounds


def figures(once, rounds):
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - start)
    yield "round", 1e3 * sorted(seconds[1:])[1] / rounds, "ms"
    if jax.default_backend() == "gpu":
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                once()
            milliseconds, started = times(kernels(folder), rounds)
        for name, value in milliseconds.items():
            yield f"device, {name}", value, "ms"
        yield "kernels started", started, ""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    rounds = {"experts, small": functools.partial(experts, *SMALL[0])} if parser.parse_args().small else ROUNDS
    cases = {case: functools.partial(of_rounds, make) for case, make in rounds.items()}
    if rounds is ROUNDS:
        cases["alignment 1000x64"] = lambda: (alignment(64, 1000, 10_000), CALLS)
    about = environment()
    about = dict(device=about["device"], versions=about["versions"], date=datetime.date.today().isoformat())
    for case, make in cases.items():
        for metric, value, unit in figures(*make()):
            print(json.dumps(dict(bench="kernel_times", case=case, metric=metric, value=value, unit=unit) | about), flush=True)


if __name__ == "__main__":
    main()
