"""A run's model as safetensors and JSON: the global one, or the few experts that serve one client, and back."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, PyTree

from fedmoe_jax import models, posterior
from fedmoe_jax.base import NO_EXPERT
from fedmoe_jax.experts import ExpertParam, Partition, Slots, bind, gather, partition
from fedmoe_jax.local.routers import own_routers
from fedmoe_jax.nn.moe import mix_all
from fedmoe_jax.round import State
from fedmoe_jax.training.clients import evaluated
from fedmoe_jax.training.config import TrainConfig, UsageError
from fedmoe_jax.training.evaluate import global_weights, restored, served
from fedmoe_jax.training.metrics import read_json, write_bytes, write_json
from fedmoe_jax.training.setup import Setup, architecture

FORMAT = 1
"""Number of the form of an export; others are refused."""
_WEIGHTS, _CONFIG = "model.safetensors", "config.json"
_PRIOR = "slots.prior"


class Exported(NamedTuple):
    """An nnx model, its compiled `logits(x)` of examples [example, ...], and what config.json says of it.

    config: `held`, the number of the expert in each slot, `NO_EXPERT` in empty ones (None for the global model); `client`, whose they
    are (None); `router`; `round`, rounds of training; `model`, the arguments of `models.create`; `parameters`, how many.
    """

    model: Any
    config: dict[str, Any]
    logits: Callable[[Array], Array]


def export_run(folder: Path, config: TrainConfig, out: Path, client: int | None = None) -> dict[str, Any]:
    """Writes the model of a run's newest checkpoint into `out`: model.safetensors and, last, config.json.

    Args:
      folder: the run.
      config: its configuration.
      out: a folder that is absent or empty.
      client: the client whose experts, as evaluation serves it with them, make a model of their own, with its own router rows and
        prior where the run has such; None for the global model with all experts and its router.

    Returns:
      The content of config.json.

    Raises:
      UsageError: if `out` is not empty, or there is no such client.
      ValueError: if there is no checkpoint, or safetensors is not installed.
    """
    library = _safetensors()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out} is not empty: choose a new folder")
    done, setup, state = restored(folder, config)
    tensors, about = _global(setup, state) if client is None else _personal(setup, state, client)
    model = architecture(config, setup.population.x.shape[1:], setup.num_classes)
    model["dtype"] = model["dtype"] and jnp.dtype(model["dtype"]).name
    about = {
        "format": FORMAT,
        "round": done,
        "client": client,
        "router": config.router,
        "model": model,
        "parameters": sum(value.size for name, value in tensors.items() if name != _PRIOR),
        **about,
    }
    write_bytes(out / _WEIGHTS, lambda file: file.write(library.save({name: np.asarray(value) for name, value in tensors.items()})))
    write_json(out / _CONFIG, about)
    return about


def _global(setup: Setup, state: State) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    experts, shared = global_weights(setup, state)
    tensors = named(experts) | named(shared)
    if setup.config.router == "statistics" and state.statistics is not None:
        for place, router in enumerate(posterior.posteriors(state.statistics)):
            tensors |= {f"posterior.{place}.{name}": value for name, value in vars(router).items()}
    return tensors, {"held": None}


def _personal(setup: Setup, state: State, client: int) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """What `evaluate.client_evaluation` uses for this client; where it measures a sample, the client takes the place of its last."""
    if not 0 <= client < setup.population.num_clients:
        raise UsageError(f"client: must be from 0 to {setup.population.num_clients - 1}, got {client}")
    if setup.config.router == "personal" and state.personal is None:
        raise UsageError("client: the router rows of a real client are with it alone")
    everyone = evaluated(setup.population.num_clients)
    if client not in np.asarray(everyone):
        everyone = everyone.at[-1].set(client)
    row = int(np.flatnonzero(np.asarray(everyone) == client)[0])
    alignment = jax.jit(served, static_argnums=0)(setup.aligner, state, setup.admit(everyone, state.pace[everyone], setup.cost()))
    held, prior = alignment.held[row], setup.config.router_prior * alignment.centred[row]
    experts = gather(state.experts, held)
    if state.personal is not None:
        experts = own_routers(experts, state.personal, jnp.int32(client), held)
    return named(experts) | named(state.shared) | {_PRIOR: prior}, {"held": held.tolist()}


def load(folder: str | Path, *, trusted: str | None = None) -> Exported:
    """The model of an export, with room for no more experts than it has.

    Args:
      trusted: the one model "package.module:name" that may be imported; by default only built-in ones are made.

    Raises:
      ValueError: in one line with the folder, if it holds no export, of another form, or another model, or the two files do not belong
        together.
    """
    folder, library = Path(folder), _safetensors()
    try:
        about = read_json(folder / _CONFIG)
        tensors = library.load((folder / _WEIGHTS).read_bytes())
        known = about["format"] == FORMAT
        model, held = dict(about["model"]), about["held"]
        name = str(model["name"])
    except (OSError, KeyError, TypeError, ValueError, library_error()) as error:
        raise ValueError(f"{folder} holds no export that can be read ({' '.join(str(error).split())})") from None
    if not known:
        raise ValueError(f"{folder} has form {about['format']} of an export, this version reads {FORMAT}")
    if ":" in name and name != trusted:
        raise ValueError(f"{folder} holds the model {name!r}, which is code that is not trusted; give its name as `trusted`")
    try:
        return _made(folder, about, tensors, model, held)
    except Exception as error:  # of models that are none, and tensors of which none can be made
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{folder} holds no model that can be made ({type(error).__name__}: {reason})") from error


def _made(folder, about, tensors, model, held) -> Exported:
    model["input_shape"], model["dtype"] = tuple(model["input_shape"]), model["dtype"] and jnp.dtype(model["dtype"])
    parts = skeleton(model)
    sizes = {len(tensors[name]) for name in named(parts.experts) if name in tensors}
    experts, shared = (_filled(folder, state, tensors, sizes) for state in (parts.experts, parts.shared))
    number = sum({variable.get_metadata().get("group"): variable.shape[0] for _, variable in nnx.to_flat_state(experts)}.values())
    mask = jnp.ones(number, bool) if held is None else jnp.asarray(held) != NO_EXPERT
    prior = jnp.asarray(tensors.get(_PRIOR, np.zeros(number, np.float32)))
    made = bind(parts, experts, shared, Slots(mask, prior))
    routers = [name for name in tensors if name.startswith("posterior.")]
    if routers:
        fields = [f.name for f in posterior.Posterior.__dataclass_fields__.values()]
        places = range(len(routers) // len(fields))
        posterior.serve(made, [posterior.Posterior(*(jnp.asarray(tensors[f"posterior.{i}.{f}"]) for f in fields)) for i in places])
    elif held is None and about["router"] == "soft":
        mix_all(made)
    graphdef, weights = nnx.split(made)
    logits = jax.jit(lambda weights, x: nnx.merge(graphdef, weights)(x))
    return Exported(made, about, functools.partial(logits, weights))


def skeleton(model: Mapping[str, Any]) -> Partition:
    """The parts of a model that `models.create` makes of these arguments, of whose weights only shapes exist."""

    def make() -> nnx.Module:
        return models.create(**model)

    parts = partition(nnx.eval_shape(make))
    return parts._replace(rest=jax.jit(lambda: partition(make()).rest)())


def named(state: PyTree) -> dict[str, Any]:
    """The arrays of a state by their path, dotted."""
    return {".".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(state)}


def _filled(folder, state, tensors, sizes):
    """The state with the arrays of an export; experts have one number of entries instead of E."""
    flat = []
    for path, variable in nnx.to_flat_state(state):
        name, shape = ".".join(map(str, path)), variable.shape
        if isinstance(variable, ExpertParam) and len(sizes) == 1:
            shape = (*sizes, *shape[1:])
        value = tensors.get(name)
        if value is None or value.shape != shape or value.dtype != variable.dtype:
            raise ValueError(f"{folder}: {name} is missing or no {variable.dtype} of shape {shape}")
        flat.append((path, variable.replace(jnp.asarray(value))))
    return nnx.from_flat_state(flat)


def _safetensors():
    try:
        import safetensors.numpy
    except ImportError:
        raise ValueError("safetensors is not installed: pip install 'fedmoe-jax[export]'") from None
    return safetensors.numpy


def library_error() -> type[Exception]:
    """What safetensors raises for bytes that are none."""
    from safetensors import SafetensorError

    return SafetensorError
