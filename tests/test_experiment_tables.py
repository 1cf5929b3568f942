"""The tables and the figure that are made of results of the experiments."""

import sys
from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))
from experiments import ablation_tables, communication_tables, figures, grid_tables, outcome, tables  # noqa: E402

ABOUT = dict(
    config=dict(
        data="fashion_mnist.npz", split="iid", shift="features", alpha=0.3, classes_per_client=2,
        rounds=8, population=10, cohort=5, experts=4, slots=2, eval_every=2,
    ),
    device="1 x cpu", versions={"jax": "1"}, seconds=60,
)  # fmt: skip


def run_of(accuracy, fittest=None):
    """A run that is evaluated every other round, each of a megabyte and ten seconds; metrics differ by a factor.

    With its fittest experts each client is `fittest` times as accurate.
    """
    factors = dict(zip((*grid_tables.FINAL.values(), *grid_tables.LOADS.values()), (0.5, 1.0, 0.25, 0.75, 0.125, 0.1, 0.9), strict=True))
    rounds = [2 * place + 2 for place in range(len(accuracy))]
    columns = {name: [factor * value for value in accuracy] for name, factor in factors.items()}
    for name in [name for name in columns if name.startswith("client_accuracy")]:
        fair = name.replace("client_accuracy", "client_accuracy_fittest")
        columns[fair] = [fittest and fittest * value for value in columns[name]]
    return columns | {"round": rounds, "bytes": [1e6 * round for round in rounds], "simulated_seconds": [10 * round for round in rounds]}


RUNS = {
    "random": [run_of([0.1, 0.2, 0.3, 0.5], 2), run_of([0.2, 0.3, 0.4, 0.5], 1)],
    "balanced": [run_of([0.3, 0.5, 0.5, 0.5], 1), run_of([0.5, 0.6, 0.6, 0.7], 1)],
    "greedy": [run_of([0.1] * 4, 1), run_of([0.3, 0.5, 0.6, 0.9], 1)],
    "full": [run_of([0.5] * 4), run_of([0.5] * 4)],
}


def half(*values):
    """Half of the 95% interval of two values."""
    return 12.7062 * np.std(values, ddof=1) / np.sqrt(2)


def rendered(results):
    """The tables of cells and all their details."""
    cells = {result["cell"]: result for result in outcome.ordered(results)}
    return "\n".join((grid_tables.summary(cells), grid_tables.details(cells)))


def rows_of(text):
    """The rows of each table, by what stands at its head and then by what stands first."""
    found = {}
    for block in text.split("\n\n"):
        lines = [[cell.strip() for cell in line[2:-2].split(" | ")] for line in block.splitlines() if line.startswith("| ")]
        if lines:
            found[lines[0][0]] = {line[0]: dict(zip(lines[0][1:], line[1:], strict=True)) for line in lines[2:]}
    return found


def test_what_is_reached_is_that_of_the_last_round_and_also_with_the_fittest_experts():
    text = rendered([ABOUT | {"cell": "some", "runs": RUNS}])
    reached = rows_of(text)["reached in the last round"]
    assert list(reached) == ["random", outcome.FITTEST, "balanced", "greedy", "full"] and all(len(row) <= 8 for row in reached.values())
    assert list(reached["random"].values()) == [
        *("25.0 ± 0.0", "50.0 ± 0.0", "12.5 ± 0.0", "37.5 ± 0.0", "6.2 ± 0.0"), "0.050 ± 0.000", "0.450 ± 0.000"
    ]  # fmt: skip
    fair = reached[outcome.FITTEST]
    assert fair["clients"] == f"75.0 ± {half(100, 50):.1f}" and fair["clients, prior"] == f"56.2 ± {half(75, 37.5):.1f}"
    assert [fair[name] for name in ("global", *grid_tables.LOADS)] == [reached["random"][name] for name in ("global", *grid_tables.LOADS)]


