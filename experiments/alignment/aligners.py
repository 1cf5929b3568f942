"""Aligners of the grid that `fedmoe train` has no name for."""

import fedmoe_jax as fm
from fedmoe_jax.alignment import fitness as scores


def paper_greedy(*, num_experts, max_slots, fitness, load):
    """The plainest reading of the paper: each client's best experts by the accuracy of what was routed to them.

    Experts never tried score 0, and none is probed.
    """
    return fm.alignment.greedy(num_experts=num_experts, max_slots=max_slots, fitness=scores.accuracy_driven(prior=0.0), load=load)
