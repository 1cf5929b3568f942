"""From client updates to one server update, and what becomes of both on the way."""

from fedmoe_jax.aggregation.chain import Transform, chain
from fedmoe_jax.aggregation.clip import adaptive_clip, clip
from fedmoe_jax.aggregation.compression import quantize, sparsify
from fedmoe_jax.aggregation.mean import mean
from fedmoe_jax.aggregation.privacy import fixed_mean, gaussian_noise
from fedmoe_jax.aggregation.robust import geometric_median, krum, median, trimmed_mean
from fedmoe_jax.aggregation.secure import FixedPoint

__all__ = [
    "FixedPoint",
    "Transform",
    "adaptive_clip",
    "chain",
    "clip",
    "fixed_mean",
    "gaussian_noise",
    "geometric_median",
    "krum",
    "mean",
    "median",
    "quantize",
    "sparsify",
    "trimmed_mean",
]
