"""The leaves of a state as checkpoints store them: a flat table from path to array, keys of random numbers as their data."""

import jax
import jax.numpy as jnp
import numpy as np


def flatten(tree):
    """Path -> leaf, in the order of the leaves. Numbers become arrays."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): value if hasattr(value, "dtype") else np.asarray(value) for path, value in leaves}


def _is_key(value):
    return jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def describe(value):
    """Type and shape, as "float32[3,4]"."""
    return f"{value.dtype}[{','.join(map(str, value.shape))}]"


def data(value):
    """The array that is stored."""
    if _is_key(value):
        return jax.random.key_data(value)
    return value if isinstance(value, jax.Array) else np.asarray(value)


def on_host(value):
    """A copy: what is on the host already may share the buffer of an array that is donated next."""
    return np.array(value)


def abstract(value):
    """The shape, type and placement to restore a leaf of the template into; a key's data stand for the key."""
    if _is_key(value):
        value = jax.random.key_data(value) if isinstance(value, jax.Array) else jax.eval_shape(jax.random.key_data, value)
    if isinstance(value, np.ndarray | np.generic):
        return jax.ShapeDtypeStruct(value.shape, value.dtype)
    sharding = getattr(value, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)


def undata(array, value):
    """What was read (None for an array without elements), as the kind of leaf that the template has there."""
    if isinstance(value, bool | int | float | complex) and not isinstance(value, np.generic):
        return type(value)(array.item())
    if array is None:
        shape = abstract(value)
        array = np.zeros(shape.shape, shape.dtype)
        if shape.sharding is not None:
            array = jax.device_put(array, shape.sharding)
    if _is_key(value):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(jnp.empty((), value.dtype)))
    return np.asarray(array) if isinstance(value, np.ndarray | np.generic) else jnp.asarray(array)
