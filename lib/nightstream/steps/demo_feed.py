"""The live feed of the demo: the newest part of a source, written as small JSON-lines files at a steady pace."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from rich.live import Live

from nightstream.errors import SourceError
from nightstream.ingest.sources import recbole_name
from nightstream.monitoring.batch_report import BatchReport
from nightstream.runtime import console
from nightstream.runtime.settings import EventSource


@dataclass(frozen=True)
class Cut:
    """A source cut in time. before: number of events written to the night's file; after: the rest, in time order, as
    JSON objects; after_users: events per user among them; cut_micros: the time of the last event before."""

    before: int
    after: list[str]
    after_users: dict[str, int]
    cut_micros: int


def cut_source(source: EventSource, fraction: float, target: Path) -> Cut:
    """Write the older part of a RecBole .inter file to `target` and return the newer one. A demo's data fits in memory.

    The cut is a time: events of one second are never torn apart. Raises SourceError for a missing or foreign file.
    """
    try:
        header, *lines = Path(source.path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise SourceError(f"the demo's data {source.path} cannot be read; run `make data` first") from error
    names = [recbole_name(h) for h in header.split("\t")]
    if source.format != "recbole" or source.columns["event_time"] not in names:
        raise SourceError(f"the demo replays a RecBole .inter file; {source.path} is none, use --settings movielens")
    at, user = names.index(source.columns["event_time"]), names.index(source.columns["user_id"])
    rows = sorted((line.split("\t") for line in lines if line), key=lambda row: float(row[at]))
    last = float(rows[max(0, round(len(rows) * (1 - fraction)) - 1)][at])
    before = [row for row in rows if float(row[at]) <= last]
    after = [row for row in rows if float(row[at]) > last]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("\n".join([header, *("\t".join(row) for row in before)]) + "\n", encoding="utf-8")
    replayed = [json.dumps(dict(zip(names, row, strict=True))) for row in after]
    return Cut(len(before), replayed, dict(Counter(row[user] for row in after)), round(last * 1e6))


class Feed:
    """Writes the events into a folder, in order, `size` a file, evenly over `seconds`, in a thread of its own.

    Begins when `begin` is called inside its `with` block.
    """

    def __init__(self, events: list[str], folder: Path, size: int, seconds: float) -> None:
        self.files = [events[i : i + size] for i in range(0, len(events), size)]
        self.folder, self.seconds = folder, seconds
        self.done = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write, name="feed", daemon=True)

    def __enter__(self) -> Feed:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def begin(self) -> None:
        self._thread.start()

    def _write(self) -> None:
        begun = time.monotonic()
        for number, events in enumerate(self.files):
            due = begun + self.seconds * number / len(self.files)
            if self._stop.wait(max(0.0, due - time.monotonic())):
                return
            # Spark lists the folder at any moment: a file must appear whole, and hidden names are passed over.
            beside = self.folder / f".{number:06}.jsonl"
            beside.write_text("\n".join(events) + "\n", encoding="utf-8")
            os.replace(beside, self.folder / f"{number:06}.jsonl")
        self.done = True


class LiveLine:
    """One line about the stream that stays up to date: events in, users refreshed, true delay.

    Without a terminal it is printed at each beat of the console's heartbeat.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.events = self.users = self.batches = 0
        self.delays: list[float] = []
        self._shown = ExitStack()
        self._live: Live | None = None

    def __enter__(self) -> LiveLine:
        if console.stderr.is_terminal:
            self._live = self._shown.enter_context(Live("", console=console.stderr, refresh_per_second=4))
        else:
            self._shown.enter_context(console.working(self.text))
        return self

    def __exit__(self, *error: object) -> None:
        self._shown.close()

    def update(self, report: BatchReport) -> None:
        """Take in one micro-batch."""
        self.batches += 1
        self.events += report.events + report.quarantined + report.duplicates
        self.users += report.users
        if report.delay_seconds is not None:
            self.delays.append(report.delay_seconds)
        if self._live is not None:
            self._live.update(self.text())

    def text(self) -> str:
        """The line."""
        if not self.batches:
            return "stream: waiting for the first micro-batch"
        return (
            f"stream: {self.events:,}/{self.total:,} events in, {self.users:,} users refreshed, "
            f"micro-batch {self.batches}, delay {self.delays[-1] if self.delays else 0.0:.1f} s"
        )
