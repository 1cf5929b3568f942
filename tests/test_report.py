"""Pictures, comparison and report: they hold for odd runs, and the figures equal a slow oracle."""

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from fedmoe_jax.training import metrics, plots
from fedmoe_jax.training.comparison import COMPARED, compare_table, mean_interval
from fedmoe_jax.training.config import TrainConfig, to_toml
from fedmoe_jax.training.report import write_report


def make_run(num_rounds=6, num_experts=4, seed=0, final=0.9, eval_every=2):
    """A run whose accuracy rises linearly to `final`."""
    generator = np.random.default_rng(seed)
    records = []
    for place in range(num_rounds):
        evaluated = (place + 1) % eval_every == 0 or place == num_rounds - 1
        accuracy = final * (place + 1) / num_rounds
        values = {
            "eval_loss": 1 - accuracy,
            "eval_accuracy": accuracy,
            "client_accuracy_mean": accuracy,
            "client_accuracy_p10": accuracy / 2,
        }
        records.append(
            metrics.record(
                place,
                train_loss=generator.uniform(),
                load=generator.integers(0, 5, num_experts),
                load_cv=generator.uniform(),
                load_cv_total=0.5,
                bytes_down=1000,
                bytes_up=500,
                simulated_seconds=2.0,
                wall_seconds=0.1,
                **(values if evaluated else {}),
            )
        )
    return records


def without_evaluations(records):
    return [metrics.record(line["round"], train_loss=line["train_loss"]) for line in records]


def size(path):
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(head[16:20]), int.from_bytes(head[20:24])


RUNS = {
    "usual": make_run(),
    "one round, one expert": make_run(1, 1),
    "64 experts": make_run(3, 64),
    "no evaluations": without_evaluations(make_run()),
    "nothing": [],
    "no load": [{**line, "load": [0, 0]} for line in make_run()],
}


@pytest.mark.parametrize("name", RUNS)
def test_run_pictures_are_drawn_for_odd_runs(tmp_path, name):
    plots.draw_run(RUNS[name], tmp_path)
    assert {path.name: size(path)[0] for path in tmp_path.iterdir()} == dict.fromkeys(("learning.png", "load.png", "cost.png"), 1320)


def test_a_long_run_is_drawn(tmp_path):
    plots.load_heatmap(make_run(2000, 64), tmp_path / "load.png")
    assert size(tmp_path / "load.png")[0] == 1320


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (3000, 4)])
def test_fitness_map_takes_any_population(tmp_path, shape):
    values = np.random.default_rng(0).normal(size=shape)
    values[0, 0] = np.nan
    assert size(plots.fitness_map(values, tmp_path / "fitness.png")) == (840, 660)


def drawn(monkeypatch, draw, *arguments):
    """The axes of a picture, which is not written."""
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure) or Path(path))
    draw(*arguments, "unused.png")
    return figures[0].axes[0]


def test_pairs_that_are_not_known_are_grey_and_never_a_clients_best(monkeypatch):
    values = np.array([[np.nan, np.nan], [0.1, 0.9], [np.nan, 0.2], [0.3, np.nan]])
    axes = drawn(monkeypatch, plots.fitness_map, values)
    np.testing.assert_array_equal(axes.images[0].get_array().filled(np.nan), values[[3, 1, 2, 0]])
    assert "never tried" in axes.get_legend().get_texts()[0].get_text()
    assert drawn(monkeypatch, plots.fitness_map, np.ones((2, 2))).get_legend() is None


def test_pictures_depend_on_the_records(tmp_path):
    first = plots.learning_curves(make_run(), tmp_path / "a.png").read_bytes()
    assert first == plots.learning_curves(make_run(), tmp_path / "b.png").read_bytes()
    assert first != plots.learning_curves(make_run(final=0.4), tmp_path / "b.png").read_bytes()


def test_comparison_pictures(tmp_path):
    runs = {"random": [make_run(seed=s) for s in range(2)], "full": [make_run()], "greedy": [without_evaluations(make_run())]}
    plots.draw_comparison(runs, tmp_path)
    assert {path.stem for path in tmp_path.iterdir()} == {f"compare-{metric}" for metric in plots.COMPARED_CURVES}


