"""What compression and alignment save on the links of real phones: CELL+links, plain and with compressed updates and broadcasts.

    python -m experiments.communication [CELL+FACTOR ...] --seeds 5 --out experiments/results/communication

writes as experiments.alignment does.
"""

from experiments import grid

CELLS = ("fashion_dirichlet_0.1", "fashion_both")
COMPRESSED = ("int8", "int4", "top_k")
PLAN = {
    **{f"{cell}+links": ("random", "balanced", "full") for cell in CELLS},
    **{f"{cell}+links+{factor}": ("balanced", "full") for factor in COMPRESSED for cell in CELLS},
}

if __name__ == "__main__":
    grid.main(__doc__, "experiments.communication", PLAN)
