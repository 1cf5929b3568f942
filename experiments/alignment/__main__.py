"""Compares aligners on each cell of the grid: one TOML file a cell beside this one, and CELL+FACTOR for FACTORS.

    python -m experiments.alignment [CELL ...] --seeds 5 --out experiments/results/alignment

writes OUT/CELL.json, what every seed of every aligner reached at each evaluation. Without names it runs all cells. What a file
has of other aligners stays.
"""

from experiments import grid

FACTORS = ("32_experts", "phones", "personal_router")
PLAN = {name: grid.COMPARED for cell in grid.CELLS for name in (cell, *(f"{cell}+{factor}" for factor in FACTORS))}

if __name__ == "__main__":
    grid.main(__doc__, "experiments.alignment", PLAN)
