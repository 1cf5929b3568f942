"""Serves one client's experts alone: python examples/serve_client.py EXPORT. An example a line in, as JSON; its class and odds out.

EXPORT is what `fedmoe export DIR --out EXPORT --client C` writes. The other experts are neither there nor needed.
"""

import json
import sys
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp

from fedmoe_jax.training.export import load


def answers(folder: str, lines: Iterable[str]) -> Iterator[str]:
    """For each line of JSON, the class and its probability by the model in `folder`, as JSON."""
    served = load(folder)
    shape = served.config["model"]["input_shape"]
    for line in lines:
        try:
            x = jnp.asarray(json.loads(line), jnp.float32).reshape(1, *shape)
        except (ValueError, TypeError) as error:
            yield json.dumps({"error": f"no example of shape {shape}: {' '.join(str(error).split())[:100]}"})
            continue
        odds = jax.nn.softmax(served.logits(x)[0])
        yield json.dumps({"class": int(odds.argmax()), "probability": round(float(odds.max()), 4)})


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: serve_client.py EXPORT < LINES")
    try:
        for answer in answers(sys.argv[1], sys.stdin):
            print(answer, flush=True)
    except ValueError as error:
        sys.exit(f"serve_client.py: {error}")
