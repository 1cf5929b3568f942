"""From client updates to one server update."""

from fedmoe_jax.aggregation.mean import mean

__all__ = ["mean"]
