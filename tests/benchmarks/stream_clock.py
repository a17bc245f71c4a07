"""The real streaming query with a clock beside it, and the bare appends and MERGEs that it is measured against."""

from __future__ import annotations

import shutil
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
from nightstream.monitoring.batch_report import BatchReport
from nightstream.runtime import console
from nightstream.runtime.settings import Settings
from nightstream.serving import background_merge, commits
from nightstream.serving.state_cache import StateCache
from nightstream.steps import serve
from nightstream.store.materialize import Cut
from nightstream.store.storage import Storage
from nightstream.store.tables import RECOMMENDATIONS, REFRESHES, USER_VECTORS
from pyspark.sql import SparkSession
from stream_world import LEARNT_FROM, START, events_of, write_lines

PATIENCE_SECONDS = 600


@dataclass(frozen=True)
class Sample:
    """Seconds of one micro-batch from the file's appearance to its commit and to the end of both MERGEs; of a bare
    append of the committed rows; of the two bare MERGEs side by side."""

    visible: float
    merged: float
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

    def drop(self, events: int, users: int) -> float:
        """One file of events of random users; the moment of its appearance."""
        known = self.rng.integers(0, LEARNT_FROM * self.copies, users)
        owners = np.concatenate([known, self.rng.choice(known, max(events - users, 0))])[:events]
        rows = events_of(owners % LEARNT_FROM, self.items, self.rng, START + 10_000_000 + self.dropped)
        for place, (row, owner) in enumerate(zip(rows, owners.tolist(), strict=True)):
            row |= {
                "event_id": f"new{self.dropped + place}",
                "user_id": f"u{owner % LEARNT_FROM:05}-{owner // LEARNT_FROM}",
            }
        self.dropped += events
        self._files += 1
        write_lines(self.folder / f"f{self._files:07}.jsonl", rows)
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
                clock.commits.append((time.monotonic(), report.events))
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

    def sample(self, events: int, users: int, bare: Bare) -> Sample:
        """One micro-batch by itself, then the bare writes of the same rows."""
        clock = self.clock
        commits, merges = len(clock.commits), len(clock.merges)
        begun = self.drop(events, users)
        clock.wait(lambda: len(clock.merges) > merges and sum(n for _, n in clock.commits[commits:]) >= events)
        visible, merged = clock.commits[-1][0] - begun, clock.merges[-1][0] - begun
        assert clock.committed is not None
        share = self.settings.stream.merge_share
        rest = min((1 / share - 1) * clock.merges[-1][1], background_merge.LONGEST_REST)
        found = Sample(visible, merged, *bare.seconds(clock.committed))
        # What follows the commits rests after its MERGEs; the next sample must not wait for that.
        time.sleep(max(0.0, rest - sum((found.append, found.merges))) + 0.2)
        return found


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
