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
        x = jnp.asarray(json.loads(line), jnp.float32)
        odds = jax.nn.softmax(served.logits(x.reshape(1, *shape))[0])
        yield json.dumps({"class": int(odds.argmax()), "probability": round(float(odds.max()), 4)})


if __name__ == "__main__":
    for answer in answers(sys.argv[1], sys.stdin):
        print(answer, flush=True)
