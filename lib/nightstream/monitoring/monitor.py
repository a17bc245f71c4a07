"""Watching the stream: a log line for each micro-batch, and rows of `metrics` for each interval.

Nothing here slows the stream down or fails it. What a micro-batch reports is only taken in where the micro-batch runs;
Spark's progress comes in a thread of its listener bus, `metrics` is written in a thread of its own, and what goes wrong
is logged, once.
"""

from __future__ import annotations

import logging
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from pyspark.sql.streaming import StreamingQueryListener
from pyspark.sql.streaming.listener import (
    QueryProgressEvent,
    QueryStartedEvent,
    QueryTerminatedEvent,
    StreamingQueryProgress,
)

from nightstream.monitoring import backlog, measurements
from nightstream.monitoring.batch_report import BatchReport
from nightstream.monitoring.measurements import Interval
from nightstream.runtime.settings import StreamSettings
from nightstream.store.storage import Storage

log = logging.getLogger(__name__)

PREFIX = "stream_"
# Micro-batches whose report has come and whose progress has not.
MOST_WAITING = 100
# A failed append is tried again with the next one: so many intervals are kept for it.
MOST_UNWRITTEN = 60
LAST_WORD_SECONDS = 10.0


class Monitor:
    """What a stream measures of itself.

    A `with` block around the query listens to it, appends to `metrics` every stream.metrics_seconds in which something
    happened or the stream is behind, and at the end the rest. clock: the wall clock. query_name: of the query that is
    listened to.
    """

    def __init__(
        self, storage: Storage, stream: StreamSettings, query_name: str, clock: Callable[[], datetime]
    ) -> None:
        self.storage, self.stream, self.clock = storage, stream, clock
        self.listener = Listener(self, query_name)
        self._lock = threading.Lock()
        self._whole, self._interval = Interval(clock()), Interval(clock())
        self._waiting: OrderedDict[int, BatchReport] = OrderedDict()
        self._conflicts = storage.conflicts
        self._newest: BatchReport | None = None
        self._end_offset = ""
        self._unwritten: list[tuple[dict[str, float], str, datetime, dict[str, str]]] = []
        self._complained: set[str] = set()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._write_regularly, name="metrics", daemon=True)

    def __enter__(self) -> Monitor:
        with self._harmless("listening to the query"):
            self.storage.spark.streams.addListener(self.listener)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        with self._harmless("listening to the query"):
            self.listener.ended.wait(LAST_WORD_SECONDS)
            self.storage.spark.streams.removeListener(self.listener)
        self._done.set()
        self._thread.join()
        while self._waiting:
            self._take_in(self._waiting.popitem(last=False)[1], None)
        self.write()

    def on_batch(self, report: BatchReport) -> None:
        """Take in what a micro-batch reports."""
        overdue = None
        with self._harmless("taking in a micro-batch"), self._lock:
            self._newest = report
            self._whole.add(sums=_counts(report), seconds=_seconds(report))
            self._waiting[report.batch_id] = report
            if len(self._waiting) > MOST_WAITING:
                overdue = self._waiting.popitem(last=False)[1]
        if overdue is not None:
            self._take_in(overdue, None)

    def on_merge(self, seconds: float, commits: int) -> None:
        """Take in that a MERGE of so many commits took so long."""
        with self._harmless("taking in a MERGE"), self._lock:
            self._interval.add(sums={"merges": 1, "merged_commits": commits}, seconds={"merge": seconds})

    def on_progress(self, progress: StreamingQueryProgress) -> None:
        """Take in Spark's progress of a micro-batch: it comes after the micro-batch's own report."""
        with self._harmless("taking in Spark's progress"):
            with self._lock:
                report = self._waiting.pop(progress.batchId, None)
            # A progress without rows and without a report says that the query waits.
            if report is not None or progress.numInputRows:
                self._take_in(report, progress)

    def summary(self) -> dict[str, float]:
        """The percentiles of the whole run, of its newest micro-batches where they are many."""
        return {f"{PREFIX}{name}": value for name, value in self._whole.percentiles(("visible", "delay")).items()}

    def write(self) -> None:
        """Append the interval to `metrics` and to the log, and begin the next. Does nothing where nothing happened."""
        with self._harmless("measuring"):
            now = self.clock()
            with self._lock:
                interval, self._interval = self._interval, Interval(now)
                conflicts, self._conflicts = self._conflicts, self.storage.conflicts
                newest, end_offset = self._newest, self._end_offset
                interval.add(sums={"conflicts_retried": self._conflicts - conflicts})
            if end_offset and not any(name.startswith("backlog_") for name in interval.peaks):
                with self._harmless("looking for the backlog"):
                    arrived = None if newest is None else newest.last_arrival
                    interval.add(peaks=backlog.probed(self.storage.spark, self.stream, end_offset, arrived))
            # A micro-batch that runs on and on brings nothing but a backlog.
            if not any(interval.sums.values()) and not any(interval.peaks.values()):
                return
            values = {f"{PREFIX}{name}": value for name, value in interval.values(now).items()}
            labels = {"interval_s": f"{(now - interval.begun).total_seconds():.0f}"}
            log.info("stream measured", extra={**values, **labels})
            version = "" if newest is None else newest.model_version
            self._unwritten = [*self._unwritten, (values, version, now, labels)][-MOST_UNWRITTEN:]
        with self._harmless("writing to metrics"):
            while self._unwritten:
                measurements.write(self.storage, *self._unwritten[0])
                del self._unwritten[0]

    def _take_in(self, report: BatchReport | None, progress: StreamingQueryProgress | None) -> None:
        """One micro-batch, with what is known of it."""
        with self._harmless("taking in a micro-batch"):
            sums: dict[str, float] = {"batches": 1}
            seconds: dict[str, float] = {}
            peaks: dict[str, float] = {}
            line: dict[str, Any] = {}
            if report is not None:
                sums |= _counts(report)
                seconds |= _seconds(report)
                peaks["unmerged_commits"] = float(report.unmerged)
                line |= {"batch_id": report.batch_id, "model_version": report.model_version}
            if progress is not None:
                line["batch_id"] = progress.batchId
                for name in ("inputRowsPerSecond", "processedRowsPerSecond"):
                    rate = getattr(progress, name)
                    line[_snake(name)] = rate if math.isfinite(rate) else None
                seconds |= {f"phase_{_snake(n)}": took / 1000 for n, took in progress.durationMs.items()}
                sums |= {"input_rows": progress.numInputRows, "busy_s": progress.batchDuration / 1000}
                for source in progress.sources:
                    peaks |= backlog.reported(source)
            with self._lock:
                if progress is not None and progress.sources:
                    self._end_offset = progress.sources[0].endOffset
                self._interval.add(sums, seconds, peaks)
            line |= {**sums, **{f"{name}_s": value for name, value in seconds.items()}, **peaks}
            del line["batches"]
            log.info("micro-batch", extra=line)

    def _write_regularly(self) -> None:
        while not self._done.wait(self.stream.metrics_seconds):
            self.write()

    @contextmanager
    def _harmless(self, what: str) -> Iterator[None]:
        """Log what goes wrong in the block, the first time, and go on."""
        try:
            yield
        except Exception:
            if what not in self._complained:
                self._complained.add(what)
                log.warning("the stream is not watched as it should be", exc_info=True, extra={"failed": what})
        else:
            self._complained.discard(what)