def test_targets_are_of_random_and_runs_that_never_reach_them_count_with_all_their_rounds():
    text = rendered([ABOUT | {"cell": "some", "runs": RUNS}])
    taken = rows_of(text)["taken to the target"]
    assert "Targets 49.5%, and 37.1% with label prior" in text
    assert list(taken["random"].values()) == ["8", "8", "80"] * 2 and list(taken["balanced"].values()) == ["3", "3", "30"] * 2
    assert list(taken["greedy"].values()) == ["6, 1 of 2 never", "6", "60"] * 2 and taken["full"]["rounds"] == "2"
    assert taken[outcome.FITTEST]["rounds"] == "7"  # 0.6 in round 6 and 0.5 in round 8


def test_differences_are_paired():
    against = rows_of(rendered([ABOUT | {"cell": "some", "runs": RUNS}]))["balanced less"]
    random, greedy = against["random"], against["greedy"]
    assert list(against) == ["random", outcome.FITTEST, "greedy", "full"]
    assert [random[name] for name in ("global", "clients")] == [f"+5.0 ± {half(0, 10):.1f}", f"+10.0 ± {half(0, 20):.1f}"]
    assert random["clients, prior"] == f"+7.5 ± {half(0, 15):.1f}" and random["worst decile"] == f"+2.5 ± {half(0, 5):.1f}"
    assert [against[outcome.FITTEST][name].split()[0] for name in ("global", "clients")] == ["+5.0", "-15.0"]
    # seed by seed in 4 and 2 rounds, those of random in 8 and 8, those of greedy in 8, which do not reach it, and 4
    assert [random[name] for name in ("rounds", "MB", "rounds, prior")] == [f"-62% ± {half(50, 75):.0f}"] * 3
    assert [greedy[name] for name in ("rounds", "MB", "rounds, prior")] == ["-50% ± 0, 1 of 4 never"] * 3


def test_no_difference_of_costs_is_told_where_no_run_reaches_the_target():
    low = [run_of([0.1] * 4)] * 2
    assert outcome.share(low, low, "round", outcome.PLAIN, 0.5) == outcome.share(low, low, "bytes", outcome.PLAIN, 0.5) == "–"
    assert outcome.share(low, RUNS["full"], "round", outcome.PLAIN, 0.5) == "+300% ± 0, 2 of 4 never"


def test_the_summary_has_a_row_for_each_cell_and_factors_follow_theirs():
    some = ABOUT | {"runs": RUNS}
    cells = [some | {"cell": name} for name in ("some+phones", "some")]
    last = some | {"cell": "text", "config": ABOUT["config"] | {"data": "shakespeare.npz", "split": "natural", "shift": "none"}}
    text = rendered([last, *cells])
    summary = rows_of(text)["cell"]
    assert list(summary) == ["Fashion-MNIST, feature shift", "Shakespeare, natural clients"] and len(summary.popitem()[1]) == 10
    row = summary["Fashion-MNIST, feature shift"]
    assert row["random"] == "37.5 ± 0.0" and row[outcome.FITTEST] == f"56.2 ± {half(75, 37.5):.1f}"
    assert row["load_only"] == "–" and row["rounds, balanced / random"] == "3 / 8"
    assert row["balanced less random"].startswith("+7.5 ±") and row["the same, global"].startswith("+5.0 ±")
    assert row["CV, balanced / greedy"] == "0.060 / 0.050" and "took 2 minutes in all" in text
    assert text.index("(`some`)") < text.index("### With `phones` (`some+phones`)") < text.index("(`text`)")
    assert text.count("taken to the target") == 2 and text.count("| balanced less |") == 3


@pytest.mark.parametrize("runs", [{"balanced": RUNS["balanced"]}, RUNS | {"greedy": RUNS["greedy"][:1]}])
def test_cells_that_cannot_be_compared_are_named(runs):
    with pytest.raises(ValueError, match="some: random is needed"):
        rendered([ABOUT | {"cell": "some", "runs": runs}])


