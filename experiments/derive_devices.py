"""Derives the tables of fedmoe_jax/devices.py from the shared FLASH device data.

    python experiments/derive_devices.py ../shared/data

prints them as they stand there.
"""

import sys
from pathlib import Path

import numpy as np

SCORE = "CPU_F_AI_Score"
EVERY = 9
"""The data have 333 = 9 * 37 phones: the middle one of every nine gives 37 rows of equal weight."""


def phones(shared):
    """[row, 2]: score and GB of memory of every ninth phone in the order of the score, which are the middles of 37 equal groups."""
    with np.load(Path(shared) / "flash_devices.npz", allow_pickle=False) as file:
        score = file["ai_scores"][:, file["ai_cols"].tolist().index(SCORE)]
        memory = file["ai_ram_gb"]
    order = np.lexsort((memory, score))
    return np.stack([score, memory], axis=1)[order][EVERY // 2 :: EVERY]


def networks(shared):
    """[network, 4]: mean and standard deviation of the downlink, then of the uplink, in whole kB/s, as FLASH lists them."""
    with np.load(Path(shared) / "flash_devices.npz", allow_pickle=False) as file:
        assert file["net_cols"].tolist() == ["down_u", "down_sigma", "up_u", "up_sigma"]
        return np.round(file["net_kbps"])


def literal(name, table, width=100):
    """A table as Python source: rows side by side up to a width."""
    rows = ["(" + ", ".join(f"{number:g}" for number in row) + ")," for row in table]
    lines = [f"{name} = (", ""]
    for row in rows:
        if len(lines[-1]) + len(row) > width:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "    ") + row
    return "\n".join([*lines, ")  # fmt: skip"])


if __name__ == "__main__":
    print(literal("PHONES", phones(sys.argv[1])))
    print(literal("NETWORKS", networks(sys.argv[1])))
