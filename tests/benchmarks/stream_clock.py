"""The real streaming query with a clock beside it, and what it is measured against: a bare query, bare writes."""

from __future__ import annotations

import json
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from deltalake import DeltaTable
from nightstream.ingest import sources
from nightstream.ingest.ledger import parsed
from nightstream.monitoring.batch_report import BatchReport
from nightstream.runtime import console
from nightstream.runtime.settings import Settings
from nightstream.serving import background_merge, commits
from nightstream.serving.state_cache import StateCache
from nightstream.steps import serve
from nightstream.store.materialize import Cut
from nightstream.store.storage import Storage
from nightstream.store.tables import RECOMMENDATIONS, REFRESHES, USER_VECTORS
from pyspark.sql import DataFrame, SparkSession
from stream_world import LEARNT_FROM, START, events_of, write_lines

PATIENCE_SECONDS = 600


@dataclass(frozen=True)
class Sample:
    """Seconds of one micro-batch from the file's appearance to its commit and to the end of both MERGEs; of a bare
    micro-batch of as many events from their file's appearance until they are collected; of a bare append of the
    committed rows; of the two bare MERGEs side by side."""

    visible: float
    merged: float
    bare: float
    append: float
    merges: float


@dataclass
class Clock:
    """What happened when: commits as (moment, events), MERGEs as (moment, seconds), the newest committed rows; filled:
    ends when the states of all users are read ahead."""

    commits: list[tuple[float, int]] = field(default_factory=list)
    merges: list[tuple[float, float]] = field(default_factory=list)
    committed: Cut | None = None
    filled: Future[None] | None = None
    error: BaseException | None = None
    changed: threading.Condition = field(default_factory=threading.Condition)

    def wait(self, until: Any, seconds: float = PATIENCE_SECONDS) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: self.error is not None or until(), seconds):
                raise TimeoutError("the stream did not get there")
        if self.error is not None:
            raise self.error


class Stream:
    """A running query over files that `drop` writes.

    users: known users; events are those of random ones.
    """

    def __init__(self, spark: SparkSession, settings: Settings, users: int, items: int, seed: int) -> None:
        self.spark, self.settings, self.items = spark, settings, items
        self.copies = users // LEARNT_FROM
        self.rng = np.random.default_rng(seed)
        self.clock = Clock()
        self.folder = Path(settings.stream.path)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.dropped = 0
        self._files = 0
        self._last: list[dict[str, Any]] = []

    def drop(self, events: int, users: int, folder: Path | None = None, known: int = 0) -> float:
        """One file of events of random users; the moment of its appearance. folder: another one than the query's.
        known: so many of them are repetitions of events of the file before, and as many take others of it back."""
        some = self.rng.integers(0, LEARNT_FROM * self.copies, users)
        owners = np.concatenate([some, self.rng.choice(some, max(events - users, 0))])[:events]
        rows = events_of(owners % LEARNT_FROM, self.items, self.rng, START + 10_000_000 + self.dropped)
        for place, (row, owner) in enumerate(zip(rows, owners.tolist(), strict=True)):
            row |= {
                "event_id": f"new{self.dropped + place}",
                "user_id": f"u{owner % LEARNT_FROM:05}-{owner // LEARNT_FROM}",
            }
        for row, before, place in zip(rows, self._last, range(2 * known), strict=False):
            if place < known:
                row.update(before)
            else:
                row |= {"user_id": before["user_id"], "retracts": before["event_id"]}
                row["event_type"] = self.settings.events.retraction_type
        if folder is None:
            self._last = rows[2 * known :]
        self.dropped += events
        self._files += 1
        write_lines((folder or self.folder) / f"f{self._files:07}.jsonl", rows)
        return time.monotonic()

    @contextmanager
    def running(self) -> Iterator[Stream]:
        """The query runs inside; its commits and MERGEs are watched, not changed."""
        clock, started, stop = self.clock, threading.Event(), threading.Event()
        commit, merge, fill = commits.commit, commits.merge, StateCache.start

        def watched_commit(*args: Any, **options: Any) -> Cut:
            clock.committed = commit(*args, **options)
            return clock.committed

        def watched_merge(storage: Storage, *args: Any) -> None:
            begun = time.monotonic()
            merge(storage, *args)
            with clock.changed:
                clock.merges.append((time.monotonic(), time.monotonic() - begun))
                clock.changed.notify_all()

        def watched_fill(known: StateCache) -> Future[None]:
            clock.filled = fill(known)
            return clock.filled

        def on_batch(report: BatchReport) -> None:
            with clock.changed:
                clock.commits.append((time.monotonic(), report.events + report.duplicates))
                clock.changed.notify_all()

        def work() -> None:
            try:
                serve.run(self.spark, self.settings, on_batch=on_batch, on_start=started.set, stop=stop.is_set)
            except BaseException as error:
                with clock.changed:
                    clock.error = error
                    clock.changed.notify_all()
            finally:
                started.set()

        with (
            mock.patch.object(commits, "commit", watched_commit),
            mock.patch.object(commits, "merge", watched_merge),
            mock.patch.object(StateCache, "start", watched_fill),
        ):
            thread = threading.Thread(target=work, name="stream")
            thread.start()
            started.wait()
            # The tail of an earlier run, merged before the first micro-batch.
            clock.merges.clear()
            begun = time.monotonic()
            if clock.filled is not None:
                clock.filled.result()
            console.say(f"waited {time.monotonic() - begun:.0f} s until all users were read ahead")
            try:
                yield self
            finally:
                stop.set()
                thread.join()
        clock.wait(lambda: True)

    def sample(self, events: int, users: int, bare: Bare, collecting: Collecting, known: int = 0) -> Sample:
        """One micro-batch by itself, then a bare one, then the bare writes of the same rows. known: as of `drop`."""
        clock = self.clock
        commits, merges = len(clock.commits), len(clock.merges)
        begun = self.drop(events, users, known=known)
        clock.wait(lambda: len(clock.merges) > merges and sum(n for _, n in clock.commits[commits:]) >= events)
        visible, merged = clock.commits[-1][0] - begun, clock.merges[-1][0] - begun
        assert clock.committed is not None
        share = self.settings.stream.merge_share
        rest = min((1 / share - 1) * clock.merges[-1][1], background_merge.LONGEST_REST)
        collected = collecting.wait(self.drop(events, users, collecting.folder), events)
        found = Sample(visible, merged, collected, *bare.seconds(clock.committed))
        # What follows the commits rests after its MERGEs; the next sample must not wait for that.
        time.sleep(max(0.0, rest - sum((found.bare, found.append, found.merges))) + 0.2)
        return found


