"""report.html: a run or a comparison as one page that needs no other file."""

import base64
import json
import tomllib
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from fedmoe_jax.training import accountant, metrics, plots
from fedmoe_jax.training.config import TrainConfig

CAPTIONS = {
    "learning": "Loss and accuracy over the rounds",
    "load": "Load of each expert in each round, and its coefficient of variation",
    "fitness": "Fitness of each client for each expert",
    "cost": "Accuracy against bytes and simulated time",
    **{f"compare-{metric}": plots.LABELS[metric][0].upper() + plots.LABELS[metric][1:] for metric in plots.COMPARED_CURVES},
}
"""What each picture of a run's or comparison's plots/ folder shows, by file name, in the order of the page."""

LABELS = {
    **plots.LABELS,
    "eval_accuracy_best": "global test accuracy, best",
    "coverage": "share of experts trained, last round",
    "staleness_max": "rounds since the stalest expert was trained",
    "fitness_mean": "mean fitness of assigned pairs",
    "rounds_to_target": "rounds to target",
    "bytes_to_target": "bytes to target",
    "bytes_total": "bytes, down and up",
    "simulated_seconds_total": "simulated time",
    "simulated_seconds": "simulated time of a round",
    "wall_seconds": "wall time of a round",
    "clients_per_second": "clients a second",
    "peak_memory_bytes": "peak memory",
    "bytes_down": "bytes down, a round",
    "bytes_up": "bytes up, a round",
}