def test_the_figure_has_a_panel_for_each_cell_and_another_where_the_prior_matters(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(figures, "_panel", lambda axes, styles, name, runs, metric, goal: drawn.append((name, metric, *styles)))
    some = {name: seeds for name, seeds in RUNS.items() if name != "balanced"}  # the others look as they do beside it
    panels = [("a", RUNS, {outcome.PLAIN: 0.5, outcome.PRIOR: 0.505}), ("b", some, {outcome.PLAIN: 0.5, outcome.PRIOR: 0.6})]
    figures.curves(panels, tmp_path / "curves.png")
    assert drawn == [
        (name, metric, *RUNS) for name, metric in (("a", outcome.PLAIN), ("b", outcome.PLAIN), ("b, with label prior", outcome.PRIOR))
    ]
    monkeypatch.undo()
    figures.curves(panels[:1], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_cell_without_ours_has_dashes_in_its_place():
    text = rendered([ABOUT | {"cell": "some", "runs": {name: seeds for name, seeds in RUNS.items() if name != "balanced"}}])
    rows = rows_of(text)
    (row,) = rows["cell"].values()
    assert [row[name] for name in ("balanced", "balanced less random", "the same, global")] == ["–"] * 3
    assert row["rounds, balanced / random"].startswith("– / ") and "balanced less" not in rows


def test_each_cell_stands_before_its_factors_in_the_table_of_factors():
    some = ABOUT | {"runs": RUNS}
    text = grid_tables.factors({name: some | {"cell": name} for name in ("some+phones", "some", "other")})
    (rows,) = rows_of(text).values()
    assert list(rows) == ["**Fashion-MNIST, feature shift**", "`phones`"] and "took 1 minutes in all" in text
    row = rows["`phones`"]
    assert row["random"] == "50.0 / 37.5" and row[outcome.FITTEST] == "75.0 / 56.2"
    assert row["load_only"] == row["balanced less paper-style greedy, prior"] == "–"
    assert [row[name].split()[0] for name in ("balanced less random", "the same, prior", "the same, global")] == ["+10.0", "+7.5", "+5.0"]


def test_what_weighing_the_load_costs_and_evens_out_beside_greedy():
    cells = {"some": ABOUT | {"cell": "some", "runs": RUNS}, "other": ABOUT | {"cell": "other", "runs": {"random": RUNS["random"]}}}
    (rows,) = rows_of(grid_tables.against_greedy(cells)).values()
    (row,) = rows.values()
    assert row["clients"] == f"+10.0 ± {half(40, -20):.1f}" and row["worst decile, prior"] == f"+1.2 ± {half(5, -2.5):.1f}"
    assert row["CV, greedy / balanced"] == "0.8" and row["least trained, balanced"] == f"0.540 ± {half(0.45, 0.63):.3f}"


def test_what_was_run_again_stands_beside_the_first_time():
    cells = {"some+phones": ABOUT | {"cell": "some+phones", "runs": RUNS}}
    again = {"some+phones": cells["some+phones"] | {"runs": {"balanced": RUNS["greedy"]}}}
    (line,) = grid_tables.repeats(cells, again).splitlines()[2:]
    row = line.strip("| ").split(" | ")
    assert row[:2] == ["Fashion-MNIST, feature shift, `phones`", "balanced"]
    assert row[2:4] == [f"60.0 ± {half(50, 70):.1f}", f"50.0 ± {half(10, 90):.1f}"]


CELL = "fashion_both"
BETTER = {
    "random": [run_of([0.8] * 4), run_of([0.6] * 4)],
    "balanced": [run_of([0.52] * 4), run_of([0.6] * 4)],
}


def changed(*factors, runs=BETTER, cell=CELL):
    """A cell without change, and results of some changes of it."""
    names = ("+".join((cell, factor)) if factor else cell for factor in factors)
    return {cell: ABOUT | {"cell": cell, "runs": RUNS}}, {name: ABOUT | {"cell": name, "runs": runs} for name in names}


def test_the_best_of_each_column_is_marked_and_the_best_variants_are_compared():
    both = changed("statistics", "statistics+shared_expert", "one_slot")
    both[1][f"{CELL}+statistics+shared_expert"]["runs"] = RUNS | {"balanced": BETTER["balanced"]}
    ((head, rows),) = rows_of(ablation_tables.global_models(*both)).items()
    assert head == "Fashion-MNIST, feature shift"
    assert list(rows) == ["unchanged", "`statistics`", "`statistics` + `shared_expert`", "best of balanced less best of random"]
    random, ours = ([row[f"{name}, global"] for row in rows.values()] for name in ("random", "balanced"))
    assert random == ["25.0 ± 0.0", f"**35.0 ± {half(40, 30):.1f}**", "25.0 ± 0.0", ""]
    assert ours == [f"**30.0 ± {half(25, 35):.1f}**", *[f"28.0 ± {half(26, 30):.1f}"] * 2, ""]
    best = rows["best of balanced less best of random"]
    assert best["balanced less random, global"] == f"-5.0 ± {half(-15, 5):.1f}"
    assert best["the same, clients, prior"] == f"-7.5 ± {half(-22.5, 7.5):.1f}"
    row = rows["`statistics`"]
    assert row["balanced less random, global"] == f"-7.0 ± {half(-14, 0):.1f}" and row["MB a round, balanced"] == "1.0"
    assert row["random less unchanged, global"] == f"+10.0 ± {half(15, 5):.1f}"
    assert row["balanced less unchanged, global"] == f"-2.0 ± {half(1, -5):.1f}"


def test_the_table_of_best_variants_has_a_row_for_each_cell():
    text = ablation_tables.best_models(*changed("statistics"))
    line = text.splitlines()[-1].strip("| ").split(" | ")
    assert line == [
        *("feature shift", "25.0 ± 0.0", f"30.0 ± {half(25, 35):.1f}", f"+5.0 ± {half(0, 10):.1f}"),
        *(f"35.0 ± {half(40, 30):.1f}", f"28.0 ± {half(26, 30):.1f}", f"-7.0 ± {half(-14, 0):.1f}"),
        *(f"35.0 ± {half(40, 30):.1f} (`statistics`)", f"30.0 ± {half(25, 35):.1f} (unchanged)", f"-5.0 ± {half(-15, 5):.1f}"),
    ]
    line = ablation_tables.best_models(*changed("fedprox")).splitlines()[-1].split(" | ")
    assert line[4:7] == ["–"] * 3 and "(`fedprox`)" in line[7]


def test_one_thing_at_a_time_is_compared_with_the_unchanged_cell():
    cells, found = changed("beta_1", "one_slot", "")
    found[CELL]["runs"] = {"balanced, UCB": BETTER["random"]}
    found[f"{CELL}+beta_1"]["runs"] = {"balanced": BETTER["balanced"]}
    alone, both = rows_of(ablation_tables.one_thing(cells, found)).values()
    assert list(alone) == ["unchanged", "`beta_1`", "balanced, UCB"] and list(both) == ["unchanged", "`one_slot`"]
    row = alone["`beta_1`"]
    assert row["clients"] == f"56.0 ± {half(52, 60):.1f}" and row["less unchanged"] == f"-4.0 ± {half(2, -10):.1f}"
    assert row["less unchanged, prior"] == f"-3.0 ± {half(1.5, -7.5):.1f}" and row["CV of tokens"] == f"0.056 ± {half(0.052, 0.06):.3f}"
    # the target is that of the unchanged random, which is reached at once; random of one slot would set one that is not reached
    assert [row[name] for name in ("rounds", "MB", "rounds, prior")] == ["2", "2", "2"] == [both["`one_slot`"][name] for name in
        ("rounds", "MB", "rounds, prior")]  # fmt: skip
    assert alone["unchanged"]["less unchanged"] == "" and alone["unchanged"]["rounds"] == "3"
    assert alone["balanced, UCB"]["less unchanged"] == f"+10.0 ± {half(30, -10):.1f}" and "random, clients, prior" not in row
    row = both["`one_slot`"]
    assert row["random, clients, prior"] == f"52.5 ± {half(60, 45):.1f}"
    assert row["balanced less random, prior"] == f"-10.5 ± {half(-21, 0):.1f}"


def test_with_more_probes_the_baseline_is_that_without():
    cells, found = changed("statistics+server_adam", "statistics+server_adam+three_probes")
    found[f"{CELL}+statistics+server_adam+three_probes"]["runs"] = {"balanced": RUNS["balanced"]}
    (rows,) = rows_of(ablation_tables.global_models(cells, found)).values()
    less, more = (rows[f"`statistics` + `server_adam`{probes}"] for probes in ("", " + `three_probes`"))
    assert more["random, global"] == less["random, global"].strip("*")
    assert more["balanced, global"] == rows["unchanged"]["balanced, global"].strip("*") != less["balanced, global"]


def test_rounds_with_more_probes_are_compared_with_those_of_rivals_to_the_same_target():
    cells, found = changed("three_probes", runs={"balanced": BETTER["balanced"]})
    cells[CELL] |= {"runs": RUNS | {"load_only": RUNS["random"], "paper-style greedy": RUNS["full"]}}
    (rows,) = rows_of(ablation_tables.faster(cells, found)).values()
    assert list(rows) == ["**Fashion-MNIST, feature shift**, random", "unchanged", "`three_probes`"]
    assert [rows[name]["rounds"] for name in rows] == ["8", "3", "2"]
    row = rows["`three_probes`"]
    assert row["rounds less random"] == row["MB less random"] == row["rounds less load_only"] == row["MB less load_only"] == "-75% ± 0"
    assert row["MB less paper-style greedy"] == "+0% ± 0"
    assert row["rounds less paper-style greedy"] == "+0% ± 0" and row["clients"] == f"56.0 ± {half(52, 60):.1f}"
    assert row["least trained"] == f"0.504 ± {half(0.468, 0.54):.3f}"


def test_twice_the_rounds_are_compared_with_as_many():
    name = "statistics+shared_expert+server_adam"
    cells, found = changed(f"{name}+200_rounds", f"{name}+three_probes+200_rounds")
    found[f"{CELL}+{name}+three_probes+200_rounds"]["runs"] = {"balanced": RUNS["balanced"]}
    rows = list(rows_of(ablation_tables.longer(cells, found))["cell"].values())
    assert [row["balanced"] for row in rows] == [f"28.0 ± {half(26, 30):.1f}", f"30.0 ± {half(25, 35):.1f}"]
    assert {row["random"] for row in rows} == {f"35.0 ± {half(40, 30):.1f}"}


def test_the_fallback_is_compared_with_both():
    cells, found = changed("fallback", runs={"balanced": BETTER["balanced"]})
    cells |= changed(cell="fashion_iid")[0]  # not run with it
    (rows,) = rows_of(ablation_tables.fallback(cells, found)).values()
    (row,) = rows.values()
    assert [row[name] for name in ("balanced", "with fallback", "random")] == [
        *(f"60.0 ± {half(50, 70):.1f}", f"56.0 ± {half(52, 60):.1f}", "50.0 ± 0.0")
    ]  # fmt: skip
    assert row["fallback less balanced"] == f"-4.0 ± {half(2, -10):.1f}" and row["fallback less random"] == f"+6.0 ± {half(2, 10):.1f}"
    assert row["fallback less random, prior"] == f"+4.5 ± {half(1.5, 7.5):.1f}"


@pytest.mark.parametrize("runs", [{"random": BETTER["random"]}, {"balanced": BETTER["balanced"]}, {n: r[:1] for n, r in BETTER.items()}])
def test_changes_that_cannot_be_compared_are_named(runs):
    with pytest.raises(ValueError, match=r"fashion_both\+statistics: balanced and random needed"):
        ablation_tables.global_models(*changed("statistics", runs=runs))


def test_without_results_there_are_no_tables():
    for parts in tables.rendered({}, {}, {}, {}).values():
        assert all(text in (grid_tables.NONE, ablation_tables.NONE) for text in parts.values())


def compressed(*names):
    """Results of cells on links, of which compressed ones take a fourth of the bytes."""
    results = {}
    for name in names:
        less = 1 if name.endswith("links") else 4
        runs = {
            aligner: [run | {"bytes": [each / less for each in run["bytes"]]} for run in RUNS[aligner]] for aligner in ("balanced", "full")
        }
        made = {aligner: {"device": "1 x NVIDIA H200"} for aligner in runs}
        results[name] = ABOUT | {"cell": name, "runs": runs, "made": made}
    return results


def test_what_travels_is_compared_with_all_experts_and_no_compression():
    text = communication_tables.savings(compressed("fashion_both+links", "fashion_both+links+int8"))
    ((head, rows),) = rows_of(text).items()
    assert head == "Fashion-MNIST, feature shift" and "These 2" not in text and "these 2 files took 2 minutes" in text
    assert list(rows) == ["`balanced`", "`full`", "`balanced`, `int8`", "`full`, `int8`"]
    row = rows["`balanced`, `int8`"]
    assert [row[name] for name in ("MB", "`full` / this", "simulated s", "on")] == ["2", "4.0", "80", "H200"]
    assert row["less `full`, prior"] == f"+7.5 ± {half(0, 15):.1f}" and rows["`full`"]["less `full`, prior"] == ""
    assert rows["`full`"]["rounds to 37.1%, prior"] == "2" and row["MB to it"] == rows["`balanced`, `int8`"]["MB to it"] == "1"


def test_cells_without_all_experts_are_left_out_and_others_than_links_refused(tmp_path):
    some = compressed("fashion_both+links+int8")
    assert communication_tables.savings(some) == communication_tables.NONE
    with pytest.raises(ValueError, match=r"fashion_both\+int8: only cells with `links`"):
        communication_tables.savings(compressed("fashion_both+int8"))
    communication_tables.curves(some | compressed("fashion_both+links"), tmp_path / "bytes.png")
    assert (tmp_path / "bytes.png").read_bytes().startswith(b"\x89PNG")


def test_what_stands_between_marks_is_replaced_and_marks_that_are_missing_are_named():
    text = "a\n<!-- x -->\nold\n<!-- end of x -->\nb\n<!-- y z -->\n<!-- end of y z -->\n"
    new = tables.put(text, {"y z": "2\n", "x": "1\n"})
    assert new == "a\n<!-- x -->\n1\n<!-- end of x -->\nb\n<!-- y z -->\n2\n<!-- end of y z -->\n"
    assert tables.put(new, {"y z": "", "x": "old\n"}) == text
    for name, mark in (("w", "<!-- w -->"), ("x", "<!-- end of x -->")):
        with pytest.raises(ValueError, match=f"no {mark}"):
            tables.put(text.replace("<!-- end of x -->", ""), {name: ""})


def test_the_tables_are_those_of_the_results():
    for path, parts in tables.rendered(*map(outcome.read, ("alignment", "ablations", "communication", "repeats"))).items():
        text = path.read_text()
        assert text == tables.put(text, parts), f"{path} is not up to date: python -m experiments.tables"
        links = [link.partition(")")[0].partition("#")[0] for link in text.split("](")[1:]]
        assert links and all((path.parent / link).is_file() for link in links if link)
    assert "](results/alignment/curves.png)" in (REPOSITORY / "experiments" / "README.md").read_text()
