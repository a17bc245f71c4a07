"""What a stream keeps between its micro-batches, and what the process that starts the query does for it."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from types import TracebackType
from typing import Protocol

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.streaming.query import StreamingQuery

from nightstream.errors import TableError
from nightstream.monitoring.batch_report import BatchReport
from nightstream.monitoring.monitor import Monitor
from nightstream.runtime.clock import utc_now
from nightstream.runtime.settings import Settings
from nightstream.serving import commits
from nightstream.serving.speed_layer import SpeedLayer
from nightstream.store import registry
from nightstream.store.lease import Lease
from nightstream.store.storage import Storage

log = logging.getLogger(__name__)

KIND = "stream"
QUERY = "nightstream"
QUIET_SECONDS = 3.0  # without a micro-batch

# What the streams of this process keep, by the run that they belong to.
STATES: dict[str, StreamState] = {}


class Stream(Protocol):
    """What the process that starts the query does for its function, in a `with` block around the query.

    counts: of what the micro-batches did; `batches` is among them.
    """

    counts: dict[str, int]

    def __enter__(self) -> Stream: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def start(self) -> None:
        """Make ready for the first micro-batch of a query; see SpeedLayer.start."""

    def watch(self, query: StreamingQuery, until_idle: bool) -> None:
        """What is to be done every second while the query runs. Raises what its MERGEs have met.

        until_idle: whether the query ends by itself when it has worked off what is there.
        """

    def stop(self, query: StreamingQuery) -> None:
        """End the query."""

    def settle(self) -> None:
        """Wait until all that is committed is merged. Raises what the MERGEs have met."""

    def summary(self) -> dict[str, float]:
        """The counts, and what was measured."""


class ShippedStream:
    """The client's side of a stream whose function runs on a Spark Connect server.

    The function has the lease there, and tells log and metrics what it does. Here Spark's progress is counted.
    """

    def __init__(self, spark: SparkSession, settings: Settings) -> None:
        """Raises TableError where no model is published."""
        self.storage, self.settings = Storage(spark, settings.storage), settings
        self.counts = {"batches": 0, "input_rows": 0}
        self._counted: set[tuple[str, int]] = set()
        registry.published(self.storage)

    def __enter__(self) -> ShippedStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return

    def start(self) -> None:
        return

    def watch(self, query: StreamingQuery, until_idle: bool) -> None:
        for progress in query.recentProgress:
            key = (str(progress.runId), progress.batchId)
            if progress.numInputRows and key not in self._counted:
                self._counted.add(key)
                self.counts["batches"] += 1
                self.counts["input_rows"] += progress.numInputRows

    def stop(self, query: StreamingQuery) -> None:
        self.watch(query, until_idle=True)
        query.stop()

    def settle(self) -> None:
        """The server ends the function's process with the query, whatever it has not merged yet: it is merged here."""
        serving = self.settings.serving
        # The lease is the checkpoint's, so it comes here at once, and that process can write no more.
        with lease_of(self.storage, self.settings):
            commits.merge_tail(self.storage, commits.Layout.of(self.storage, serving.top_k), serving.merge_attempts)

    def summary(self) -> dict[str, float]:
        return {**self.counts}


