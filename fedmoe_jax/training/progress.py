"""What a person sees while a run trains: a live bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_QUIET_SECONDS = 30.0  # plain lines without an evaluation come no more often
_SAME_BLOCK_SECONDS = 0.05  # rounds reported closer together than this were computed as one block


class Progress:
    """Shows the rounds of a run as they end; a context manager.

    Args:
      total_rounds: rounds of the whole run, those of an earlier part included.
      stream: text file to write to, standard output if None.
      quiet: show nothing.
    """

    def __init__(self, total_rounds: int, stream: Any = None, quiet: bool = False):
        self.total_rounds = total_rounds
        self._console = Console(file=stream or sys.stdout, highlight=False, markup=False, quiet=quiet)
        self._clock = _Clock()
        self._seen: dict[str, dict[str, Any]] = {}  # of each run
        self._run, self._done = "", 0
        self._printed = 0.0
        self._live = None
        if self._console.is_terminal:
            self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=4)

    def __enter__(self) -> "Progress":
        self._clock = _Clock()
        self._printed = time.monotonic()
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, record: Mapping[str, Any], done: int | None = None, run: str = "") -> None:
        """Shows a round that has ended; `record` is a line of metrics.jsonl. Evaluations stay until the run's next.

        Where several runs share the display, `done` counts the rounds of all so far, and `run` is the name of the record's.
        """
        self._seen[run] = self._seen.get(run, {}) | {name: value for name, value in record.items() if value is not None}
        self._run, self._done = run, int(record["round"]) + 1 if done is None else done
        self._clock.tick(self._done)
        evaluated = record.get("eval_accuracy") is not None or record.get("eval_loss") is not None
        waited = time.monotonic() - self._printed > _QUIET_SECONDS
        if self._live is None and (evaluated or waited or self._done == self.total_rounds):
            self._printed = time.monotonic()
            self.note(f"round {self._done}/{self.total_rounds}  {'  '.join(self._facts())}")

    def note(self, text: str) -> None:
        """Prints one line, above the bar where there is one."""
        self._console.print(Text(" ".join(text.split("\n"))), soft_wrap=True)
        self._console.file.flush()

    def _facts(self):
        formats = [
            ("loss", "train_loss", "{:.3f}"),
            ("test loss", "eval_loss", "{:.3f}"),
            ("accuracy", "eval_accuracy", "{:.3f}"),
            ("load CV", "load_cv", "{:.2f}"),
            ("clients/s", "clients_per_second", "{:,.0f}"),
        ]
        seen = self._seen.get(self._run, {})
        facts = [f"{self._run}, round {seen['round'] + 1}"] if self._run else []
        facts += [f"{label} {form.format(seen[name])}" for label, name, form in formats if name in seen]
        left = self._clock.left(self.total_rounds)
        return facts if left is None else [*facts, f"left {_duration(left)}"]

    def _render(self):
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar_of_rounds = ProgressBar(total=self.total_rounds, completed=self._done, complete_style="cyan", finished_style="green")
        bar.add_row(f"round {self._done}/{self.total_rounds}", bar_of_rounds)
        facts = [fact.replace(" ", "\u00a0") for fact in self._facts()]  # a narrow terminal breaks lines between facts only
        return Group(bar, Text("  ".join(facts) if self._seen else "compiling the first rounds"))


class _Clock:
    """Estimates the time left from the rounds after the first block, whose time is mostly compilation."""

    def __init__(self):
        self.last = time.monotonic()
        self.done = 0
        self.blocks = 0
        self.first_time, self.first_done = self.last, 0

    def tick(self, done):
        now = time.monotonic()
        self.blocks += now - self.last > _SAME_BLOCK_SECONDS or not self.blocks
        if self.blocks == 1:
            self.first_time, self.first_done = now, done
        self.last, self.done = now, done

    def left(self, total):
        if self.done >= total or self.done <= self.first_done:
            return None
        rate = (self.last - self.first_time) / (self.done - self.first_done)
        return max(0.0, (total - self.done) * rate)


def _duration(seconds):
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
