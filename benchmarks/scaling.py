"""What a round costs on several devices: strong and weak scaling, bytes that a device sends, and its share of time in collectives.

    python benchmarks/scaling.py --out FILE                      on all devices of this machine: 1, 2, 4, ... of them
    python benchmarks/scaling.py --small --out FILE              in small, with XLA_FLAGS=--xla_force_host_platform_device_count=2 on a CPU

One JSON line a figure, also on standard output. All meshes of a case are timed in turns, in one process. Meshes are told as client x
expert devices. Strong scaling: the cohort is the same for any number of devices; weak: it grows with it, and so do the clients of the
population. Ratios of times are one device over several: the number of devices is ideal where scaling is strong, 1 where it is weak.

The share of collectives is of the time from the first to the last event of a device in a profile of some rounds, waiting for other
devices included; where devices are threads of a CPU, of their number times the wall time.
"""

import argparse
import concurrent.futures
import datetime
import glob
import json
import tempfile
import time

import jax
import jax.numpy as jnp
import optax
from engines import experts
from rounds import in_turns, population

import fedmoe_jax as fm
from fedmoe_jax.distributed.traffic import collectives, expected
from fedmoe_jax.training.metrics import environment

COLLECTIVES = ("nccl", "all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all", "ppermute", "psum")
ROUNDS = 3


def mlp(cohort, small):
    """Clients with the examples of W2, ten times the cohort, and an MLP with a layer of experts."""
    number, hidden = (8, 32) if small else (64, 128)
    model = fm.models.create(
        "mlp", input_shape=(784,), num_classes=10, num_experts=number, top_k=1, seed=0, hidden=hidden, expert_hidden=hidden
    )
    options = dict(client_optimizer=optax.sgd(0.05), batch_size=20, local_epochs=1, solo_examples=16)
    options |= dict(aligner=fm.alignment.balanced(num_experts=number, max_slots=2 if small else 4), cohort_size=cohort)
    return population(10 * cohort), model, fm.models.losses.cross_entropy, options


def wide(cohort, small):
    """A layer of experts as wide as those of a small language model, 512 tokens a client, in bfloat16."""
    width, hidden, number = (32, 64, 8) if small else (512, 2048, 64)
    data, model, loss, options = experts(cohort, number, 4, 32 if small else 128, width, hidden, 4)
    return data, model, loss, options | dict(local_epochs=1, solo_examples=16)


CASES = {"wide": (wide, 256, 16), "mlp": (mlp, 1024, 64)}


