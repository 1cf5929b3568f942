"""From client updates to one server update, and what becomes of both on the way."""

from fedmoe_jax.aggregation.chain import Transform, chain
from fedmoe_jax.aggregation.compression import quantize, sparsify
from fedmoe_jax.aggregation.mean import mean

__all__ = ["Transform", "chain", "mean", "quantize", "sparsify"]
