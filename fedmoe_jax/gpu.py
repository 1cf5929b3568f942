"""Kernels of our own on NVIDIA GPUs.

For chains of small steps, each of which would be a kernel or wait for the host, for factors of a product that would be written
down to be read once, and for products of rows that are not side by side. In a `shard_map` of one's own they need `check_vma=False`.

They are Pallas' for Triton, which JAX means to give up: where it has gone, or will not run, all is done without.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas
from jaxtyping import Array

_PORTABLE = contextvars.ContextVar("portable", default=False)


def run(kernel: Callable[..., Any], otherwise: Callable[..., Any], *args: Any, **static: Any) -> Any:
    """kernel(*args, **static) if this is compiled for a GPU that takes kernels of Triton, else otherwise(...), the same to rounding."""
    if has_kernels() and not is_portable():
        return _of_platform(kernel, otherwise, tuple(static.items()), *args)
    return otherwise(*args, **static)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))  # outside jit it would go by the default device, wherever the arguments are
def _of_platform(kernel, otherwise, static, *args):
    kernel, otherwise = (functools.partial(function, **dict(static)) for function in (kernel, otherwise))
    return jax.lax.platform_dependent(*args, cuda=kernel, default=otherwise)


def has_kernels() -> bool:
    """Whether a GPU of this machine takes kernels of Triton: one of NVIDIA's, of compute capability 8 or above, if no device is set."""
    return _capability() >= 8


def is_hopper() -> bool:
    """Whether it is of compute capability 9 and takes kernels of Triton: large tiles need its shared memory, and were tried there alone."""
    return 9 <= _capability() < 10


def _capability() -> float:
    try:
        import jax.experimental.pallas.triton
    except ImportError:
        return 0.0
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))  # "gfx90a" of AMD's, none of a CPU
    known = jax.config.values["jax_default_device"] is None and capability.split(".")[0].isdigit()
    return float(capability) if known else 0.0


def is_exact(dtype: Any) -> bool:
    """Whether products of this dtype are in full float32: kernels of large ones are slow to compile."""
    return dtype == jnp.float32 and jax.config.values["jax_default_matmul_precision"] in ("float32", "highest", "F32_F32_F32")


def call(
    kernel: Callable[..., None], out_shape: Any, *, warps: int, stages: int = 1, interpret: bool, **options: Any
) -> Callable[..., Any]:
    """`pallas_call` of a kernel for Triton; `interpret` runs it anywhere, slowly, for tests. `stages`: of loads in its loops."""
    from jax.experimental.pallas import triton

    parameters = triton.CompilerParams(num_warps=warps, num_stages=stages)
    return pallas.pallas_call(kernel, out_shape=out_shape, compiler_params=parameters, interpret=interpret, **options)


def load(ref: Any, index: Array, there: Array) -> Array:
    """Numbers of a flat array of a kernel at places of any shape, zero where not `there`."""
    from jax.experimental.pallas import triton

    index, there = jnp.broadcast_arrays(index, there)
    return triton.load(ref.at[index], mask=there, other=0.0)


def store(ref: Any, index: Array, there: Array, value: Array) -> None:
    """Writes numbers to these places, in the dtype of the array, but where not `there`."""
    from jax.experimental.pallas import triton

    index, there = jnp.broadcast_arrays(index, there)
    triton.store(ref.at[index], value.astype(ref.dtype), mask=there)


@contextlib.contextmanager
def portable() -> Iterator[None]:
    """Within it a model is traced as on any machine, without our kernels or a vendor's, whose cost cannot be read off."""
    token = _PORTABLE.set(True)
    try:
        yield
    finally:
        _PORTABLE.reset(token)


def is_portable() -> bool:
    """Whether such kernels are to be left out."""
    return _PORTABLE.get()
