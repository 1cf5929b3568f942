"""What happens to clients in a round of the simulation: who can be reached, and how much slower than its profile each is."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from fedmoe_jax.base import client_keys, stage_key


class Conditions(NamedTuple):
    """draw(key, round, client) -> (available Bool[client], slowdown Float[client]).

    `key` is the same in all rounds of a run. A client takes `slowdown` times as long as its profile says.
    """

    draw: Callable[[Key[Array, ""], Int[Array, ""], Int[Array, " client"]], tuple[Bool[Array, " client"], Float[Array, " client"]]]


def steady() -> Conditions:
    """Everyone can be reached and is as fast as its profile says."""

    def draw(key, round, client):
        return jnp.ones(client.shape, bool), jnp.ones(client.shape)

    return Conditions(draw)


def varying(*, availability: float = 1.0, speed_bias: float = 0.0, speed_jitter: float = 0.0) -> Conditions:
    """Clients are away at random, and slower or faster than their profiles, by log-normal factors.

    slowdown = exp(speed_bias a_c + speed_jitter b_cr), with standard normal a of the client and b of client and round.

    Args:
      availability: chance that a sampled client can be reached, above 0, at most 1, independent in each round.
      speed_bias: how far a profile may be wrong for good, 0 or more.
      speed_jitter: how far a client's speed varies from round to round, 0 or more.

    Raises:
      ValueError: if an argument is out of its range.
    """
    if not 0 < availability <= 1:
        raise ValueError(f"availability is {availability}, it must be above 0, at most 1")
    for name, value in {"speed_bias": speed_bias, "speed_jitter": speed_jitter}.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} is {value}, it must be 0 or more")

    def draw(key, round, client):
        def numbers(kind: str, function: Callable[[Key[Array, ""]], Array]) -> Array:
            return jax.vmap(function)(client_keys(stage_key(key, kind), client))

        away = numbers("availability", lambda k: jax.random.uniform(jax.random.fold_in(k, round)))
        lasting = numbers("bias", jax.random.normal)
        passing = numbers("jitter", lambda k: jax.random.normal(jax.random.fold_in(k, round)))
        return away < availability, jnp.exp(speed_bias * lasting + speed_jitter * passing)

    return Conditions(draw)