class Collecting:
    """A second query over files of the same kind. It parses them, and each of its micro-batches only collects its rows:
    what Spark takes for a micro-batch that does nothing. In a `with` block it runs."""

    def __init__(self, spark: SparkSession, settings: Settings, folder: Path) -> None:
        self.folder = folder / "stream"
        self.folder.mkdir(parents=True)
        changes = {"path": str(self.folder), "checkpoint": str(folder / "checkpoint")}
        rows = parsed(sources.stream_events(spark, settings.stream.model_copy(update=changes)), settings)
        self._writer = rows.writeStream.foreachBatch(self._collect).option("checkpointLocation", changes["checkpoint"])
        self._collected: queue.Queue[tuple[float, int]] = queue.Queue()

    def _collect(self, rows: DataFrame, number: int) -> None:
        count = rows.toArrow().num_rows
        self._collected.put((time.monotonic(), count))

    def __enter__(self) -> Collecting:
        self._query = self._writer.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._query.stop()

    def wait(self, begun: float, events: int) -> float:
        """Seconds from the file's appearance until its events were collected."""
        while events > 0:
            ended, count = self._collected.get(timeout=PATIENCE_SECONDS)
            events -= count
        return ended - begun


def start_seconds(stream: Stream) -> tuple[float, float]:
    """Seconds from the command `nightstream serve` until it takes its first event, and until that is visible: the
    command runs in a process of its own, on the tables of the stream, which must not run meanwhile."""
    settings = stream.settings
    chosen = Path(settings.storage.work_dir).parent / "start.yaml"
    chosen.write_text(json.dumps(settings.model_dump(mode="json")), encoding="utf-8")
    refreshes = Path(settings.storage.root) / REFRESHES.name
    taken = Path(settings.stream.checkpoint) / "offsets" / "0"
    stream.drop(1, 1)
    command = [str(Path(sys.executable).parent / "nightstream"), "serve", "--settings", str(chosen)]
    begun = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            moments = []
            for is_there in (taken.exists, lambda: _rows(refreshes) > 0):
                while not is_there():
                    if process.poll() is not None or time.monotonic() - begun > PATIENCE_SECONDS:
                        raise TimeoutError("the command did not get there")
                    time.sleep(0.02)
                moments.append(time.monotonic() - begun)
        finally:
            process.terminate()
    return moments[0], moments[1]


def _rows(table: Path) -> int:
    return DeltaTable(str(table)).to_pyarrow_table(columns=["user_id"]).num_rows


class Bare:
    """A second set of the tables, written without a stream; the same code writes, on one session."""

    def __init__(self, spark: SparkSession, settings: Settings, folder: Path) -> None:
        for spec in (USER_VECTORS, RECOMMENDATIONS, REFRESHES):
            shutil.copytree(Path(settings.storage.root) / spec.name, folder / "tables" / spec.name)
        self.storage = Storage(spark, settings.storage.model_copy(update={"root": str(folder / "tables")}))
        self.layout = commits.Layout.of(self.storage, settings.serving.top_k)

    def seconds(self, rows: Cut) -> tuple[float, float]:
        """Of an append to `refreshes`, and of the two MERGEs side by side."""
        begun = time.monotonic()
        self.storage.append(REFRESHES, rows)
        appended = time.monotonic()
        commits.merge(self.storage, commits.newest_committed(self.storage, [rows]), self.layout, 1)
        return appended - begun, time.monotonic() - appended
