"""Training on many devices: the mesh, and where a population lies on it."""

from fedmoe_jax.distributed.mesh import mesh, split_cpu
from fedmoe_jax.distributed.population import ShardedPopulation, everywhere, from_arrays, place

__all__ = ["ShardedPopulation", "everywhere", "from_arrays", "mesh", "place", "split_cpu"]