@pytest.mark.parametrize("seeds", [1, 2, plots.FEW_SEEDS])
def test_few_seeds_are_drawn_one_by_one(monkeypatch, seeds):
    axes = drawn(monkeypatch, plots.compare_curves, {"full": [make_run(final=0.1 + 0.2 * n) for n in range(seeds)]}, "eval_accuracy")
    assert not axes.collections and len(axes.lines) == (1 if seeds == 1 else 1 + seeds)
    assert ("each seed" in axes.get_legend().get_title().get_text()) == (seeds > 1)
    assert axes.get_ylim()[0] >= -0.05 and axes.get_ylim()[1] <= 1


@pytest.mark.parametrize(("metric", "most"), [("eval_accuracy", 1.0), ("eval_loss", np.inf)])
def test_bands_stay_within_what_can_be_and_say_so(monkeypatch, metric, most):
    def band(finals):
        axes = drawn(monkeypatch, plots.compare_curves, {"full": [make_run(final=final) for final in finals]}, metric)
        assert len(axes.lines) == 1
        return axes.collections[0].get_paths()[0].vertices[:, 1], axes.get_legend().get_title().get_text()

    height, title = band([0.0, 0.0, 1.0, 1.0, 1.0])
    assert height.min() >= 0 and height.max() <= most and "cut" in title
    height, title = band([0.5, 0.51, 0.52, 0.53, 0.54])
    assert np.ptp(height) > 0 and title.endswith("95% interval")
    both = {
        "wide": [make_run(final=final) for final in [0.0, 0.0, 1.0, 1.0, 1.0]],
        "narrow": [make_run(final=0.5 + 0.01 * i) for i in range(5)],
    }
    axes = drawn(monkeypatch, plots.compare_curves, both, metric)
    assert axes.get_legend().get_title().get_text().count("interval") == 1


@pytest.mark.parametrize("n", [2, 5, 30])
def test_mean_interval_is_students(n):
    values = np.random.default_rng(n).normal(size=n).tolist()
    mean, half = mean_interval(values)
    low, high = stats.t.interval(0.95, n - 1, loc=np.mean(values), scale=stats.sem(values))
    np.testing.assert_allclose([mean - half, mean + half], [low, high], rtol=1e-6)


def test_mean_interval_of_few():
    assert mean_interval([]) == (None, None)
    assert mean_interval([3.0]) == (3.0, None)


def test_compare_table_against_a_slow_oracle():
    finals = {"random": [0.80, 0.90], "balanced": [0.95, 0.70], "full": [0.99]}
    table = compare_table({name: [make_run(final=value) for value in values] for name, values in finals.items()})
    assert table["target"] == pytest.approx(0.99 * 0.85) and "random" in table["target_rule"]
    balanced = table["aligners"]["balanced"]
    assert tuple(balanced) == COMPARED == tuple(table["metrics"])
    assert balanced["eval_accuracy"]["mean"] == pytest.approx(0.825) and balanced["eval_accuracy"]["n"] == 2
    assert balanced["eval_accuracy"]["half_width"] == pytest.approx(12.7062047 * 0.125)
    assert balanced["rounds_to_target"] == {"mean": 6.0, "half_width": None, "n": 1, "censored": 1}
    assert balanced["bytes_to_target"]["mean"] == balanced["bytes_total"]["mean"] == 9000
    assert balanced["simulated_seconds_total"]["mean"] == 12.0
    assert table["aligners"]["full"]["eval_accuracy"]["half_width"] is None
    assert table["aligners"]["full"]["rounds_to_target"]["censored"] == 0


@pytest.mark.parametrize(("target", "rounds", "rule"), [(0.5, 4.0, "given"), (None, None, "none")])
def test_compare_table_takes_the_given_target(target, rounds, rule):
    runs = {"greedy": [make_run()]} | ({} if target is None else {"random": [make_run(final=0.99)]})
    table = compare_table(runs, target)
    assert (table["target"], table["target_rule"]) == (target, rule)
    assert table["aligners"]["greedy"]["rounds_to_target"]["mean"] == rounds
    assert table["aligners"]["greedy"]["rounds_to_target"]["censored"] == 0


