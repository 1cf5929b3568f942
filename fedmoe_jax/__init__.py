"""Federated training of Mixture-of-Experts models over simulated clients, vectorised in JAX."""

from fedmoe_jax import aggregation, alignment, conditions, distil, distributed, models, nn, posterior
from fedmoe_jax.base import NO_EXPERT, Aggregator, Aligner, Alignment, Batch, ClientProfile, Cohort, Feedback
from fedmoe_jax.data.population import Population
from fedmoe_jax.experts import ExpertParam, RouterParam, Slots, partition
from fedmoe_jax.info import Info
from fedmoe_jax.round import Algorithm, State, federated_moe, rounds

__all__ = [
    "NO_EXPERT",
    "Aggregator",
    "Algorithm",
    "Aligner",
    "Alignment",
    "Batch",
    "ClientProfile",
    "Cohort",
    "ExpertParam",
    "Feedback",
    "Info",
    "Population",
    "RouterParam",
    "Slots",
    "State",
    "aggregation",
    "alignment",
    "conditions",
    "distil",
    "distributed",
    "federated_moe",
    "models",
    "nn",
    "partition",
    "posterior",
    "rounds",
]
