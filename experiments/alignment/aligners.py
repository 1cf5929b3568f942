"""Aligners of the experiments that `fedmoe train` has no name for."""

import functools

import fedmoe_jax as fm
from fedmoe_jax.alignment import fitness as scores


def paper_greedy(*, num_experts, max_slots, fitness, load):
    """The plainest reading of the paper: each client's best experts by the accuracy of what was routed to them.

    Experts never tried score 0, and none is probed.
    """
    return fm.alignment.greedy(num_experts=num_experts, max_slots=max_slots, fitness=scores.accuracy_driven(prior=0.0), load=load)


def deficit(deficit_weight, **common):
    """No bounds of load, but a bonus for experts that are behind."""
    return fm.alignment.balanced(objective="fitness+deficit", deficit_weight=deficit_weight, **common)


deficit_0_3, deficit_1, deficit_3 = (functools.partial(deficit, weight) for weight in (0.3, 1.0, 3.0))


def balanced_ucb(*, fitness, **common):
    """A bonus for pairs seldom scored."""
    return fm.alignment.balanced(fitness=scores.solo(exploration=0.1), **common)


def balanced_forgetting(*, fitness, **common):
    """Scores of pairs not tried lately go back to the optimistic prior, a tenth of the way each round."""
    return fm.alignment.balanced(fitness=scores.solo(forget=0.1), **common)