class Listener(StreamingQueryListener):
    """Gives a monitor the progress of the query of one name; `ended` is set when nothing more will come."""

    def __init__(self, monitor: Monitor, query_name: str) -> None:
        self.monitor, self.query_name = monitor, query_name
        self.run_id: object = None
        self.ended = threading.Event()
        self.ended.set()

    def onQueryStarted(self, event: QueryStartedEvent) -> None:
        if event.name == self.query_name:
            self.run_id = event.runId
            self.ended.clear()

    def onQueryProgress(self, event: QueryProgressEvent) -> None:
        if event.progress.name == self.query_name:
            # Over Spark Connect it listens from the first micro-batch on, and has not heard of the start.
            self.run_id = event.progress.runId
            self.monitor.on_progress(event.progress)

    def onQueryTerminated(self, event: QueryTerminatedEvent) -> None:
        if event.runId == self.run_id:
            self.ended.set()


def _counts(report: BatchReport) -> dict[str, float]:
    return {
        "events": report.events,
        "quarantined": report.quarantined,
        "duplicates": report.duplicates,
        "users_refreshed": report.users,
    }


def _seconds(report: BatchReport) -> dict[str, float]:
    measured = {
        "visible": report.visible_seconds,
        "delay": report.delay_seconds,
        "oldest_event_delay": report.oldest_event_seconds,
        "newest_event_delay": report.newest_event_seconds,
    }
    phases = {f"phase_{name}": took for name, took in report.phases.items()}
    return {**{name: value for name, value in measured.items() if value is not None}, **phases}


def _snake(name: str) -> str:
    """addBatch -> add_batch"""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
