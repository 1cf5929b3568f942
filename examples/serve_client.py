"""Serves one client's experts alone: python examples/serve_client.py EXPORT [MODEL]. An example a line in, as JSON; its class and odds out.

An example of a text is its tokens, and its class the next one.
EXPORT is what `fedmoe export DIR --out EXPORT --client C` writes. The other experts are neither there nor needed.
MODEL is the one package.module:name that may be imported, where the run's model is no built-in one.
"""

import json
import sys
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp

from fedmoe_jax.training.export import load


def answers(folder: str, lines: Iterable[str], trusted: str | None = None) -> Iterator[str]:
    """For each line of JSON, the class and its probability by the model in `folder`, as JSON."""
    served = load(folder, trusted=trusted)
    shape = served.config["model"]["input_shape"]
    dtype = jnp.int32 if served.config["model"]["name"] == "transformer" else jnp.float32
    for line in lines:
        try:
            x = jnp.asarray(json.loads(line), dtype).reshape(1, *shape)
            if not jnp.isfinite(x).all():
                raise ValueError("it is not finite")
        except (ValueError, TypeError, OverflowError) as error:
            yield json.dumps({"error": f"no example of shape {shape}: {' '.join(str(error).split())[:100]}"})
            continue
        logits = served.logits(x)
        odds = jax.nn.softmax(logits.reshape(-1, logits.shape[-1])[-1])
        yield json.dumps({"class": int(odds.argmax()), "probability": round(float(odds.max()), 4)})


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: serve_client.py EXPORT [MODEL] < LINES")
    try:
        for answer in answers(sys.argv[1], sys.stdin, *sys.argv[2:]):
            print(answer, flush=True)
    except ValueError as error:
        sys.exit(f"serve_client.py: {error}")
