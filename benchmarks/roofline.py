"""How near does local training come to what the machine can do? Rounds of experts and of a transformer on a roofline.

    python benchmarks/roofline.py > benchmarks/results/roofline.jsonl
    python benchmarks/roofline.py --draw benchmarks/results/roofline.jsonl benchmarks/results/roofline.png

One JSON line a figure. The roofs are measured in the same process: the rate of a large product in bfloat16, and the bandwidth
of memory from reading and writing a large array. A round's FLOPs are the useful ones of its products, three passes of every token
through the weights that it uses, without padding and recomputation; its bytes are those that the plan (`local.plan`) predicts for
the kernels of the engine that trains them.
"""

import argparse
import datetime
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from engines import EXPERTS, SMALL, algorithm, experts, measure, milliseconds, split

import fedmoe_jax as fm
from fedmoe_jax.local import plan
from fedmoe_jax.local.cohort import batch_shape
from fedmoe_jax.training.metrics import environment

# clients, experts, slots, texts, tokens of a text, width, hidden, layers
TRANSFORMER, SMALL_TRANSFORMER = (64, 16, 2, 8, 256, 1024, 2048, 2), (4, 4, 2, 2, 16, 32, 64, 1)
VOCABULARY = 512


def matmul_rate(size):
    """FLOP/s of a product of two square matrices in bfloat16."""
    a, b = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in jax.random.split(jax.random.key(0)))
    product = jax.jit(lambda a, b: a @ b)
    return 2 * size**3 / (1e-3 * milliseconds(lambda: product(a, b), 10))


def bandwidth(bytes_of_array):
    """Bytes/s, reading and writing."""
    x = jnp.zeros(bytes_of_array // 4)
    add = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / (1e-3 * milliseconds(lambda: add(x), 10))


def transformer(clients, number, slots, texts, tokens, width, hidden, layers):
    """Population and round of a language model of one local step, each token sent to one expert of each layer."""
    draw = np.random.default_rng(0)
    text = draw.integers(0, VOCABULARY, (clients * texts, tokens + 1)).astype(np.int32)
    model = fm.models.create(
        "transformer", input_shape=(tokens,), num_classes=VOCABULARY, num_experts=number, top_k=1, seed=0, dtype=jnp.bfloat16,
        layers=layers, features=width, heads=8, kv_heads=8, expert_hidden=hidden, token_capacity=1.0,
    )  # fmt: skip
    aligner = fm.alignment.load_only(num_experts=number, max_slots=slots)
    options = dict(aligner=aligner, cohort_size=clients, batch_size=texts, client_optimizer=optax.sgd(0.02))
    return split(text[:, :-1], text[:, 1:], clients), model, fm.models.losses.cross_entropy, options


def useful_flops(row, sent):
    """Of a round's products, `sent` being the tokens that experts got, summed over layers."""
    if len(row) == 7:
        width, hidden = row[4:6]
        return sent * 2 * width * hidden * (2 + 3)  # no gradient of the inputs
    clients, _, _, texts, tokens, width, hidden, layers = row
    every = clients * texts * tokens
    attention = layers * (4 * width * width + tokens * width)  # projections, and scores and mixture of half the text before a token
    return 6 * (sent * 3 * width * hidden + every * (attention + width * VOCABULARY))


def traffic(made, engine):
    """Predicted bytes of all kernels of a round."""
    population, model, loss, options = made
    aligner, steps = options["aligner"], -(-population.max_examples // options["batch_size"])
    shape, held = batch_shape(population, options["batch_size"]), dict(slots=aligner.max_slots, probes=aligner.probes)
    plans = (plan.engines(fm.partition(model), loss, shape, **held, steps=steps, engine="dual", balance=balance) for balance in (0.0, 1.0))
    chosen = algorithm(made, engine).plan(population)
    flops, with_bytes = ([c.primal if own.use is None else c.dual for c, own in zip(found, chosen, strict=True)] for found in plans)
    return options["cohort_size"] * (sum(with_bytes) - sum(flops))


def rounds(small):
    rows = [("experts", experts, row) for row in (SMALL if small else EXPERTS)]
    rows += [("transformer", transformer, SMALL_TRANSFORMER if small else TRANSFORMER)]
    for name, make, row in rows:
        yield f"{name} {'x'.join(map(str, row))}", make(*row), row


def figures(small):
    peak, width = matmul_rate(512 if small else 8192), bandwidth(2**24 if small else 2**31)
    yield "roofs", "product of matrices in bfloat16", peak, "FLOP/s", None
    yield "roofs", "reading and writing", width, "bytes/s", None
    for case, made, row in rounds(small):
        for engine in ("primal", "auto"):
            time_of_round, _, _, tokens = measure(made, engine, 2 if small else 5)
            flops = useful_flops(row, tokens)
            rate, intensity = flops / (1e-3 * time_of_round), flops / traffic(made, engine)
            yield case, f"round, {engine}", time_of_round, "ms", None
            yield case, f"useful FLOPs, {engine}", rate, "FLOP/s", rate / peak
            yield case, f"useful FLOPs of a predicted byte, {engine}", intensity, "FLOP/byte", rate / min(peak, intensity * width)


def draw(source, target):
    """The figures of a file as a picture."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    lines = [json.loads(line) for line in Path(source).read_text().splitlines()]
    peak, width = (line["value"] for line in lines if line["case"] == "roofs")
    picture, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    points = []
    for case, marker in zip(dict.fromkeys(line["case"] for line in lines if line["case"] != "roofs"), "osD^v", strict=False):
        for engine, colour in (("primal", "tab:blue"), ("auto", "tab:orange")):
            found = {line["metric"]: line["value"] for line in lines if line["case"] == case}
            points.append((found[f"useful FLOPs of a predicted byte, {engine}"], found[f"useful FLOPs, {engine}"] / 1e12))
            axes.scatter(*points[-1], marker=marker, color=colour, s=60, label=f"{engine}: {readable(case)}", zorder=3)
    x = np.geomspace(0.5 * min(x for x, _ in points), 4 * max(x for x, _ in points), 200)
    axes.loglog(x, np.minimum(peak, x * width) / 1e12, color="black", linewidth=1.5, label="measured roofs")
    axes.set(xlabel="useful FLOPs of a predicted byte of memory traffic", ylabel="useful TFLOP/s", title=lines[0]["device"])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    picture.legend(fontsize=8, loc="outside right center")
    picture.savefig(target, dpi=130)


def readable(case):
    name, _, numbers = case.partition(" ")
    clients, number, slots, *_, width, hidden, last = numbers.split("x")
    layers = f", {last} layers" if name == "transformer" else ""
    return f"{name} of {width} x {hidden}{layers},\n{clients} clients, {slots} of {number} experts"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny shapes, to see that it runs")
    parser.add_argument("--draw", nargs=2, metavar=("JSONL", "PNG"), help="draw a file of figures instead")
    arguments = parser.parse_args()
    if arguments.draw:
        return draw(*arguments.draw)
    about = environment()
    about = dict(device=about["device"], versions=about["versions"], date=datetime.date.today().isoformat())
    for case, metric, value, unit, ratio in figures(arguments.small):
        against = ratio and ("its roof" if "byte" in metric else "a product in bfloat16")
        print(
            json.dumps(dict(bench="roofline", case=case, metric=metric, value=value, unit=unit, against=against, ratio=ratio) | about),
            flush=True,
        )


if __name__ == "__main__":
    main()
