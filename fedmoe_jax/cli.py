"""The `fedmoe` command: train, compare, eval, export, report, profile, bench, serve and join."""

import dataclasses
import datetime
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedmoe_jax.training.config import TrainConfig, UsageError, from_toml, located, parse
from fedmoe_jax.training.interrupt import StoppedError

_COMMANDS = ("train", "compare", "eval", "export", "report", "profile", "bench", "serve", "join")
_USAGE = """usage: fedmoe COMMAND ...

  train [CONFIG.toml] [--field value ...] --out DIR     one run; --resume continues it, --help lists the fields
  compare [CONFIG.toml] --aligners A B ... --seeds N --out DIR     several aligners on the same seeds
  eval DIR [--data DATA]                                accuracy of a run's model, also on other data
  export DIR --out EXPORT [--client C]                  a run's model, or the experts of one client, as safetensors and JSON
  report DIR                                            writes DIR/report.html again
  profile                                               what this machine can afford as a client, as one line of JSON;
                                                        lines of several, with link speeds, are a file for train --profile
  serve [CONFIG.toml] [--field value ...] --out DIR     a run with real clients; --help lists the fields
  join --server HOST:PORT --data DATA --state DIR       takes part in one as a client; --help lists the fields
  bench assign [--clients N --experts E]                quality and speed of the assignment, a table or, piped, JSON lines
"""


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """Flags of `fedmoe train` that are not part of the configuration."""

    out: str | None = None
    """Folder of the run: absent, empty, or with --resume the run to continue."""
    resume: bool = False
    """Continue the run in --out."""
    trace: str | None = None
    """Folder for a JAX profile."""
    tensorboard: str | None = None
    """Folder for TensorBoard event files."""
    check: bool = False
    """Look in every round whether the assignment, the accounts and the weights are as they must be."""
    coordinator: str | None = None
    """Where several processes train together: auto (under Slurm and the like), or HOST:PORT of the first one."""
    processes: int | None = None
    """Processes in all, with HOST:PORT."""
    process: int | None = None
    """Which of them this is, from 0, with HOST:PORT."""
    explain: bool = False
    """Print how local training would treat each weight, and why, instead of training."""


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """Flags of `fedmoe compare` that are not part of the configuration."""

    out: str | None = None
    """An absent or empty folder."""
    aligners: tuple[str, ...] = ("random", "greedy", "load_only", "balanced")
    """Aligners to compare."""
    seeds: int = 5
    """Runs of each aligner."""


@dataclasses.dataclass(frozen=True)
class EvalOptions:
    """Global and per-client accuracy of a run's model."""

    data: str = ""
    """Other data, by default those of the run."""


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """A run's model as model.safetensors and config.json."""

    out: str | None = None
    """An absent or empty folder."""
    client: int | None = None
    """The client whose experts are to be a model of their own; the global model if not given."""


