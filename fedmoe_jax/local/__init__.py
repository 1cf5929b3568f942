"""A client's training."""

from fedmoe_jax.local import cost, plan, primal

__all__ = ["cost", "plan", "primal"]
