"""What a person sees of long work: bars for training, one live line for the stream."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

stderr = Console(stderr=True, width=None if sys.stderr.isatty() else 120)
# Redirected into a file there is no width to keep to.
stdout = Console(width=None if sys.stdout.isatty() else 120)


@contextmanager
def training_bar() -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yields a function that takes a line of progress.jsonl and moves the bar; without a terminal, a line an epoch."""
    if not stderr.is_terminal:
        yield _print_epoch
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("epoch {task.fields[epoch]}  loss {task.fields[loss]:.3f}  NDCG@10 {task.fields[ndcg]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=stderr) as bars:
        tasks: dict[str, Any] = {}
        best: dict[str, float] = {}

        def update(line: dict[str, Any]) -> None:
            name = line["encoder"]
            if name not in tasks:
                tasks[name] = bars.add_task(
                    f"train {name}", total=line["epochs"] * line["steps"], epoch=0, loss=0.0, ndcg="-"
                )
            if line["ndcg@10"] is not None:
                best[name] = max(best.get(name, 0.0), line["ndcg@10"])
            bars.update(
                tasks[name],
                completed=(line["epoch"] - 1) * line["steps"] + line["step"],
                epoch=f"{line['epoch']}/{line['epochs']}",
                loss=line["loss"],
                ndcg=f"{best[name]:.4f}" if name in best else "-",
            )

        yield update


def _print_epoch(line: dict[str, Any]) -> None:
    if line["whole"]:
        text = f"train {line['encoder']}: epoch {line['epoch']}/{line['epochs']}, loss {line['loss']:.3f}"
        score = "" if line["ndcg@10"] is None else f", validation NDCG@10 {line['ndcg@10']:.4f}"
        print(text + score, file=sys.stderr, flush=True)


@contextmanager
def step(text: str) -> Iterator[None]:
    """A spinner with a text while something runs; without a terminal, a line at its start."""
    if stderr.is_terminal:
        with stderr.status(text):
            yield
    else:
        print(text, file=sys.stderr, flush=True)
        yield


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
