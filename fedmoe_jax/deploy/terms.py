"""The terms of a run that server and clients agree on: the fields of its configuration that local training reads, and its data's shape."""

import dataclasses
from typing import Any

from fedmoe_jax import aggregation
from fedmoe_jax.deploy.messages import RefusedError
from fedmoe_jax.local import primal
from fedmoe_jax.local.cohort import Trainer
from fedmoe_jax.models import losses
from fedmoe_jax.training.config import MODELS, TrainConfig, validate
from fedmoe_jax.training.export import skeleton
from fedmoe_jax.training.fields import convert, hints
from fedmoe_jax.training.optimizers import client_optimizer
from fedmoe_jax.training.setup import architecture

_ONLY: dict[str, tuple[Any, ...]] = {
    "router": ("shared", "soft", "personal"),
    "loss": ("cross_entropy",),
    "shift": ("none",),
    **dict.fromkeys(("control_variates", "rotate"), (False,)),
    **dict.fromkeys(("compress_bits", "compress_share", "broadcast_bits", "stream"), (None,)),
    **dict.fromkeys(("noise_multiplier", "target_epsilon", "secure_bits", "sampling_rate"), (None,)),
    **{"devices": (None, 1), "expert_devices": (1,), "on_divergence": ("continue",)},
    "availability": (1.0,),
    **dict.fromkeys(("speed_bias", "speed_jitter"), (0.0,)),
}
_TOLD = (
    *("model", "model_options", "experts", "shared_experts", "top_k", "balance_weight", "assignment", "router", "dtype", "seed"),
    *("rounds", "local_epochs", "local_steps", "batch_size", "client_optimizer", "client_lr", "client_schedule", "prox", "prox_on"),
    *("augment", "reject_above"),
)


def deployable(config: TrainConfig) -> TrainConfig:
    """The configuration as real clients train with it, each with weights of its own.

    Raises:
      ValueError: naming the field that cannot be.
    """
    for name, values in _ONLY.items():
        if getattr(config, name) not in values:
            allowed = " or ".join(str(value).lower() if isinstance(value, bool) else str(value) for value in values)
            raise ValueError(f"{name}: {getattr(config, name)} cannot be had with real clients, it must be {allowed}")
    return dataclasses.replace(config, engine="primal", chunk=None)


@dataclasses.dataclass(frozen=True)
class Terms:
    """`run` names the run, `solo` are the examples of its solo evaluation; those of `config` that are not told are as by default."""

    run: str
    config: TrainConfig
    input_shape: tuple[int, ...]
    num_classes: int
    solo: int

    def told(self) -> dict[str, Any]:
        """What a client is told, as JSON can hold it."""
        fields = {name: getattr(self.config, name) for name in _TOLD}
        return {"run": self.run, "config": fields, "shape": list(self.input_shape), "classes": self.num_classes, "solo": self.solo}

    def trainer(self, slots: int, probes: int) -> Trainer:
        """Local training by these terms; of the weights of its model only shapes exist. Router rows that are personal are weights to it."""
        config, parts = self.config, skeleton(architecture(self.config, self.input_shape, self.num_classes))
        loss_fn = losses.augmented(losses.cross_entropy) if config.augment else losses.cross_entropy
        return Trainer(
            parts, loss_fn, client_optimizer(config), config.batch_size, None if config.local_steps is not None else config.local_epochs,
            config.local_steps, primal.pulls(parts, config.prox, config.prox_on), False, self.solo, 1,
            aggregation.mean(), slots, probes, "primal", False, 0, None, config.reject_above,
        )  # fmt: skip


def read(told: Any, *, trusted: str | None = None) -> Terms:
    """The terms that a server tells.

    Args:
      trusted: the one model "package.module:name" that may be imported; by default only built-in ones are made.

    Raises:
      RefusedError: if they are none, or name another model.
    """
    try:
        known, given = hints(TrainConfig), dict(told["config"])
        if set(given) != set(_TOLD):
            raise ValueError("fields are missing or unknown")
        values = {name: convert(value, known[name]) for name, value in given.items()}
        config = TrainConfig(**values, cohort=1, slots=1, probes=0)
        validate(config)
        shape, classes, solo = tuple(told["shape"]), told["classes"], told["solo"]
        if not all(type(number) is int and number > 0 for number in (*shape, classes)) or type(solo) is not int or solo < 0:
            raise ValueError("its shapes are none")
        terms = Terms(str(told["run"]), config, shape, classes, solo)
    except (KeyError, TypeError, ValueError) as error:
        raise RefusedError(f"its terms cannot be read ({' '.join(str(error).split())[:200]})") from None
    if config.model not in MODELS and config.model != trusted:
        raise RefusedError(f"its model {config.model} is code that this client does not trust; start it with --trust {config.model}")
    return terms