@dataclasses.dataclass(frozen=True)
class BenchOptions:
    """Time and quality of the assignment over families of problems, beside OR-tools' exact min-cost flow."""

    clients: int = 10_000
    """Clients of each problem."""
    experts: int = 64
    """Experts of each problem."""
    repeats: int = 5
    """Runs whose median is told."""
    no_reference: bool = False
    """Leave OR-tools out, so that only the proven gap is told."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0 when done, 2 after a user's mistake, 130 or 143 after Ctrl-C or SIGTERM, 1 after anything else."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words:
        print(f"fedmoe: give a command: {', '.join(_COMMANDS[:-1])} or {_COMMANDS[-1]}; see fedmoe --help", file=sys.stderr)

        return 2
    helpless = words[0] in ("eval", "export", "report", "profile") or words[:2] in (["bench", "-h"], ["bench", "--help"])
    if words[0] in ("-h", "--help") or (helpless and {"-h", "--help"} & set(words)):
        print(_USAGE, end="")
        return 0
    sys.path.insert(0, os.getcwd())
    commands: dict[str, Callable[[list[str]], None]] = {
        "train": _train, "compare": _compare, "eval": _eval, "export": _export, "report": _report, "profile": _profile, "bench": _bench,
        "serve": _serve, "join": _join,
    }  # fmt: skip
    try:
        if words[0] not in commands:
            raise UsageError(f"{words[0]!r} is no command, must be one of {', '.join(commands)}")
        commands[words[0]](words[1:])
    except ValueError as error:
        print(f"fedmoe {words[0]}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"fedmoe {words[0]}: interrupted{_go_on(words)}", file=sys.stderr)
        return 128 + getattr(error, "number", signal.SIGINT)
    except StoppedError as error:
        print(f"fedmoe {words[0]}: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if not _others_ended(error):
            raise
        print(f"fedmoe {words[0]}: another process has ended, or cannot be reached{_go_on(words)}", file=sys.stderr, flush=True)
        os._exit(1)  # the way to end in order waits for it
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else " ".join(str(error).split())
        print(f"fedmoe {words[0]}: {reason}{_go_on(words)}", file=sys.stderr)
        return 1
    return 0


def _others_ended(error: RuntimeError) -> bool:
    """Whether it is what a process of several sees when another one does not go on."""
    import jax

    from fedmoe_jax.distributed import processes

    return processes.several() and isinstance(error, processes.LostError | jax.errors.JaxRuntimeError)


def _go_on(words: list[str]) -> str:
    """How to go on with a run that has ended early, where it has left something."""
    if words[0] == "serve":
        return "; the same command goes on"
    folder = _out(words) if words[0] == "train" else None
    return f"; go on with fedmoe train --resume --out {folder}" if folder and (Path(folder) / "config.toml").is_file() else ""


def _train(words: list[str]) -> None:
    resumed = "--resume" in words and _stored(words)
    config, options = parse(TrainConfig, words, "fedmoe train", default=resumed or None, options=TrainOptions)
    from fedmoe_jax.distributed import processes, split_cpu

    if options.coordinator is not None:
        processes.start(options.coordinator, options.processes, options.process)
    elif options.processes is not None or options.process is not None:
        raise UsageError("--coordinator is missing: give HOST:PORT of the first process")
    else:
        split_cpu(config.devices or config.expert_devices)
    if options.explain:
        from fedmoe_jax.training.explain import explain

        print(explain(config))
        return
    from fedmoe_jax.training.tensorboard import scalars
    from fedmoe_jax.training.trainer import train

    callback = None if options.tensorboard is None else scalars(options.tensorboard)
    summary = train(config, _folder(options.out), resume=options.resume, trace=options.trace, callback=callback, check=options.check)
    last = summary["last"]
    if not processes.is_first():
        return
    print(f"accuracy {_percent(last['eval_accuracy'])}, clients' own {_percent(last['client_accuracy_mean'])}: {options.out}/report.html")
    if "privacy" in summary:
        from fedmoe_jax.training.accountant import told

        print(f"privacy: {told(summary['privacy'])}")


def _stored(words: list[str]) -> TrainConfig | None:
    """The configuration of the run that --resume continues, which flags need not repeat."""
    path = Path(_out(words) or "") / "config.toml"
    return TrainConfig(**from_toml(path)) if _out(words) and path.is_file() else None


def _out(words: list[str]) -> str | None:
    """The value of --out, if there is one."""
    given = [word.removeprefix("--out=") for word in words if word.startswith("--out=")]
    given += [after for word, after in itertools.pairwise(words) if word == "--out"]
    return given[-1] if given else None


def _compare(words: list[str]) -> None:
    config, options = parse(TrainConfig, words, "fedmoe compare", options=CompareOptions)
    from fedmoe_jax.training.compare import compare

    table = compare(config, _folder(options.out), aligners=list(options.aligners), seeds=options.seeds)
    for aligner, figures in table["aligners"].items():
        cells = (f"{name} {_interval(figures[name])}" for name in ("eval_accuracy", "client_accuracy_mean", "load_cv_total"))
        print(f"{aligner:>10}  " + "  ".join(cells))
    print(f"{options.out}/report.html")


def _eval(words: list[str]) -> None:
    folder, config = _run("eval", words)
    options, _ = parse(EvalOptions, words[1:], "fedmoe eval", default=EvalOptions(config.data))
    from fedmoe_jax.training.evaluate import evaluate_run

    print(json.dumps(evaluate_run(folder, config, options.data)))


def _export(words: list[str]) -> None:
    folder, config = _run("export", words)
    options, _ = parse(ExportOptions, words[1:], "fedmoe export")
    out = Path(_folder(options.out))
    from fedmoe_jax.training.export import export_run

    about = export_run(folder, config, out, options.client)
    print(f"{about['parameters']} parameters after round {about['round']}: {out}")


def _run(command: str, words: list[str]) -> tuple[Path, TrainConfig]:
    """The folder of a run, which is the first word, and its configuration."""
    if not words or words[0].startswith("-"):
        raise UsageError(f"{command} takes the folder of a run")
    folder = Path(words[0])
    if (folder / "comparison.json").is_file():
        raise UsageError(f"{folder} is a comparison, which keeps no models; {command} takes the folder of a run")
    if not (folder / "config.toml").is_file():
        raise UsageError(f"{folder} holds no run")
    return folder, located(TrainConfig(**from_toml(folder / "config.toml")))


def _report(words: list[str]) -> None:
    if len(words) != 1:
        raise UsageError("report takes the folder of a run or comparison")
    from fedmoe_jax.training.report import write_report

    print(write_report(words[0]))


def _profile(words: list[str]) -> None:
    if words:
        raise UsageError(f"profile takes no arguments, not {' '.join(words)}")
    from fedmoe_jax.training.machine import measure

    print(json.dumps(measure()))


def _bench(words: list[str]) -> None:
    if words[:1] != ["assign"]:
        raise UsageError("bench takes what to measure: assign")
    options, _ = parse(BenchOptions, words[1:], "fedmoe bench assign")
    from fedmoe_jax.bench import assign
    from fedmoe_jax.training import metrics

    about = {"device": metrics.device(), "versions": metrics.versions(), "date": datetime.date.today().isoformat()}
    sizes = dict(clients=options.clients, experts=options.experts, repeats=options.repeats)
    figures = assign.run(**sizes, reference=not options.no_reference)
    for line in assign.table(figures) if sys.stdout.isatty() else (json.dumps(figure | about) for figure in figures):
        print(line, flush=True)


def _serve(words: list[str]) -> None:
    from fedmoe_jax.deploy import commands

    _with_flower(lambda: commands.serve(words, _out(words)))


def _join(words: list[str]) -> None:
    from fedmoe_jax.deploy import commands

    _with_flower(lambda: commands.join(words))


def _with_flower(command: Callable[[], None]) -> None:
    try:
        command()
    except ModuleNotFoundError as error:
        if error.name not in ("flwr", "safetensors", "cryptography"):
            raise
        raise UsageError(f"{error.name} is not installed: pip install 'fedmoe-jax[flower]'") from None


def _folder(out: str | None) -> str:
    if out is None:
        raise UsageError("--out is missing: give the folder that the run is written to")
    return out


def _percent(value: Any) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def _interval(cell: dict[str, Any]) -> str:
    if cell["mean"] is None:
        return "-"
    return f"{cell['mean']:.3f}" + ("" if cell["half_width"] is None else f" +- {cell['half_width']:.3f}")


if __name__ == "__main__":
    sys.exit(main())