class Side:
    """A round on a mesh, with its state and population."""

    def __init__(self, case, cohort, shape, small):
        data, model, loss, options = case(cohort, small)
        self.mesh, self.cohort, self.largest = fm.distributed.mesh(*shape), cohort, data.max_examples
        self.example_bytes = (data.x.nbytes + data.y.nbytes) / len(data.x)
        data = fm.distributed.place(data, self.mesh)
        algorithm = fm.federated_moe(
            model, loss, server_optimizer=optax.sgd(1.0), engine="auto", mesh=self.mesh, chunk_size=cohort, **options
        )
        self.data, self.state, self.candidates = data, algorithm.init(jax.random.key(0), data), options["aligner"]
        self.candidates = self.candidates.max_slots + self.candidates.probes
        self.lowered = fm.rounds(algorithm.step, ROUNDS).lower(self.state, data, ROUNDS)

    def compile(self):
        self.program = self.lowered.compile()
        return self

    def __call__(self):
        """Seconds of a round."""
        start = time.perf_counter()
        self.state, _ = jax.block_until_ready(self.program(self.state, self.data, jnp.int32(ROUNDS)))
        return (time.perf_counter() - start) / ROUNDS

    def sent(self):
        """Bytes that a device sends in a round: by the program, and by the formula of `distributed.traffic`.

        The number of rounds is given to the program, so that its text counts one.
        """
        found = collectives(self.program.as_text(), self.mesh.size, unknown=1)
        weights = jax.tree.leaves(self.state.experts)
        sizes = dict(
            expert_bytes=sum(leaf.nbytes for leaf in weights) / len(weights[0]),
            shared_bytes=1.0 * sum(leaf.nbytes for leaf in jax.tree.leaves(self.state.shared)),
        )
        rows, columns = self.mesh.devices.shape
        formula = expected(
            clients=rows, experts=columns, cohort=self.cohort, chunk=self.cohort, num_experts=len(weights[0]), candidates=self.candidates,
            example_bytes=self.example_bytes, largest=self.largest, **sizes,
        )  # fmt: skip
        return sum(each.bytes * each.times for each in found), sum(formula.values())

    def share(self):
        """Of a device's time, that in collectives."""
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            with jax.profiler.trace(folder):
                start = time.perf_counter()
                self()
                wall = 1e9 * (time.perf_counter() - start)
            (file,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
            planes = [
                plane for plane in jax.profiler.ProfileData.from_file(file).planes if plane.name.startswith(("/device:GPU", "/host:CPU"))
            ]
            devices = [plane for plane in planes if plane.name.startswith("/device:GPU")]
            if devices:
                shares = [_share(spans) for spans in map(_spans, devices) if spans]  # those of the mesh
                return sum(shares) / len(shares)
            events = [event for plane in planes for line in plane.lines if line.name.startswith("tf_XLA") for event in line.events]
            return sum(event.duration_ns for event in events if _is_collective(event)) / (wall * self.mesh.size)


def _is_collective(event):
    return any(word in event.name.lower().replace("_", "-") for word in COLLECTIVES)


def _spans(plane):
    """Begin and end of what a GPU did, and whether that was a collective."""
    lines = [line for line in plane.lines if line.name.startswith("Stream")] or list(plane.lines)
    return [(event.start_ns, event.start_ns + event.duration_ns, _is_collective(event)) for line in lines for event in line.events]


def _share(spans):
    """Time of a GPU in collectives, overlaps counted once, over that from its first to its last event."""
    covered, until = 0.0, float("-inf")
    for first, last, _ in sorted(span for span in spans if span[2]):
        covered += max(0.0, last - max(first, until))
        until = max(until, last)
    return covered / (max(last for _, last, _ in spans) - min(first for first, _, _ in spans))


def shapes_of(most):
    """Meshes of 1, 2, 4, ... devices: all along client, and from two on all along expert, and both."""
    number, found = 1, []
    while number <= most:
        found += [(number, 1)] + [(1, number)] * (number > 1) + [(number // 2, 2)] * (number > 2)
        number *= 2
    return found


def figures(case, scaling, arguments):
    """(metric, value, unit, against, ratio) of every mesh of a case."""
    make, large, little = CASES[case]
    cohort = arguments.cohort or (little if arguments.small else large)
    shapes = [shape for shape in shapes_of(arguments.devices or jax.device_count()) if scaling == "strong" or shape[1] == 1]
    sides = [Side(make, cohort * (shape[0] if scaling == "weak" else 1), shape, arguments.small) for shape in shapes]
    with concurrent.futures.ThreadPoolExecutor(len(sides)) as pool:
        sides = list(pool.map(Side.compile, sides))
    times = in_turns(*sides, repeats=arguments.repeats)
    for side, (rows, columns), seconds in zip(sides, shapes, times, strict=True):
        mesh = f"{rows} x {columns} devices"
        yield f"round, {mesh}", seconds, "s", "1 x 1 devices", times[0] / seconds
        yield f"clients a second, {mesh}", side.cohort / seconds, "1/s", None, None
        memory = side.program.memory_analysis()
        yield f"state and data of a device, {mesh}", memory.argument_size_in_bytes, "bytes", None, None
        yield f"temporary memory of a device, {mesh}", memory.temp_size_in_bytes, "bytes", None, None
        if side.mesh.size > 1:
            sent, formula = side.sent()
            yield f"sent by a device, {mesh}", sent, "bytes", "formula", sent / formula
    for side, (rows, columns) in zip(sides, shapes, strict=True):
        if side.mesh.size > 1:
            yield f"share of time in collectives, {rows} x {columns} devices", side.share(), "1", None, None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="file of JSON lines; standard output only if not given")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--devices", type=int, help="most devices; all if not given")
    parser.add_argument("--cohort", type=int, help="clients of a round, of each device where scaling is weak")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="small models and cohorts")
    arguments = parser.parse_args()
    about = environment()
    about = dict(device=about["device"], versions=about["versions"], date=datetime.date.today().isoformat())
    lines = open(arguments.out, "w", encoding="utf-8") if arguments.out else None  # noqa: SIM115 - one line as each figure comes
    for case in arguments.cases:
        for scaling in ("strong", "weak"):
            for metric, value, unit, against, ratio in figures(case, scaling, arguments):
                figure = dict(bench="scaling", case=f"{case}{', small' if arguments.small else ''}, {scaling}", metric=metric, value=value)
                line = json.dumps(figure | dict(unit=unit, against=against, ratio=ratio) | about)
                print(line, flush=True)
                if lines:
                    print(line, file=lines, flush=True)


if __name__ == "__main__":
    main()
