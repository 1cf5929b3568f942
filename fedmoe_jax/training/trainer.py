"""A run: rounds in blocks between evaluations, and everything that it leaves in its folder."""

import contextlib
import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from fedmoe_jax.data.population import Population
from fedmoe_jax.distributed import processes
from fedmoe_jax.info import Info
from fedmoe_jax.round import State, rounds
from fedmoe_jax.training import accountant, divergence, metrics
from fedmoe_jax.training.checkpoint import Checkpoints
from fedmoe_jax.training.config import TrainConfig, UsageError, from_toml, located, to_toml, validate
from fedmoe_jax.training.evaluate import client_evaluation, global_evaluation, global_weights
from fedmoe_jax.training.interrupt import Interrupts, alone, inside
from fedmoe_jax.training.memory import is_out_of_memory, memory_bytes, peak_memory_bytes
from fedmoe_jax.training.metrics import MetricsLog, Record
from fedmoe_jax.training.plots import draw_run
from fedmoe_jax.training.progress import Progress
from fedmoe_jax.training.report import write_report
from fedmoe_jax.training.setup import Setup, build
from fedmoe_jax.training.weights import save_weights

_MAY_CHANGE = ("chunk", "devices", "expert_devices")  # fields that --resume may give otherwise: results change by rounding only

Callback = Callable[[State, Record], Any]
"""callback(state, record), called after each round's record is written, again where a run goes back.

`state` is that at the end of the block of rounds between evaluations, and the next block takes its buffers: copy what is to stay.
"""


def train(
    config: TrainConfig,
    out: str | Path,
    *,
    resume: bool = False,
    trace: str | None = None,
    callback: Callback | None = None,
    check: bool = False,
) -> dict[str, Any]:
    """Trains as `config` says and leaves config, metrics, checkpoints, plots and report in `out`.

    Args:
      config: a valid configuration.
      out: folder that is absent, empty, or with `resume` the run to continue.
      resume: continue the run in `out`; a finished one is left alone.
      trace: folder for a JAX profile of the second block of rounds, which compiles nothing; of the first if it is the only one.
      callback: see `Callback`. Of several processes the first one calls it.
      check: look in every round whether `invariants.NAMES` hold.

    Returns:
      The content of summary.json.

    Raises:
      UsageError: if `out` cannot be used, or the data are not those that the run began with.
      ValueError: naming the field that cannot be, or the checkpoint.
      Interrupted: after SIGTERM or SIGINT, when the block of rounds in flight has ended and its checkpoint is written.
      interrupt.StoppedError: if an invariant does not hold, or training has diverged and is to stop then.
      OSError: if something cannot be written; what was written before stays, and the run can be continued.
    """
    validate(config)
    accountant.of_run(config, config.rounds)
    config, out = located(config), Path(out)
    processes.by_first(lambda: claim(out, config, resume))
    if resume and (out / "summary.json").exists():
        return _finished(out)
    log, checkpoints = MetricsLog(out / "metrics.jsonl"), Checkpoints(out / "checkpoints")
    started = resume and checkpoints.latest() is not None  # then what it started from is not needed
    first = processes.is_first()
    with Interrupts() as interrupts, checkpoints, Progress(config.rounds, quiet=not first) as progress:
        setup = build(dataclasses.replace(config, init_from=None) if started else config)
        run = Run(dataclasses.replace(setup, check=check), note=progress.note)
        with alone(out) if first else contextlib.nullcontext():
            processes.by_first(lambda: _begin(out, config, resume, checkpoints))
            if resume:
                run.restore(checkpoints, most=log.whole())
                processes.by_first(lambda: log.truncate(run.done))
            with interrupts.deferred():
                back = lambda done: processes.by_first(lambda: log.truncate(done))  # noqa: E731
                for (record,) in run.blocks(checkpoints, trace, stop=lambda: processes.anyone(interrupts.pending()), returned=back):
                    if first:
                        log.append(record)
                        progress.update(record)
                    if first and callback is not None:
                        callback(run.state, record)
            scores, weights = run.setup.aligner_scores(run.state), processes.gathered(global_weights(run.setup, run.state))
            processes.by_first(lambda: _finish(out, run, log, weights, scores))
            return metrics.read_json(out / "summary.json")


def _begin(out: Path, config: TrainConfig, resume: bool, checkpoints: Checkpoints) -> None:
    """Writes what a run leaves at its start, in place of what a killed one left unfinished."""
    claim(out, config, resume)
    checkpoints.clear()
    for torn in filter(metrics.is_unfinished, out.iterdir()):
        torn.unlink()
    metrics.write_text(out / "config.toml", to_toml(config))


def _finish(out: Path, run: "Run", log: MetricsLog, weights: Any, scores: Any) -> None:
    """Writes what a run leaves at its end, summary.json and then the report last."""
    save_weights(out / "weights.npz", *weights)
    records, config = metrics.read(log.path), run.setup.config
    summary = metrics.summarise(records, config.target, seed=config.seed) | accountant.account(config, len(records))
    draw_run(records, out / "plots", scores)
    metrics.write_json(out / "summary.json", summary)
    write_report(out)


