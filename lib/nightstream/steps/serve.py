"""The streaming query: every micro-batch of events refreshes its users and merges their new lists."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.streaming.query import StreamingQuery
from pyspark.sql.streaming.readwriter import DataStreamWriter

from nightstream.errors import TableError
from nightstream.ingest import sources
from nightstream.ingest.ledger import parsed
from nightstream.monitoring.batch_report import BatchReport
from nightstream.monitoring.freshness import make_view
from nightstream.monitoring.monitor import Monitor
from nightstream.runtime.clock import utc_now
from nightstream.runtime.settings import Settings
from nightstream.runtime.spark_errors import ours_in
from nightstream.serving.speed_layer import SpeedLayer
from nightstream.store.lease import Lease
from nightstream.store.storage import Storage

log = logging.getLogger(__name__)
KIND = "stream"
QUERY = "nightstream"
POLL_SECONDS = 1
QUIET_SECONDS = 3.0  # without a micro-batch
# Delta may need several starts to take up one change.
MOST_VAIN_STARTS = 3


def run(
    spark: SparkSession,
    settings: Settings,
    until_idle: bool = False,
    max_batches: int | None = None,
    on_batch: Callable[[BatchReport], None] | None = None,
    on_start: Callable[[], None] = lambda: None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Run the query until it is stopped.

    until_idle: work off what is there and end. max_batches: end after so many micro-batches. on_start: called when the
    query takes events. stop: asked every second.
    Returns the number of micro-batches, events and refreshed users, and the percentiles of Monitor.summary.
    Raises TableError where no model is published, WriterBusyError where another process writes the serving tables.
    """
    storage = Storage(spark, settings.storage)
    checkpoint, serving = settings.stream.checkpoint, settings.serving
    counts = {"batches": 0, "events": 0, "users": 0}

    def reported(report: BatchReport) -> None:
        counts["batches"] += 1
        counts["events"] += report.events
        counts["users"] += report.users
        monitor.on_batch(report)
        if on_batch is not None:
            on_batch(report)

    monitor = Monitor(storage, settings.stream, QUERY, utc_now)
    layer = SpeedLayer(storage, settings, lambda: writer_of(spark, checkpoint), utc_now, reported, monitor.on_merge)
    # The checkpoint names the holder, so that a stream that was killed has its lease back as soon as it runs again.
    lease = Lease(storage, f"checkpoint {checkpoint}", KIND, serving.lease_seconds, serving.merge_attempts, wait=True)

    # Stopping a query interrupts its micro-batch. That loses nothing, but a batch that is let to end need not be
    # repeated at the next start.
    running, stopped = threading.Lock(), threading.Event()
    ended = [time.monotonic()]

    def micro_batch(arrived: DataFrame, batch_id: int) -> None:
        with running:
            if stopped.is_set():
                raise InterruptedError("the query is being stopped")
            lease.check()
            layer(arrived, batch_id)
            ended[0] = time.monotonic()

    def writer() -> DataStreamWriter:
        arrived = parsed(sources.stream_events(spark, settings.stream), settings)
        writer = arrived.writeStream.foreachBatch(micro_batch).option("checkpointLocation", checkpoint)
        if until_idle:
            writer = writer.trigger(availableNow=True)
        elif settings.stream.trigger_seconds > 0:
            writer = writer.trigger(processingTime=f"{settings.stream.trigger_seconds} seconds")
        return writer.queryName(QUERY)

    def between_batches() -> None:
        """Nothing is left undone because no event comes."""
        lease.check()
        if time.monotonic() - ended[0] < QUIET_SECONDS or not running.acquire(blocking=False):
            return
        try:
            layer.between_batches()
        finally:
            running.release()

    def run_out(query: StreamingQuery) -> None:
        """Wait until the query is to end, and end it. Raises what it has met."""
        try:
            while not query.awaitTermination(POLL_SECONDS):
                if not until_idle:
                    between_batches()
                if stop() or (max_batches is not None and counts["batches"] >= max_batches):
                    return
        finally:
            with running:
                stopped.set()
            query.stop()

    first = writer()
    with lease, monitor, closing(layer):
        layer.start()
        make_view(storage, settings)
        query = first.start()
        on_start()
        vain_starts, batches = 0, 0
        while True:
            try:
                run_out(query)
                break
            except Exception as error:
                vain_starts = vain_starts + 1 if counts["batches"] == batches else 1
                if not _has_new_columns(error) or vain_starts > MOST_VAIN_STARTS:
                    raise ours_in(error) or error from error
            log.warning(
                "the columns of the source have changed: reading them anew", extra={"path": settings.stream.path}
            )
            batches = counts["batches"]
            layer.settle()
            layer.start()
            stopped.clear()
            query = writer().start()
        layer.settle()
    return {**counts, **monitor.summary()}


def writer_of(spark: SparkSession, checkpoint: str) -> str:
    """The identity of a checkpoint: Spark's query id, which a deleted and renewed checkpoint does not share.

    Transactions are numbered under it; were it the path alone, the batches of a renewed checkpoint would be taken for
    repetitions and ignored.
    """
    row = spark.read.text(f"{checkpoint.rstrip('/')}/metadata").first()
    if row is None:
        raise TableError(f"the checkpoint {checkpoint} has no metadata; delete it to start over")
    return f"stream {json.loads(row[0])['id']}"


def _has_new_columns(error: Exception) -> bool:
    """Whether a Delta source stopped the query because its schema has changed; a query started anew goes on."""
    return any(name in str(error) for name in ("DELTA_SCHEMA_CHANGED", "DELTA_STREAMING_METADATA_EVOLUTION"))
