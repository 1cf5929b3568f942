"""Client-expert alignment: who trains which expert, from capacity, fitness and load."""

from fedmoe_jax.alignment import assign, capacity, fitness, load
from fedmoe_jax.alignment.aligner import Promise, balanced, full, greedy, grouped, load_only, random

__all__ = ["Promise", "assign", "balanced", "capacity", "fitness", "full", "greedy", "grouped", "load", "load_only", "random"]