def _finished(out: Path) -> dict[str, Any]:
    """The summary of a run that has ended, with the report that it may have been about to write."""
    summary = metrics.read_json(out / "summary.json")
    if processes.is_first() and not (out / "report.html").exists():
        write_report(out)
    return summary


def claim(out: Path, config: Any, resume: bool) -> None:
    """Checks that a run may use the folder `out`; writes nothing.

    Raises:
      UsageError: naming --out or --resume.
    """
    if not resume:
        above = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
        if above != out and not (above.is_dir() and os.access(above, os.W_OK)):
            raise UsageError(f"--out {out} cannot be written: {above} is no folder to write to")
        if out.exists() and (not out.is_dir() or not all(map(metrics.is_unfinished, out.iterdir()))):
            raise UsageError(f"--out {out} is not empty: choose a new folder, or continue its run with --resume")
        return
    if not (out / "config.toml").exists():
        raise UsageError(f"--resume: {out} holds no run to continue")
    before = located(type(config)(**from_toml(out / "config.toml", type(config))))
    names = [name for name in config.__dataclass_fields__ if getattr(before, name) != getattr(config, name) and name not in _MAY_CHANGE]
    if names:
        raise UsageError(f"--resume: {', '.join(names)} differ from the run in {out}; leave them as they were")