class StreamState:
    """What a stream keeps between its micro-batches: the lease of the serving tables, the speed layer, the monitor.

    A `with` block holds the lease, and lets the StreamFunction of that run_id find the state in this process.
    on_batch: told what each micro-batch did.
    """

    def __init__(
        self,
        spark: SparkSession,
        settings: Settings,
        run_id: str,
        on_batch: Callable[[BatchReport], None] = lambda report: None,
    ) -> None:
        """Raises TableError where no model is published."""
        self.run_id, self.on_batch = run_id, on_batch
        self.counts = {"batches": 0, "events": 0, "users": 0}
        self.storage = storage = Storage(spark, settings.storage)
        self.monitor = Monitor(storage, settings.stream, QUERY, utc_now)
        writer = partial(writer_of, spark, settings.stream.checkpoint)
        self.layer = SpeedLayer(storage, settings, writer, utc_now, self._reported, self.monitor.on_merge)
        self.lease = lease_of(storage, settings)
        # Stopping a query interrupts its micro-batch. That loses nothing, but a batch that is let to end need not be
        # repeated at the next start.
        self._running, self._stopped = threading.Lock(), threading.Event()
        self._ended = time.monotonic()
        self._held = ExitStack()

    def __enter__(self) -> StreamState:
        """Raises WriterBusyError where another process writes the serving tables."""
        with ExitStack() as stack:
            for each in (self.lease, self.monitor, closing(self.layer)):
                stack.enter_context(each)
            STATES[self.run_id] = self
            stack.callback(STATES.pop, self.run_id)
            stack.callback(self._let_end)
            self._held = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.__exit__(kind, error, trace)

    def start(self) -> None:
        """Make ready for the first micro-batch of a query; see SpeedLayer.start."""
        self.layer.start()
        self._stopped.clear()

    def micro_batch(self, arrived: DataFrame, batch_id: int) -> None:
        """See StreamFunction. Raises InterruptedError after `stop`."""
        with self._running:
            if self._stopped.is_set():
                raise InterruptedError("the query is being stopped")
            self.lease.check()
            self.layer(arrived, batch_id)
            # Else Spark would note a micro-batch as done of which the fence has kept something out.
            self.lease.confirm()
            self._ended = time.monotonic()

    def between_batches(self) -> None:
        """Where no micro-batch has come for a while: what must not wait for an event, so that nothing is left undone
        because none comes. Raises what the MERGEs have met, and WriterBusyError where the lease is lost."""
        self.lease.check()
        if time.monotonic() - self._ended < QUIET_SECONDS or not self._running.acquire(blocking=False):
            return
        try:
            self.layer.between_batches()
        finally:
            self._running.release()

    def watch(self, query: StreamingQuery, until_idle: bool) -> None:
        if not until_idle:
            self.between_batches()

    def stop(self, query: StreamingQuery) -> None:
        self._let_end()
        query.stop()

    def _let_end(self) -> None:
        """Let the micro-batch that runs end, and no other begin."""
        with self._running:
            self._stopped.set()

    def settle(self) -> None:
        self.layer.settle()

    def summary(self) -> dict[str, float]:
        return {**self.counts, **self.monitor.summary()}

    def keep_up(self) -> None:
        """Call `between_batches` until the state stops: for a process in which nobody else does."""
        try:
            while not self._stopped.wait(QUIET_SECONDS):
                self.between_batches()
        except Exception:
            # What MERGEs have met, and that the lease is lost, the next micro-batch raises, too.
            log.exception("the stream does nothing more between micro-batches")

    def _reported(self, report: BatchReport) -> None:
        self.counts["batches"] += 1
        self.counts["events"] += report.events
        self.counts["users"] += report.users
        self.monitor.on_batch(report)
        self.on_batch(report)


def lease_of(storage: Storage, settings: Settings) -> Lease:
    """The lease of a stream.

    The checkpoint names the holder, so that a stream that was killed has its lease back as soon as it runs again.
    """
    serving, holder = settings.serving, f"checkpoint {settings.stream.checkpoint}"
    return Lease(storage, holder, KIND, serving.lease_seconds, serving.merge_attempts, wait=True)


def writer_of(spark: SparkSession, checkpoint: str) -> str:
    """The identity of a checkpoint: Spark's query id, which a deleted and renewed checkpoint does not share.

    Commits are numbered under it; were it the path alone, the batches of a renewed checkpoint would be taken for
    repetitions and ignored.
    """
    row = spark.read.text(f"{checkpoint.rstrip('/')}/metadata").first()
    if row is None:
        raise TableError(f"the checkpoint {checkpoint} has no metadata; delete it to start over")
    return f"stream {json.loads(row[0])['id']}"
