"""Writes the tables of experiments/ and their figure again from the raw results beside them: python -m experiments.tables

Each stands between two marks, `<!-- NAME -->` and `<!-- end of NAME -->`, of the README of the experiments or of a folder of results.
"""

from pathlib import Path

from experiments import ablation_tables, communication_tables, figures, grid_tables, outcome

HERE = Path(__file__).parent
CURVES = outcome.RESULTS / "alignment" / "curves.png"
BYTES = outcome.RESULTS / "communication" / "bytes.png"


def rendered(cells, changed, compressed, again):
    """What belongs in each file, by mark.

    Args:
      cells: results of experiments.alignment, by cell.
      changed: those of experiments.ablations.
      compressed: those of experiments.communication.
    """
    return {
        HERE / "README.md": {
            "cells": grid_tables.summary(cells),
            "greedy": grid_tables.against_greedy({name: result for name, result in cells.items() if not outcome.factors(result)}),
            "repeats": grid_tables.repeats(cells, again),
            "factors": grid_tables.factors(cells),
            "global model": ablation_tables.best_models(cells, changed),
            "faster": ablation_tables.faster(cells, changed),
            "longer": ablation_tables.longer(cells, changed),
            "wide": ablation_tables.wide(changed),
            "fallback": ablation_tables.fallback(cells, changed),
            "communication": communication_tables.savings(compressed),
        },
        outcome.RESULTS / "alignment" / "README.md": {"details": grid_tables.details(cells)},
        outcome.RESULTS / "ablations" / "README.md": {
            "costs": ablation_tables.costs(changed),
            "global model": ablation_tables.global_models(cells, changed),
            "one thing": ablation_tables.one_thing(cells, changed),
        },
    }


def put(text, parts):
    """`text` with what stands between the marks replaced.

    Raises:
      ValueError: naming a mark that is not there.
    """
    for name, part in parts.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"there is no {(end if found else begin).strip()}")
        text = f"{before}{begin}{part}{end}{after}"
    return text


def main():
    cells, changed, compressed, again = (outcome.read(name) for name in ("alignment", "ablations", "communication", "repeats"))
    for path, parts in rendered(cells, changed, compressed, again).items():
        path.write_text(put(path.read_text(), parts))
    base = [result for result in cells.values() if not outcome.factors(result)]
    if communication_tables.variants_of(compressed):
        communication_tables.curves(compressed, BYTES)
    figures.curves([(outcome.title(result["config"]), result["runs"], outcome.goals(result["runs"])) for result in base], CURVES)


if __name__ == "__main__":
    main()
