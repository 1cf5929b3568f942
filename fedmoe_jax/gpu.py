"""Kernels of our own on NVIDIA GPUs, for chains of small steps each of which would be a kernel, or wait for the host."""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import pallas


def run(kernel: Callable[..., Any], otherwise: Callable[..., Any], *args: Any) -> Any:
    """kernel(*args) if this is compiled for a GPU that takes kernels of Triton, else otherwise(*args), which does the same."""
    return jax.lax.platform_dependent(*args, **(dict(cuda=kernel) if has_kernels() else {}), default=otherwise)


def has_kernels() -> bool:
    """Whether a GPU of this machine takes kernels of Triton: one of NVIDIA's, of compute capability 8 or above."""
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))  # "gfx90a" of AMD's, none of a CPU
    return capability.split(".")[0].isdigit() and float(capability) >= 8


def call(kernel: Callable[..., None], out_shape: Any, *, warps: int, interpret: bool, **options: Any) -> Callable[..., Any]:
    """`pallas_call` of a kernel for Triton; `interpret` runs it anywhere, slowly, for tests."""
    from jax.experimental.pallas import triton

    parameters = triton.CompilerParams(num_warps=warps, num_stages=1)
    return pallas.pallas_call(kernel, out_shape=out_shape, compiler_params=parameters, interpret=interpret, **options)
