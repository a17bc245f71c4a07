"""What a person sees of long work: bars and a live line on a terminal, elsewhere a line every few seconds."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

log = logging.getLogger(__name__)

stderr = Console(stderr=True, width=None if sys.stderr.isatty() else 120)
# Redirected into a file there is no width to keep to.
stdout = Console(width=None if sys.stdout.isatty() else 120)

HEARTBEAT_SECONDS = 15.0


def write_line(text: str) -> None:
    """A line for who watches without a terminal: a record of the log where it takes one, else printed on stderr."""
    if log.isEnabledFor(logging.INFO):
        log.info("%s", text)
    else:
        print(text, file=sys.stderr, flush=True)


class Heartbeat:
    """Says what runs and since when, every few seconds for as long as something runs.

    Of works within works the innermost is named.

    Args:
        write: Takes each line.
        seconds: The time between two lines.
    """

    def __init__(self, write: Callable[[str], None], seconds: float) -> None:
        self._write, self._seconds = write, seconds
        self._changed = threading.Condition()
        self._running: list[tuple[Callable[[], str], float]] = []
        self._last = 0.0
        self._thread: threading.Thread | None = None

    @contextmanager
    def during(self, state: Callable[[], str]) -> Iterator[None]:
        """Beats while the block runs. state: the text of the next line, asked for at each beat."""
        entry = (state, time.monotonic())
        with self._changed:
            if not self._running:
                self._last = entry[1]
            self._running.append(entry)
            if self._thread is None:
                self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
                self._thread.start()
        try:
            yield
        finally:
            with self._changed:
                self._running.remove(entry)
                self._changed.notify()

    def _beat(self) -> None:
        with self._changed:
            while self._running:
                due = self._last + self._seconds - time.monotonic()
                if due > 0:
                    self._changed.wait(due)
                    continue
                state, begun = self._running[-1]
                self._last = time.monotonic()
                self._write(f"{state()}, {self._last - begun:.0f} s so far")
            self._thread = None


heartbeat = Heartbeat(write_line, HEARTBEAT_SECONDS)


@contextmanager
def working(state: Callable[[], str]) -> Iterator[None]:
    """Without a terminal, a line every HEARTBEAT_SECONDS while the block runs; on one, nothing."""
    if stderr.is_terminal:
        yield
    else:
        with heartbeat.during(state):
            yield


@contextmanager
def step(text: str) -> Iterator[None]:
    """A spinner with a text while something runs; without a terminal, a line at its start and one at each beat."""
    if stderr.is_terminal:
        with stderr.status(text):
            yield
    else:
        write_line(text)
        with heartbeat.during(lambda: text):
            yield


@contextmanager
def training_bar() -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yields a function that takes an entry of progress.jsonl and moves the encoder's bar; without a terminal, the
    newest entries are told at each beat, and the encoders' best figures at the end."""
    progress = TrainingProgress()
    if not stderr.is_terminal:
        with heartbeat.during(progress.text):
            yield progress.take
        if best := progress.best():
            write_line(best)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("epoch {task.fields[epoch]}  loss {task.fields[loss]:.3f}  NDCG@10 {task.fields[ndcg]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=stderr) as bars:
        tasks: dict[str, Any] = {}

        def update(entry: dict[str, Any]) -> None:
            progress.take(entry)
            name = entry["encoder"]
            if name not in tasks:
                tasks[name] = bars.add_task(
                    f"train {name}", total=entry["epochs"] * entry["steps"], epoch=0, loss=0.0, ndcg="-"
                )
            bars.update(
                tasks[name],
                completed=(entry["epoch"] - 1) * entry["steps"] + entry["step"],
                epoch=f"{entry['epoch']}/{entry['epochs']}",
                loss=entry["loss"],
                ndcg=progress.best_of(name),
            )

        yield update


class TrainingProgress:
    """How far the encoders are, from the entries of progress.jsonl (see train_encoder)."""

    def __init__(self) -> None:
        self._untold: dict[str, dict[str, Any]] = {}
        self._told: list[dict[str, Any]] = []
        self._best: dict[str, float] = {}

    def take(self, entry: dict[str, Any]) -> None:
        """Take in one entry."""
        name, score = entry["encoder"], entry["ndcg@10"]
        self._untold[name] = entry
        if score is not None:
            self._best[name] = max(self._best.get(name, 0.0), score)

    def text(self) -> str:
        """The newest entry of each encoder that got one since the last call; where none did, those of the last call.

        A whole epoch is told once: what follows it may be another step of the training, which has no entries.
        """
        if self._untold:
            untold, self._untold = self._untold, {}
            self._told = list(untold.values())
        else:
            self._told = [entry for entry in self._told if not entry["whole"]]
        return "; ".join(map(self._of, self._told)) or "train the model"

    def best(self) -> str:
        """The best validation figure of each encoder, empty where none was validated."""
        return "; ".join(f"trained {name}: validation NDCG@10 {self.best_of(name)}" for name in self._best)

    def best_of(self, encoder: str) -> str:
        """The encoder's best validation NDCG@10 so far, "-" before there is one."""
        return f"{self._best[encoder]:.4f}" if encoder in self._best else "-"

    def _of(self, entry: dict[str, Any]) -> str:
        name = entry["encoder"]
        place = f"epoch {entry['epoch']}/{entry['epochs']}, step {entry['step']}/{entry['steps']}"
        return f"train {name}: {place}, loss {entry['loss']:.3f}, validation NDCG@10 {self.best_of(name)}"


def say(text: str) -> None:
    """A line for the person who watches."""
    stderr.print(text, highlight=False, soft_wrap=True)


def quality_table(scores: Sequence[dict[str, Any]], title: str) -> Table:
    """The rows of evaluation.scores for a person to read."""
    table = Table(title=title, title_justify="left")
    for name in ("delay", "users", "events", "HR@5", "NDCG@5", "HR@10", "NDCG@10", "HR@20", "NDCG@20", "coverage"):
        table.add_column(name, justify="left" if name in ("delay", "users") else "right")
    for row in scores:
        delay = "frozen" if row["delay_s"] is None else f"{row['delay_s']:g} s"
        figures = [f"{row[f'{m}@{k}']:.4f}" for k in (5, 10, 20) for m in ("hr", "ndcg")]
        coverage = "" if row["coverage"] is None else f"{row['coverage']:.2f}"
        table.add_row(delay, row["users"], f"{row['events']:,}", *figures, coverage)
    return table
