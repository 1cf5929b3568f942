"""What a round costs as the population or the model grows, how much of it is alignment, and what one compiled loop gains.

    python benchmarks/rounds.py > benchmarks/results/rounds.jsonl

One JSON line a figure; each compares its two sides in turns, in one process. The model is an MLP with a layer of experts, the
clients have the examples of W2 (benchmarks/engines.py), 60 of 784 features in batches of 20.
"""

import argparse
import datetime
import functools
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from engines import Experts, experts

import fedmoe_jax as fm
from fedmoe_jax import gpu, sampling
from fedmoe_jax.alignment import elimination
from fedmoe_jax.training.metrics import environment

EXAMPLES, FEATURES, CLASSES = 60, 784, 10
WIDTHS = (512, 2048), (1024, 4096)  # of experts and of what is hidden in them
CALLS = 5  # of alignment alone that are timed together
SMALL = 20  # clients of a round where calls from Python count


def population(clients, pool=600_000):
    """Clients of 60 examples each; those of a million share examples, through an index that no loader would write."""
    draw = np.random.default_rng(0)
    mean, y = 0.15 * draw.standard_normal((CLASSES, FEATURES)), draw.integers(0, CLASSES, min(pool, EXAMPLES * clients))
    x = (mean[y] + draw.standard_normal((len(y), FEATURES), dtype=np.float32)).astype(np.float32)
    few = fm.Population.from_arrays(x, y.astype(np.int32), list(np.arange(len(y)).reshape(-1, EXAMPLES)))
    profile = fm.ClientProfile.sample(jax.random.key(0), clients, source="uniform")
    order, offsets = jnp.tile(few.order, -(-clients // few.num_clients))[: clients * EXAMPLES], jnp.arange(clients + 1) * EXAMPLES
    return fm.Population(few.x, few.y, order, offsets.astype(jnp.int32), profile, EXAMPLES)


def algorithm(experts, cohort, slots=4, hidden=128):
    model = fm.models.create(
        "mlp", input_shape=(FEATURES,), num_classes=CLASSES, num_experts=experts, top_k=1, seed=0, hidden=hidden, expert_hidden=hidden
    )
    return fm.federated_moe(
        model, fm.models.losses.cross_entropy, client_optimizer=optax.sgd(0.05), server_optimizer=optax.sgd(1.0),
        aligner=fm.alignment.balanced(num_experts=experts, max_slots=slots), cohort_size=cohort, batch_size=20, local_epochs=1,
        engine="primal",
    )  # fmt: skip


def runner(algorithm, population, rounds):
    """A function that runs some rounds in one loop and gives the seconds of one; bytes of the program beside its arguments, and in all."""
    state = algorithm.init(jax.random.key(0), population)
    program = fm.rounds(algorithm.step, rounds).lower(state, population).compile()

    def once():
        nonlocal state
        start = time.perf_counter()
        state, _ = jax.block_until_ready(program(state, population))
        return (time.perf_counter() - start) / rounds

    memory = program.memory_analysis()
    given = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return once, (memory.temp_size_in_bytes, given + memory.temp_size_in_bytes)


def one_by_one(algorithm, population, rounds):
    """The same, but each round is called from Python."""
    state = algorithm.init(jax.random.key(0), population)
    step = jax.jit(algorithm.step, donate_argnums=0)

    def once():
        nonlocal state
        start = time.perf_counter()
        for _ in range(rounds):
            state, info = step(state, population)
        jax.block_until_ready((state, info))
        return (time.perf_counter() - start) / rounds

    return once


def in_turns(*sides, repeats):
    """Median seconds of each side; the first call of each is not counted."""
    for side in sides:
        side()
    times = [[side() for side in sides] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def alignment(experts, cohort, clients, slots=4):
    """Rounds of alignment alone, in one compiled loop: assignment, probes, and what is learnt from the feedback."""
    aligner = fm.alignment.balanced(num_experts=experts, max_slots=slots)
    keys, draw = jax.random.split(jax.random.key(1), 3), jnp.ones(cohort, bool)

    def step(state, key):
        chosen = fm.Cohort(sampling.cohort(key, clients, cohort), draw, jnp.full(cohort, slots))
        found, state = aligner.align(key, state, chosen)
        noise = jax.random.uniform(keys[0], (cohort, slots + aligner.probes))
        tokens = jnp.full((cohort, slots), 15, jnp.int32)
        feedback = fm.Feedback(jnp.full(cohort, EXAMPLES), tokens, noise[:, :slots] * 15, noise[:, :slots] * 15, noise)
        return aligner.learn(state, chosen, found, feedback), None

    @functools.partial(jax.jit, donate_argnums=0)
    def rounds(state, key):
        return jax.lax.scan(step, state, jax.random.split(key, CALLS))[0]

    state = aligner.init(clients)
    count = 0

    def once():
        nonlocal state, count
        count += 1
        key = jax.random.fold_in(keys[2], count)
        start = time.perf_counter()
        state = jax.block_until_ready(rounds(state, key))
        return (time.perf_counter() - start) / CALLS

    return once


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[case for case in CASES if case not in ACCELERATOR])
    parser.add_argument("--clients", type=int, default=1_000_000, help="the large population")
    parser.add_argument("--cohort", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of a timing")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    about = environment()
    about = dict(device=about["device"], versions=about["versions"], date=datetime.date.today().isoformat())
    for case in arguments.cases:
        for metric, value, unit, against, ratio in CASES[case](arguments):
            cohort = SMALL if case == "loop" else arguments.cohort
            figure = dict(bench="rounds", case=f"{case}, cohort {cohort}", metric=metric, value=value, unit=unit)
            print(json.dumps(figure | dict(against=against, ratio=ratio) | about), flush=True)


def of_population(arguments):
    """64 experts, the same cohort out of 10,000 clients and out of many more."""
    made, sizes = algorithm(64, arguments.cohort), (10 * arguments.cohort, arguments.clients)
    (few, _), (many, _) = (runner(made, population(size), arguments.rounds) for size in sizes)
    base, time_of_round = in_turns(few, many, repeats=arguments.repeats)
    yield f"round, {sizes[0]} clients", base, "s", None, None
    yield f"round, {sizes[1]} clients", time_of_round, "s", f"{sizes[0]} clients", time_of_round / base


def of_experts(arguments):
    """Four slots of 64 experts against four slots of four."""
    clients = population(10 * arguments.cohort)
    (few, before), (many, after) = (runner(algorithm(number, arguments.cohort), clients, arguments.rounds) for number in (4, 64))
    base, time_of_round = in_turns(few, many, repeats=arguments.repeats)
    yield "round, 4 experts, 4 slots", base, "s", None, None
    yield "round, 64 experts, 4 slots", time_of_round, "s", "4 experts", time_of_round / base
    for what, less, more in zip(("temporary memory", "memory"), before, after, strict=True):
        yield f"{what}, 4 experts, 4 slots", less, "bytes", None, None
        yield f"{what}, 64 experts, 4 slots", more, "bytes", "4 experts", more / less


def of_alignment(arguments):
    """Assignment, probes, fitness and load, against a whole round."""
    made, clients = algorithm(64, arguments.cohort), population(10 * arguments.cohort)
    whole, _ = runner(made, clients, arguments.rounds)
    base, part = in_turns(whole, alignment(64, arguments.cohort, clients.num_clients), repeats=arguments.repeats)
    yield "round, 64 experts", base, "s", None, None
    yield "alignment alone, 64 experts", part, "s", "round", part / base
    yield "steps of Newton's method in it", newton_steps(64, arguments.cohort, clients.num_clients), "", None, None


def newton_steps(experts, cohort, clients):
    """Systems of equations that a round of alignment solves, one after the other."""
    solve, solved = elimination.factorised, []

    def counted(*system):
        jax.debug.callback(lambda: solved.append(1))
        return solve(*system)

    jax.clear_caches()  # of what was traced without it
    elimination.factorised = counted
    try:
        with gpu.portable():  # kernels of our own do not call it
            in_turns(alignment(experts, cohort, clients), repeats=5)  # and once before
    finally:
        elimination.factorised = solve
        jax.clear_caches()
    jax.effects_barrier()
    return len(solved) / CALLS / 6


def of_wide(arguments):
    """The same of experts as wide as those of language models, 512 tokens a client, in bfloat16."""
    for width, hidden in WIDTHS:
        clients, _, loss, options = experts(arguments.cohort, 64, 4, 128, width, hidden, 4)
        options |= dict(server_optimizer=optax.sgd(1.0), local_epochs=1, solo_examples=16, engine="auto")

        def rounds_of(number, clients=clients, loss=loss, options=options, sizes=(width, hidden, width)):
            model = Experts(*sizes, number, token_capacity=1.0, use_bias=False, dtype=jnp.bfloat16)
            options["aligner"] = fm.alignment.balanced(num_experts=number, max_slots=4)
            return runner(fm.federated_moe(model, loss, **options), clients, arguments.rounds)[0]

        alone = alignment(64, arguments.cohort, clients.num_clients)
        few, many, part = in_turns(rounds_of(4), rounds_of(64), alone, repeats=arguments.repeats)
        of = f"of {width} x {hidden}"
        yield f"round, 4 experts {of}, 4 slots", few, "s", None, None
        yield f"round, 64 experts {of}, 4 slots", many, "s", f"4 experts {of}", many / few
        yield "alignment alone, 64 experts", part, "s", f"round of experts {of}", part / many


def of_loop(arguments):
    """Rounds in one compiled loop against rounds called from Python; few clients a round, so that calls count."""
    made, clients = algorithm(8, SMALL, slots=2, hidden=32), population(5 * SMALL)
    rounds = 20
    looped, _ = runner(made, clients, rounds)
    base, time_of_round = in_turns(one_by_one(made, clients, rounds), looped, repeats=arguments.repeats)
    yield "round called from Python", base, "s", None, None
    yield "round in a loop", time_of_round, "s", "called from Python", time_of_round / base


CASES = {"population": of_population, "experts": of_experts, "alignment": of_alignment, "loop": of_loop, "wide": of_wide}
ACCELERATOR = ("wide",)  # minutes on a CPU

if __name__ == "__main__":
    main()
