"""The weights of the global model as a file of named arrays."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from fedmoe_jax.data.npz import read_npz
from fedmoe_jax.experts import partition
from fedmoe_jax.training.metrics import write_bytes


def save_weights(path: Path, *weights: Any) -> None:
    """Writes the global model's weights, of experts and shared, as an .npz of named arrays, atomically."""
    named = {"/".join(map(str, key)): np.asarray(value) for key, value in _named(*weights).items()}
    write_bytes(path, lambda file: np.savez(file, allow_pickle=False, **named))


def load_weights(model: nnx.Module, source: str) -> None:
    """Puts the weights of a run folder or .npz file into `model`.

    Raises:
      ValueError: naming init_from, if they cannot be read or do not fit the model.
    """
    path = Path(source) / "weights.npz" if Path(source).is_dir() else Path(source)
    try:
        found = read_npz(path)
    except ValueError as error:
        raise ValueError(f"init_from: {source} holds no readable weights ({error})") from None
    parts = partition(model)
    for key, variable in (*nnx.to_flat_state(parts.experts), *nnx.to_flat_state(parts.shared)):
        name = "/".join(map(str, key))
        value = found.get(name)
        if value is None or value.shape != variable.shape or not (value.dtype.kind == "f" or value.dtype == jnp.bfloat16):
            raise ValueError(f"init_from: {source} does not fit the model: {name} is missing or not floats of shape {variable.shape}")
        if not np.isfinite(value.astype(np.float32)).all():
            raise ValueError(f"init_from: {source}: {name} is not finite")
        variable.set_value(jnp.asarray(found[name], variable.dtype))
    nnx.update(model, parts.experts, parts.shared)


def _named(*states: Any) -> dict[Any, Any]:
    return {key: variable.get_value() for state in states for key, variable in nnx.to_flat_state(state)}
