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
    *("fedprox", "fedprox_shared", "fedprox_router", "balanced_softmax", "agreement", "few_holders", "distilled", "soft"),
)
"""What may help the global model, on cells whose clients differ, with the baseline."""
TOGETHER = "statistics+shared_expert+server_adam"
PROBED = ("statistics+server_adam+three_probes", f"{TOGETHER}+three_probes")
"""The same where the baseline stays as it is, since it probes nothing."""
ALONE = (
    *("no_prior", "fitness_loss", "fitness_accuracy", "fitness_usage", "beta_0.1", "beta_0.3", "beta_1", "no_probes", "three_probes"),
    *("tolerance_0", "tolerance_0.5", "demand_1", "no_balance_loss"),
)
"""What changes the alignment, so that the baseline stays as it is."""
BOTH = ("one_slot", "four_slots", "four_experts", "16_experts", "top_2", "5_steps", "20_steps", "server_momentum", "personal_router")
"""What changes the baseline as well."""
SKEWED = ("fashion_dirichlet_0.1", "fashion_classes")
SHIFTED = ("fashion_features", "fashion_both")
DIFFERENT = (*SKEWED, *SHIFTED)
ON_SKEW = f"{TOGETHER}+balanced_softmax"
LONGER = "200_rounds"
FASTER = ("three_probes", "three_probes+beta_0.8", "three_probes+beta_1")
"""What may save rounds."""
WIDE = {"cifar_iid+long+700_rounds": 83.0, "cifar_dirichlet_0.8+long": 68.8, "cifar_classes+long": 65.5}
"""Long runs of a wide network, which the plan leaves out, and what FLEX-MoE (arXiv 2512.23070) reports on such splits, in percent."""
CHOSEN = ("fashion_dirichlet_0.1", "fashion_both")
OTHERS = tuple(name for name in grid.ALIGNERS if name not in grid.COMPARED)
PLAN = {
    **{f"{cell}+{factor}": ("random", "balanced") for factor in GLOBAL for cell in DIFFERENT},
    **{f"{cell}+{factor}": ("balanced",) for factor in PROBED for cell in DIFFERENT},
    **{f"{cell}+{ON_SKEW}": ("random", "balanced") for cell in SKEWED},
    **{f"{cell}+{ON_SKEW}+three_probes": ("balanced",) for cell in SKEWED},
    **{f"{cell}+{TOGETHER}+{LONGER}": ("random", "balanced") for cell in SHIFTED},
    **{f"{cell}+{TOGETHER}+three_probes+{LONGER}": ("balanced",) for cell in SHIFTED},
    "shakespeare+statistics": ("random", "balanced"),
    **{f"{cell}+{factor}": ("balanced",) for factor in FASTER for cell in (*DIFFERENT, "fashion_concepts")},
    **{f"{cell}+three_probes": ("greedy", "balanced") for cell in grid.CELLS if cell.startswith(("fashion", "shakespeare"))},
    **{f"cifar_{kind}+three_probes": ("balanced",) for kind in ("dirichlet_0.1", "classes", "features", "concepts", "both")},
    **{f"{cell}+{factor}": ("balanced",) for factor in ALONE for cell in CHOSEN if factor != "three_probes"},
    **{f"{cell}+{factor}": ("random", "balanced") for factor in BOTH for cell in CHOSEN},
    **{cell: OTHERS for cell in CHOSEN},
    **{f"{cell}+fallback": ("balanced",) for cell in ("fashion_iid", "fashion_dirichlet_0.8", "fashion_concepts", *DIFFERENT)},
}

if __name__ == "__main__":
    grid.main(__doc__, "experiments.ablations", PLAN)