class Run:
    """The state of a run and the compiled programs that advance and evaluate it.

    With setups that differ in their seed only, all of their runs in one vmapped program; `state` then leads with the run.
    """

    def __init__(self, *setups: Setup, note: Callable[[str], Any] = print):
        self.setup, self.width, self.note = setups[0], len(setups), note
        self.chunk = self.setup.chunk(memory_bytes() / self.width)
        self._compile()
        self.start(*setups)

    def start(self, *setups: Setup) -> None:
        """Goes back to round 0, with the weights and seeds of `setups`; what was compiled stays."""
        made = (setup.algorithm(self.chunk).init(jax.random.key(setup.config.seed), setup.population) for setup in setups)
        states = list(map(accountant.secret, made))
        self.state = states[0] if self.width == 1 else jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        self.done = self._returns = 0

    def _compile(self) -> None:
        self.algorithm = self.setup.algorithm(self.chunk)
        copies = min(self.chunk, self.setup.copied(memory_bytes() / self.width))
        self.evaluations = (global_evaluation(self.setup), client_evaluation(self.setup, copies))
        step = self.algorithm.step if self.width == 1 else jax.vmap(self.algorithm.step, (0, None))
        self.program = rounds(step, self._most())

    def restore(self, checkpoints: Checkpoints, most: int | None = None) -> None:
        """Continues from the newest checkpoint of round `most` or before, if there is one.

        Raises:
          UsageError: if the data or the clients' profiles are not those of the checkpoint.
          ValueError: as `Checkpoints.restore`.
        """

        def check(extra: dict[str, Any]) -> None:
            given = self.setup.digests
            names = [name for name in given if given[name] != extra["digests"].get(name)]
            if names:
                raise UsageError(f"--resume: the content of {' and '.join(names)} differs from that of the run; restore what it was")

        if checkpoints.latest() is not None:
            self.done, self.state, extra = checkpoints.restore(self.state, most=most, check=check, note=self.note)
            if extra["asked"] == self.setup.config.chunk and extra["chunk"] != self.chunk:  # unless another is asked for now
                self.chunk = extra["chunk"]
                self._compile()

    def _save(self, checkpoints: Checkpoints, *, wait: bool) -> None:
        extra = {"chunk": self.chunk, "asked": self.setup.config.chunk, "digests": self.setup.digests}
        (checkpoints.save if wait else checkpoints.begin)(self.done, self.state, extra)
        self._returns = 0

    def blocks(
        self,
        checkpoints: Checkpoints | None = None,
        trace: str | None = None,
        *,
        stop: Callable[[], bool] = lambda: False,
        returned: Callable[[int], Any] = lambda done: None,
    ) -> Iterator[tuple[Record, ...]]:
        """Runs to the end, yielding each round's record of every run; evaluates and saves at the blocks' ends.

        With `stop()` true it saves and ends after the block in flight; before the first block there is nothing to save. returned(done) is
        called when the run has gone back to round `done`, from which it yields again.
        """
        config, number, windows = self.setup.config, 0, self._windows()
        if stop():
            return
        while self.done < config.rounds:
            start = time.perf_counter()
            last, count, population = next(windows)
            waited = time.perf_counter() - start
            traced = number == 1 or (number == 0 and last == config.rounds)
            with jax.profiler.trace(trace) if trace is not None and traced else contextlib.nullcontext():
                start = time.perf_counter()  # starting a profile takes seconds
                infos = self._advance(population, count, first=number == 0)
                seconds = (waited + time.perf_counter() - start) / (last - self.done)
            results: list[dict[str, Any]] = [{}] * self.width
            if last % config.eval_every == 0 or last == config.rounds:
                results = [self._evaluate(run) for run in range(self.width)]
            for row in range(last - self.done):
                given = results if self.done + row + 1 == last else [{}] * self.width
                yield tuple(self._record(self.done + row, infos, (row, run), seconds, given[run]) for run in range(self.width))
            number += 1
            if not self._looked_at(infos, results, last, checkpoints):
                returned(self.done)
                windows.close()
                windows = self._windows()
                continue
            self.done = last
            stopped = stop()
            ends = stopped or last == config.rounds
            if checkpoints is not None and (ends or last % config.checkpoint_every == 0):
                self._save(checkpoints, wait=ends)
            if stopped:
                return

    def _looked_at(self, infos: Info, results: list[dict[str, Any]], last: int, checkpoints: Checkpoints | None) -> bool:
        """Whether the run goes on after a block of rounds; it goes back instead where it has diverged and is to."""
        policy, count = self.setup.config.on_divergence, last - self.done
        divergence.check_invariants(infos, self.done, count, self.width)
        if policy == "continue":
            return True
        try:
            divergence.check_finite(self.state, infos, results, self.done, count)
        except divergence.DivergedError as error:
            if policy == "stop" or checkpoints is None or self._returns == divergence.MOST_RETURNS:
                raise
            self._go_back(checkpoints)
            self.note(f"{error}; back to round {self.done}, with other clients ({self._returns} of {divergence.MOST_RETURNS})")
            return False
        return True

    def _go_back(self, checkpoints: Checkpoints) -> None:
        """To the newest checkpoint, or to the beginning, with another key."""
        returns = self._returns + 1
        self.start(self.setup)
        checkpoints.wait()
        if checkpoints.latest() is not None:
            self.done, self.state, _ = checkpoints.restore(self.state, note=self.note)
        self._returns = returns
        self.state = dataclasses.replace(self.state, key=jax.random.fold_in(self.state.key, returns))

    def _windows(self) -> Generator[tuple[int, int | None, Population]]:
        """Where each block of rounds ends, its rounds, None where all blocks have the most, and the population that it needs."""
        config, stream, ends = self.setup.config, self.setup.stream, list(self._ends())
        counts: Any = [last - before for before, last in itertools.pairwise([self.done, *ends])]
        counts = [None] * len(ends) if set(counts) == {self._most()} else counts  # so that one program is compiled
        windows: Any = itertools.repeat((None, self.setup.population))
        if stream is not None:
            windows = stream.windows(self.state, cohort_size=config.cohort, stops=ends)
        yield from ((last, count, population) for last, count, (_, population) in zip(ends, counts, windows, strict=False))

    def _pauses(self) -> list[int]:
        config = self.setup.config
        return [every for every in (config.eval_every, config.checkpoint_every, config.stream) if every is not None]

    def _most(self) -> int:
        """Rounds of a block, at most."""
        return min(self.setup.config.rounds, *self._pauses())

    def _ends(self) -> Iterator[int]:
        config, last = self.setup.config, self.done
        while last < config.rounds:
            last = min(config.rounds, *((last // every + 1) * every for every in self._pauses()))
            yield last

    def _advance(self, population: Population, count: int | None, *, first: bool) -> Info:
        """One block. If the first does not fit into the device's memory it is tried again with half the chunk."""
        while True:
            try:
                state = jax.tree.map(jnp.copy, self.state) if first else self.state
                with inside(f"round {self.done}"):
                    self.state, infos = jax.block_until_ready(self.program(state, population, count))
                return jax.device_get(infos)
            except jax.errors.JaxRuntimeError as error:
                if not first or self.chunk == 1 or not is_out_of_memory(error):
                    raise
                self.chunk = -(-self.chunk // 2)
                self.note(f"out of device memory: training {self.chunk} clients at once from here on")
                self._compile()

    def _evaluate(self, run: int) -> dict[str, Any]:
        state = self.state if self.width == 1 else jax.tree.map(lambda leaf: leaf[run], self.state)
        with inside("evaluation"):
            return {name: value for evaluate in self.evaluations for name, value in evaluate(state).items()}

    def _record(self, round: int, infos: Info, place: tuple[int, int], seconds: float, results: dict[str, Any]) -> Record:
        """A round of one run; the runs of one program took `seconds` together."""
        row = jax.tree.map(lambda leaf: leaf[place[: 1 if self.width == 1 else 2]], infos)
        values = {name: getattr(row, name) for name in metrics.METRIC_FIELDS if hasattr(row, name)}
        seconds = seconds / self.width
        speed = dict(wall_seconds=seconds, clients_per_second=float(row.clients) / seconds, peak_memory_bytes=peak_memory_bytes())
        return metrics.record(round, **values, **results, **speed)
