"""Small flax.nnx models built on the layers of `nn`, and their creation by name."""

import functools
import importlib
import inspect
from typing import Any

from flax import nnx
from jax.typing import DTypeLike

from fedmoe_jax.experts import ExpertParam, groups
from fedmoe_jax.models import losses as losses
from fedmoe_jax.models.mlp import MLP as MLP
from fedmoe_jax.models.resnet import ResNet as ResNet
from fedmoe_jax.models.transformer import Transformer as Transformer
from fedmoe_jax.nn.moe import MoE

_MODELS: dict[str, Any] = {"mlp": MLP, "resnet": ResNet, "transformer": Transformer}


def create(
    name: str,
    *,
    input_shape: tuple[int, ...],
    num_classes: int,
    num_experts: int,
    top_k: int,
    seed: int,
    dtype: DTypeLike | None = None,
    per_layer: bool = False,
    **options: Any,
) -> nnx.Module:
    """A model by name, with weights drawn from `seed`.

    Args:
      name: "mlp", "resnet", "transformer" (`num_classes` is its vocabulary), or "package.module:name", a callable that
        takes these arguments by keyword and returns an nnx.Module.
      input_shape: shape of one example.
      num_classes: outputs.
      num_experts, top_k: experts of each MoE layer, and how many a token uses.
      seed: of the initial weights.
      dtype: what the model computes in; parameters are float32.
      per_layer: gives the experts of each layer an assignment of their own; a model with one such layer, as mlp and resnet,
        stays as it is, and a callable must have made `group`s of its ExpertParams itself.
      options: further arguments of the model.

    Raises:
      ValueError: naming `model`, if there is no such model or it does not take `options`; or naming an argument.
    """
    common: dict[str, Any] = dict(num_experts=num_experts, top_k=top_k, dtype=dtype)
    if ":" in name:
        model = _foreign(name, dict(common, input_shape=input_shape, num_classes=num_classes, seed=seed) | options)
        if per_layer and groups(nnx.state(model, ExpertParam)) == (None,):
            reason = "set `group` of its ExpertParams, or of its nn.MoE layers, in the model itself"
            raise ValueError(f"model {name!r} has no groups of experts for an assignment per layer: {reason}")
        return model
    if name not in _MODELS:
        raise ValueError(f"model is {name!r}, must be one of {', '.join(_MODELS)}, or package.module:name")
    make = _MODELS[name]
    if taken := sorted(set(options) & {"self", "rngs", "vocabulary"}):
        raise ValueError(f"model {name!r} has no option {', '.join(taken)}: it follows from the other arguments")
    known = {parameter for cls in (make, MoE) for parameter in inspect.signature(cls.__init__).parameters}
    if unknown := sorted(set(options) - known):
        raise ValueError(f"model {name!r} has no option {', '.join(unknown)}")
    shape: dict[str, Any] = dict(input_shape=input_shape, num_classes=num_classes)
    if name == "transformer":
        shape = dict(vocabulary=num_classes, per_layer=per_layer)
    try:
        return make(**shape, **common, **options, rngs=nnx.Rngs(seed))
    except (TypeError, ZeroDivisionError) as error:
        raise ValueError(f"model_options: {options} make no {name} ({error})") from error


def _foreign(name, arguments):
    """What the callable "package.module:name" makes of the arguments."""
    module, _, attribute = name.partition(":")
    try:
        make = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"model is {name!r}, which cannot be imported: {error}") from None
    try:
        # nnx hides the constructor's signature from that of the class
        inspect.signature(functools.partial(make.__init__, None) if inspect.isclass(make) else make).bind(**arguments)
    except TypeError as error:
        raise ValueError(f"model {name!r} must be a callable that takes {', '.join(arguments)} by keyword: {error}") from None
    model = make(**arguments)
    if not isinstance(model, nnx.Module):
        raise ValueError(f"model {name!r} returned {type(model).__name__}, must return a flax.nnx.Module")
    return model
