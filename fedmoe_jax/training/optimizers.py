"""The optimizers and learning rates that a configuration names."""

import functools
from collections.abc import Callable
from typing import Any

import optax

from fedmoe_jax.training.config import TrainConfig


def optimizer(name: str, learning_rate: Any, weight_decay: float | None = None) -> optax.GradientTransformation:
    """An optax optimizer by name; "momentum" and "nesterov" are SGD with momentum 0.9, "fedadam" is Adam as servers use it [1].

    Weight decay is added to the gradients, but "adamw" and "lion" have their own, apart from the gradients.

    References:
      [1] Reddi et al., "Adaptive Federated Optimization", ICLR 2021: decay 0.99 of second moments, 0.001 added to their root.
    """
    if weight_decay is not None:
        if name in ("adamw", "lion"):
            return getattr(optax, name)(learning_rate, weight_decay=weight_decay)
        return optax.chain(optax.add_decayed_weights(weight_decay), optimizer(name, learning_rate))
    if name in ("momentum", "nesterov"):
        return optax.sgd(learning_rate, momentum=0.9, nesterov=name == "nesterov")
    if name == "fedadam":
        return optax.adam(learning_rate, b2=0.99, eps=1e-3)
    return getattr(optax, name)(learning_rate)


def server_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """The optimizer of (experts, shared), one for both or the shared part's own."""

    def made(name: str, rate: float) -> optax.GradientTransformation:
        return optimizer(name, schedule(config.server_schedule, rate, config.rounds))

    if config.shared_optimizer is None:
        if config.shared_lr is not None:
            raise ValueError(f"shared_lr: {config.shared_lr} is for shared_optimizer, which is not given")
        return made(config.server_optimizer, config.server_lr)
    shared = made(config.shared_optimizer, config.server_lr if config.shared_lr is None else config.shared_lr)
    both = {"experts": made(config.server_optimizer, config.server_lr), "shared": shared}
    return optax.multi_transform(both, ("experts", "shared"))


def schedule(name: str, learning_rate: float, rounds: int) -> Any:
    """A learning rate over rounds: constant, or down to 0 by cosine or linearly."""
    if name == "cosine":
        return optax.cosine_decay_schedule(learning_rate, rounds)
    return learning_rate if name == "constant" else optax.linear_schedule(learning_rate, 0.0, rounds)


def client_optimizer(config: TrainConfig) -> Callable[[Any], optax.GradientTransformation]:
    """The client optimizer of a round, as a function of the round."""
    return _client_optimizer(config.client_optimizer, config.client_schedule, config.client_lr, config.weight_decay, config.rounds)


@functools.lru_cache(maxsize=64)  # the same object for the same run, so that what is known of it is known again
def _client_optimizer(name, schedule_name, learning_rate, weight_decay, rounds):
    rate = schedule(schedule_name, learning_rate, rounds)
    return lambda round: optimizer(name, rate(round) if callable(rate) else rate, weight_decay)
