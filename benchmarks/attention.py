"""Causal attention in bfloat16 by XLA and by cuDNN: how far both are from float32, and how long they take.

    python benchmarks/attention.py > benchmarks/results/attention.jsonl

One JSON line a figure: the relative error of the output and of each gradient (against XLA in float32 with products at the
highest precision, of the same inputs), whether six runs gave the same bits, and milliseconds of the forward and backward pass.
cuDNN's needs an NVIDIA GPU; elsewhere XLA's is measured alone.
"""

import argparse
import datetime
import functools
import json

import jax
import jax.numpy as jnp
from engines import milliseconds

from fedmoe_jax.nn.attention import is_fused
from fedmoe_jax.training.metrics import environment

# texts, tokens, heads, heads of keys and values, features of a head
CASES = [(512, 256, 8, 8, 128), (512, 256, 8, 2, 128), (512, 80, 4, 2, 32)]
RESULTS = "output", "gradient of queries", "gradient of keys", "gradient of values"
SMALL = [(2, 16, 4, 2, 8)]


def inputs(texts, tokens, heads, kv_heads, features):
    """Queries, keys, values and the cotangent of the output."""
    keys = jax.random.split(jax.random.key(0), 4)
    numbers = zip(keys, (heads, kv_heads, kv_heads, heads), strict=True)
    return [jax.random.normal(key, (texts, tokens, number, features), jnp.bfloat16) for key, number in numbers]


def attend(implementation):
    """The output and the gradients of queries, keys and values."""

    def both(q, k, v, g):
        y, pull = jax.vjp(lambda *args: jax.nn.dot_product_attention(*args, is_causal=True, implementation=implementation), q, k, v)
        return y, *pull(g)

    return jax.jit(both)


def figures(cases):
    for case in cases:
        given, name = inputs(*case), "attention " + "x".join(map(str, case))
        with jax.default_matmul_precision("highest"):
            exact = attend("xla")(*(a.astype(jnp.float32) for a in given))
        for implementation in ("xla", "cudnn") if is_fused(given[0].shape, given[0].dtype) else ("xla",):
            run = attend(implementation)
            found = [run(*given) for _ in range(6)]
            for what, one, right in zip(RESULTS, found[0], exact, strict=True):
                error = jnp.linalg.norm((one.astype(jnp.float32) - right).ravel()) / jnp.linalg.norm(right.ravel())
                yield name, f"relative error of the {what}, {implementation}", float(error), ""
            same = all(bool((one == first).all()) for other in found for one, first in zip(other, found[0], strict=True))
            yield name, f"six runs gave the same bits, {implementation}", float(same), ""
            yield name, f"forward and backward pass, {implementation}", milliseconds(functools.partial(run, *given), 10), "ms"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    about = environment()
    about = dict(device=about["device"], versions=about["versions"], date=datetime.date.today().isoformat())
    for case, metric, value, unit in figures(SMALL if parser.parse_args().small else CASES):
        print(json.dumps(dict(bench="attention", case=case, metric=metric, value=value, unit=unit) | about), flush=True)


if __name__ == "__main__":
    main()
