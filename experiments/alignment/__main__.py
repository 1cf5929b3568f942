"""Compares aligners on each cell of the grid: one TOML file a cell beside this one, and CELL+FACTOR for FACTORS.

    python -m experiments.alignment [CELL ...] --seeds 5 --out experiments/results/alignment

writes OUT/CELL.json, what every seed of every aligner reached at each evaluation. Without names it runs all cells. What a file
has of other aligners stays.
"""

from experiments import grid

FACTORS = ("32_experts", "phones", "personal_router")
OF_CIFAR = ("phones_1_s", "personal_router")


def factors(cell):
    """Those planned for a cell. Phones need longer for a residual network."""
    return OF_CIFAR if cell.startswith("cifar") else FACTORS


PLAN = {name: grid.COMPARED for cell in grid.CELLS for name in (cell, *(f"{cell}+{factor}" for factor in factors(cell)))}

if __name__ == "__main__":
    grid.main(__doc__, "experiments.alignment", PLAN)
