"""Changes one thing at a time of cells of the grid, or what makes the global model good: CELL+FACTOR for the factors below.

    python -m experiments.ablations [CELL+FACTOR ...] --seeds 5 --out experiments/results/ablations

writes as experiments.alignment does.
"""

from experiments import grid

GLOBAL = (
    "statistics",
    "shared_expert",
    "server_adam",
    "statistics+shared_expert",
    "statistics+server_adam",
    "statistics+shared_expert+server_adam",
    *("fedprox", "fedprox_shared", "fedprox_router", "balanced_softmax", "agreement", "soft"),
)
"""What may help the global model, on cells whose clients differ, with the baseline."""
ALONE = (
    *("no_prior", "fitness_loss", "fitness_accuracy", "fitness_usage", "beta_0.1", "beta_0.3", "beta_1", "no_probes", "three_probes"),
    *("tolerance_0", "tolerance_0.5", "demand_1", "no_balance_loss"),
)
"""What changes the alignment, so that the baseline stays as it is."""
BOTH = ("one_slot", "four_slots", "four_experts", "16_experts", "top_2", "5_steps", "20_steps", "server_momentum", "personal_router")
"""What changes the baseline as well."""
DIFFERENT = ("fashion_dirichlet_0.1", "fashion_classes", "fashion_features", "fashion_both")
CHOSEN = ("fashion_dirichlet_0.1", "fashion_both")
OTHERS = tuple(name for name in grid.ALIGNERS if name not in grid.COMPARED)
PLAN = {
    **{f"{cell}+{factor}": ("random", "balanced") for factor in GLOBAL for cell in DIFFERENT},
    **{f"{cell}+{factor}": ("balanced",) for factor in ALONE for cell in CHOSEN},
    **{f"{cell}+{factor}": ("random", "balanced") for factor in BOTH for cell in CHOSEN},
    **{cell: OTHERS for cell in CHOSEN},
    **{f"{cell}+fallback": ("balanced",) for cell in ("fashion_iid", "fashion_dirichlet_0.8", "fashion_concepts", *DIFFERENT)},
}

if __name__ == "__main__":
    grid.main(__doc__, "experiments.ablations", PLAN)