@pytest.mark.parametrize("runs", [{}, {"random": []}, {"random": [[]]}])
def test_compare_table_refuses_nothing(runs):
    with pytest.raises(ValueError, match="runs"):
        compare_table(runs)


class Page(HTMLParser):
    """Text, links and tags that were not closed."""

    def __init__(self, html):
        super().__init__()
        self.text, self.open, self.links, self.pictures = "", [], [], 0
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href") and not value.startswith("data:")]
        self.pictures += tag == "img"
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read_page(path):
    html = path.read_text()
    page = Page(html)
    assert page.open == [] and page.links == [] and "http" not in html and not re.search(r"url\(|@import", html)
    return page


def write_run(folder, records):
    log = metrics.MetricsLog(folder / "metrics.jsonl")
    for line in records:
        log.append(line)


def test_report_of_a_run_is_one_page_with_its_figures(tmp_path):
    write_run(tmp_path, make_run(final=0.8765))
    (tmp_path / "config.toml").write_text(to_toml(TrainConfig(data="<b>&'\"", target=0.8, model_options={"hidden": 128})))
    metrics.write_json(tmp_path / "summary.json", {"device": "8 x abacus", "versions": {"jax": "9.9"}, "last": "stale"})
    plots.fitness_map(np.ones((4, 4)), tmp_path / "plots" / "fitness.png")
    page = read_page(write_report(tmp_path))
    for expected in ("0.8765", "<b>&'\"", "9 kB", "12 s", "rounds to accuracy 0.8", "balanced", "8 x abacus", "9.9", "hidden"):
        assert expected in page.text
    assert page.pictures == 4
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize("name", ["one round, one expert", "no evaluations"])
def test_report_of_an_odd_run_without_other_files(tmp_path, name):
    write_run(tmp_path, RUNS[name])
    assert read_page(write_report(tmp_path)).pictures == 3


def test_report_of_a_comparison(tmp_path):
    runs = {"random": [make_run(final=f) for f in (0.8, 0.9)], "balanced": [make_run(final=f) for f in (0.7, 0.7)]}
    metrics.write_json(tmp_path / "comparison.json", compare_table(runs) | metrics.environment() | {"config": {"alpha": 0.125}})
    plots.compare_curves(runs, "eval_accuracy", tmp_path / "plots" / "compare-eval_accuracy.png")
    path = write_report(tmp_path)
    page = read_page(path)
    for expected in ("0.8500 ± 0.6353", "0.7000 ± 0.0000", "6 (1 of 2 seeds)", "– (0 of 2 seeds)", "0.8415", "0.125", "x cpu"):
        assert expected in page.text.replace("\u00a0", " ")
    assert page.pictures == 1
    assert re.search(r'class="best">0\.8500', path.read_text()) and 'class="best">6 (1 of 2 seeds)' in path.read_text()


def test_of_a_target_most_seeds_are_best_before_fewest_rounds(tmp_path):
    runs = {"balanced": [make_run(final=f) for f in (1.0, 0.7)], "random": [make_run(final=0.8)] * 2}
    metrics.write_json(tmp_path / "comparison.json", compare_table(runs, 0.75))
    page = write_report(tmp_path).read_text().replace("\u00a0", " ")
    assert '<td class="">6 (1 of 2 seeds)</td><td class="best">6 ± 0</td>' in page


DAMAGED = {
    "metrics.jsonl": ["", "nonsense\n"],
    "comparison.json": ["", "[]", "{}", '{"aligners": {"a": {}}, "metrics": ["eval_loss"], "target": null, "target_rule": ""}'],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in DAMAGED.items() for text in texts])
def test_report_refuses_a_folder_without_a_whole_run(tmp_path, name, text):
    with pytest.raises(ValueError, match="holds no run"):
        write_report(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()