_NOTE = (
    "Mean over seeds ± half the 95% interval (Student's t), which is wide for two or three seeds. The best mean is bold; where intervals "
    "overlap, it may be chance. Where some seeds never reach the target, the mean is of those that do, and best is what most seeds reach."
)

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2430; background: #f6f7f9; margin: 0; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 28px; margin: 0 0 4px; } h2 { font-size: 20px; margin: 36px 0 12px; }
.about { color: #5b6675; margin: 0; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 12px; margin-top: 24px; }
.card, figure, .table { background: #fff; border: 1px solid #e1e5ea; border-radius: 8px; }
.card { padding: 12px 16px; } .card b { display: block; font-size: 24px; font-weight: 600; } .card span { color: #5b6675; font-size: 14px; }
figure { margin: 0 0 16px; padding: 16px; } figure img { display: block; max-width: 100%; margin: 0 auto; }
figcaption { color: #5b6675; margin-bottom: 8px; }
.table { overflow-x: auto; padding: 4px 16px; margin-bottom: 8px; }
table { border-collapse: collapse; width: 100%; font-size: 15px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 6px 12px 6px 0; border-top: 1px solid #edf0f3; vertical-align: top; overflow-wrap: anywhere; }
tr:first-child > * { border-top: 0; } thead th { color: #5b6675; font-weight: 600; } tbody th { font-weight: 400; color: #5b6675; }
td.best { font-weight: 600; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(330px, 1fr)); gap: 16px; align-items: start; }
"""


def write_report(run_dir: str | Path) -> Path:
    """Writes report.html into the folder of a run or of a comparison, and returns its path.

    Pictures of a run that are not there are drawn from its metrics first.

    Raises:
      ValueError: if the folder holds neither, or a damaged one.
    """
    folder = Path(run_dir)
    if (folder / "comparison.json").is_file():
        page = _comparison_page(folder)
    elif (folder / "metrics.jsonl").is_file():
        page = _run_page(folder)
    else:
        raise ValueError(f"{folder}: holds no run (metrics.jsonl) and no comparison (comparison.json)")
    path = folder / "report.html"
    metrics.write_text(path, page)
    return path


def _run_page(folder):
    records = metrics.read(folder / "metrics.jsonl")
    if not records:
        raise ValueError(f"{folder}: the run has no complete round yet")
    config = _config(folder)
    saved = _read_json(folder / "summary.json") if (folder / "summary.json").is_file() else {}
    summary = metrics.summarise(records, config.get("target", saved.get("target")), seed=config.get("seed"))
    summary |= {name: saved[name] for name in ("versions", "device", "git_revision") if name in saved}  # where it ran, not where it is read
    if not all((folder / "plots" / f"{name}.png").is_file() for name in ("learning", "load", "cost")):
        plots.draw_run(records, folder / "plots")
    names = [_short(str(config[name])) for name in ("data", "model", "aligner") if name in config]
    last = [(name, _number(name, value)) for name, value in summary["last"].items()]
    spent = _privacy(saved, config, summary["rounds"])
    tables = _section("Configuration", _pairs(config.items())) + _section("Last values", _pairs((_label(n), v) for n, v in last))
    body = _cards(_run_figures(summary)) + spent + _pictures(folder) + f'<div class="columns">{tables}</div>'
    return _page(
        f"Run {folder.resolve().name}",
        " · ".join(map(str, [*names, f"{summary['rounds']} rounds"])),
        body + _section("Environment", _environment(summary)),
    )


def _privacy(saved, config, rounds):
    """A section on what is spent, as it was saved, or of the rounds so far."""
    spent = saved.get("privacy")
    if spent is None and {"noise_multiplier", "target_epsilon"} & set(config):
        try:
            spent = accountant.account(TrainConfig(**config), rounds).get("privacy")
        except (TypeError, ValueError) as error:
            return _section("Privacy", _pairs([("not known", error)]))
    try:
        return "" if spent is None else _section("Privacy", _pairs([("spent by a run", accountant.told(spent))]))
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"summary.json: its privacy is damaged ({type(error).__name__})") from None


def _short(name):
    """The last part of an absolute path; other names as they are."""
    return Path(name).name if Path(name).is_absolute() else name


def _run_figures(summary):
    last, best, total = summary["last"], summary["best"], summary["total"]
    yield "global test accuracy", _number("eval_accuracy", last["eval_accuracy"])
    yield "best global test accuracy", _number("eval_accuracy", best["eval_accuracy"])
    yield "client accuracy, mean", _number("client_accuracy_mean", last["client_accuracy_mean"])
    yield "client accuracy, 10th percentile", _number("client_accuracy_p10", last["client_accuracy_p10"])
    yield "CV of tokens per expert, whole run", _number("load_cv_total", last["load_cv_total"])
    yield "bytes, down and up", _bytes(total["bytes_down"] + total["bytes_up"])
    yield "simulated time", _seconds(total["simulated_seconds"])
    yield "wall time", _seconds(total["wall_seconds"])
    if summary["target"] is not None:
        yield f"rounds to accuracy {summary['target']:g}", _number("rounds_to_target", summary["rounds_to_target"])


def _comparison_page(folder):
    comparison = _read_json(folder / "comparison.json")
    try:
        table = _comparison_table(comparison)
        aligners, target, rule = list(comparison["aligners"]), comparison["target"], comparison["target_rule"]
        goal = "no target" if target is None else f"target: global test accuracy {target:.4f} ({rule})"
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{folder / 'comparison.json'}: is damaged ({type(error).__name__}: {error})") from None
    config = comparison.get("config") or _config(folder)
    about = f"{', '.join(aligners)} · {goal}"
    config = {name: value for name, value in config.items() if value not in (None, {})}
    settings = _section("Configuration", _pairs(config.items())) if config else ""
    body = table + _privacy(comparison, {}, 0) + _pictures(folder) + settings + _section("Environment", _environment(comparison))
    return _page(f"Comparison {folder.resolve().name}", about, body)


def _comparison_table(comparison):
    aligners = comparison["aligners"]
    rows = []
    for name in comparison["metrics"]:
        cells = [figures[name] for figures in aligners.values()]
        best = _best(cells, higher=name.removesuffix("_best") in metrics.HIGHER_IS_BETTER)
        row = [f'<td class="{"best" if cell in best else ""}">{escape(_interval(name, cell))}</td>' for cell in cells]
        rows.append(f"<tr><th>{escape(_label(name))}</th>{''.join(row)}</tr>")
    head = "".join(f"<th>{escape(str(aligner))}</th>" for aligner in aligners)
    table = f'<div class="table"><table><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    return f'<h2>Results</h2>{table}<p class="about">{_NOTE}</p>'


def _best(cells, *, higher):
    """The cells with the best mean among those of the most seeds, since some may never reach a target; none if all are alike."""

    def rank(cell):
        return cell["n"], cell["mean"] if higher else -cell["mean"]

    known = [cell for cell in cells if cell["mean"] is not None]
    best = [cell for cell in known if rank(cell) == max(map(rank, known))]
    return best if len(best) < len(cells) else []


def _interval(name, cell):
    """The mean with its interval, and how many seeds it is of where others never reach the target."""
    half = "" if cell["half_width"] is None else f" ± {_number(name, cell['half_width'])}"
    reached = f" ({cell['n']} of {cell['n'] + cell['censored']} seeds)" if cell["censored"] else ""
    return (_number(name, cell["mean"]) + half).replace(" ", "\u00a0") + reached


def _page(title, about, body):
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f'<body><main><h1>{escape(title)}</h1><p class="about">{escape(about)}</p>\n{body}\n</main></body></html>\n'
    )


def _cards(figures: Iterable[tuple[str, str]]) -> str:
    cards = "".join(f'<div class="card"><b>{escape(value)}</b><span>{escape(label)}</span></div>' for label, value in figures)
    return f'<div class="cards">{cards}</div>'


def _section(title, body):
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _pairs(items: Iterable[tuple[str, Any]]) -> str:
    rows = "".join(f"<tr><th>{escape(str(name))}</th><td>{escape(str(value))}</td></tr>" for name, value in items)
    return f'<div class="table"><table><tbody>{rows}</tbody></table></div>'


def _pictures(folder):
    place = {name: number for number, name in enumerate(CAPTIONS)}
    found = sorted((folder / "plots").glob("*.png"), key=lambda path: (place.get(path.stem, len(place)), path.stem))
    pictures = []
    for path in found:
        caption = escape(CAPTIONS.get(path.stem, path.stem))
        data = base64.b64encode(path.read_bytes()).decode()
        pictures.append(f'<figure><figcaption>{caption}</figcaption><img alt="{caption}" src="data:image/png;base64,{data}"></figure>')
    return f"<h2>Plots</h2>{''.join(pictures)}" if pictures else ""


def _environment(about: Mapping[str, Any]) -> str:
    versions = about.get("versions") or {}
    shown = {"device": about.get("device"), "seed": about.get("seed"), "git revision": about.get("git_revision"), **versions}
    return _pairs((name, value) for name, value in shown.items() if value is not None)


def _config(folder):
    path = folder / "config.toml"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None


def _read_json(path):
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: is not a JSON object")
    return value


def _label(name):
    return LABELS.get(name, name.replace("_", " "))


def _number(name, value):
    """A metric's value with its unit."""
    if value is None:
        return "–"
    if "bytes" in name:
        return _bytes(value)
    if "seconds" in name:
        return _seconds(value)
    if "accuracy" in name or "loss" in name or "cv" in name:
        return f"{value:.4f}"
    return f"{value:,.4g}" if isinstance(value, float) and abs(value) < 1e4 else f"{value:,.0f}"


def _bytes(value):
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.3g} TB"


def _seconds(value):
    if abs(value) < 60:
        return f"{value:.3g} s"
    return f"{value / 60:.3g} min" if abs(value) < 3600 else f"{value / 3600:,.3g} h"
