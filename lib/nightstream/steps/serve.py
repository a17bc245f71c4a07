"""The streaming query: every micro-batch of events refreshes its users and merges their new lists."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pyspark.sql import SparkSession
from pyspark.sql.streaming.query import StreamingQuery
from pyspark.sql.streaming.readwriter import DataStreamWriter

from nightstream.errors import NightstreamError
from nightstream.ingest import sources
from nightstream.ingest.ledger import parsed
from nightstream.monitoring import freshness
from nightstream.monitoring.batch_report import BatchReport
from nightstream.runtime.session import is_remote
from nightstream.runtime.settings import Settings
from nightstream.runtime.spark_errors import has_new_columns, ours_in
from nightstream.serving import recommendations_now
from nightstream.serving.stream_function import StreamFunction
from nightstream.serving.stream_state import QUERY, ShippedStream, Stream, StreamState
from nightstream.store.storage import Storage

log = logging.getLogger(__name__)
POLL_SECONDS = 1
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
    Returns the number of micro-batches, events and refreshed users, and the percentiles of Monitor.summary; over Spark
    Connect the number of micro-batches and their rows.
    Raises NightstreamError for on_batch over Spark Connect, TableError where no model is published, WriterBusyError
    where another process writes the serving tables.
    """
    function = StreamFunction(settings, uuid.uuid4().hex)
    stream = _stream(spark, function, on_batch)

    def is_over() -> bool:
        return stop() or (max_batches is not None and stream.counts["batches"] >= max_batches)

    with stream:
        with ThreadPoolExecutor(1) as pool:
            # To plan the query takes as long as to make ready for its first micro-batch.
            first = pool.submit(_writer, spark, function, until_idle)
            stream.start()
            writer = first.result()
        for view in (freshness, recommendations_now):
            view.make_view(Storage(spark, settings.storage), settings)
        query = writer.start()
        on_start()
        vain_starts, batches = 0, 0
        while True:
            try:
                _run_out(query, stream, until_idle, is_over)
                break
            except Exception as error:
                vain_starts = vain_starts + 1 if stream.counts["batches"] == batches else 1
                if not has_new_columns(error) or vain_starts > MOST_VAIN_STARTS:
                    raise ours_in(error) or error from error
            log.warning(
                "the columns of the source have changed: reading them anew", extra={"path": settings.stream.path}
            )
            batches = stream.counts["batches"]
            stream.settle()
            stream.start()
            query = _writer(spark, function, until_idle).start()
        stream.settle()
    return stream.summary()


def _stream(spark: SparkSession, function: StreamFunction, on_batch: Callable[[BatchReport], None] | None) -> Stream:
    """The function's state, or over Spark Connect, where that lives on the server, what stands for it here."""
    if not is_remote(spark):
        return StreamState(spark, function.settings, function.run_id, on_batch or (lambda report: None))
    if on_batch is not None:
        raise NightstreamError(
            "over Spark Connect micro-batches run on the server and report to its log and to metrics, not here; "
            "run this command with spark.remote: null"
        )
    return ShippedStream(spark, function.settings)


def _writer(spark: SparkSession, function: StreamFunction, until_idle: bool) -> DataStreamWriter:
    """The query, not started yet. Raises SourceError where its source is not there."""
    settings, stream = function.settings, function.settings.stream
    arrived = parsed(sources.stream_events(spark, stream), settings)
    writer = arrived.writeStream.foreachBatch(function).option("checkpointLocation", stream.checkpoint)
    if until_idle:
        writer = writer.trigger(availableNow=True)
    elif stream.trigger_seconds > 0:
        writer = writer.trigger(processingTime=f"{stream.trigger_seconds} seconds")
    return writer.queryName(QUERY)


def _run_out(query: StreamingQuery, stream: Stream, until_idle: bool, is_over: Callable[[], bool]) -> None:
    """Wait until the query is to end, and end it. Raises what it has met."""
    try:
        while not query.awaitTermination(POLL_SECONDS):
            stream.watch(query, until_idle)
            if is_over():
                return
    finally:
        stream.stop(query)
