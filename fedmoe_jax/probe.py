"""A stand-in for a weight, which tells how a model uses it."""

from typing import Any

import jax
from flax.nnx import tracers
from jaxtyping import Array


class Probe:
    """A weight that notes how it is used: which products it is a factor of, and whether anything else happens to it."""

    def __init__(self, value: Array):
        self.value = value
        self.products: list[tuple[Any, bool]] = []
        self.inputs: Any = None
        self.trace = tracers.current_jax_trace()
        self.other = False

    def note(self, x: Array, tiled: bool) -> Array:
        """Notes a product with x."""
        if self.trace != tracers.current_jax_trace():
            self.other = True  # in a loop or under a transformation, one note may be many products
        else:
            self.inputs = x
        self.products.append((jax.ShapeDtypeStruct(x.shape, x.dtype), tiled))
        return self.value

    def __getattr__(self, name: str) -> Any:
        if name not in ("shape", "ndim", "dtype", "size"):
            self.other = True
        return getattr(self.value, name)

    def __getitem__(self, index: Any) -> Any:
        self.other = True
        return self.value[index]

    def __iter__(self) -> Any:
        self.other = True
        return iter(self.value)

    def __jax_array__(self) -> Array:
        self.other = True
        return self.value
