"""Reading what arrives: batch files, tables and streams become payload rows of one shape.

A payload row is (payload, source, position, arrival_time): the text as it arrived, the configured source, the place in
it, and when it arrived. All four come from the data, so that a replayed micro-batch reads the same rows.
"""

from __future__ import annotations

import logging
from pathlib import Path

from pyspark.errors import AnalysisException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from nightstream.errors import NightstreamError, SourceError
from nightstream.ingest import dimensions
from nightstream.ingest.formats import (
    ARRIVAL,
    CORRUPT,
    POSITION,
    as_text,
    load,
    open_batch,
    origin,
    own_columns,
    quoted,
    require_columns,
    unreadable,
)
from nightstream.ingest.formats import (
    recbole_name as recbole_name,
)
from nightstream.runtime.settings import EventSource, Settings, StreamSettings
from nightstream.store.tables import ITEMS, USERS

log = logging.getLogger(__name__)

_LAST_SECOND = 253_402_214_400  # the last day of the year 9999, as Python's calendar has it

# Microseconds are kept: Spark's own default for JSON cuts timestamps to milliseconds.
JSON_OPTIONS = {
    "timestampFormat": "yyyy-MM-dd'T'HH:mm:ss.SSSSSSXXX",
    "timestampNTZFormat": "yyyy-MM-dd'T'HH:mm:ss.SSSSSS",
    "ignoreNullFields": "true",
}


def read_events(spark: SparkSession, source: EventSource) -> DataFrame:
    """The payloads of a batch source: (payload, source, position, arrival_time), one row per line or table row.

    JSON lines stay as they are; rows of the other formats become JSON objects of all their columns, without nulls;
    bytes are read as text, see formats.as_text.
    position is the file, for Delta the table (its files are rewritten by OPTIMIZE); events.raw_rows makes it unique.
    arrival_time is the file's modification time.
    Raises SourceError for a missing, empty or unreadable source, and for mapped columns that a tabular source lacks.
    """
    rows = open_batch(spark, source.format, source.path)
    if source.format != "jsonl":
        require_columns(rows, source.path, source.columns.values())
    if rows.isEmpty():
        raise SourceError(f"the source {source.path} holds no rows; check sources.events.path")
    return _payloads(rows, source.format, source.path)


def stream_events(spark: SparkSession, settings: StreamSettings) -> DataFrame:
    """The payloads of the streaming source, as an unbounded frame of (payload, source, position, arrival_time).

    Each micro-batch reads at most `max_per_trigger` files (jsonl, delta) or offsets (kafka). arrival_time is the file's
    modification time or Kafka's timestamp; position is the file or topic/partition/offset. Kafka's messages also have
    `headers`, where mirrors and connectors note the position in their own source. Delta Lake outside of
    Databricks tells no modification time in a stream: arrival_time is null there, and no event is too far in the
    future. A local folder of JSON lines that is not there yet is created, so that a stream can wait for its first file.
    Files must appear whole (write them elsewhere, then rename).
    Raises SourceError for a Delta table or a remote folder that is missing, SettingsError for an unset ${env:…}.
    """
    options = settings.resolved_options()
    reader = spark.readStream
    try:
        if settings.format == "kafka":
            # Spark's own default is `latest`: what came before the first start would be left out without a word.
            limits = {"startingOffsets": "earliest", "maxOffsetsPerTrigger": str(settings.max_per_trigger)}
            limits["subscribe"] = settings.path
            options = {**limits, **options, "includeHeaders": "true"}
            return kafka_payloads(reader.format("kafka").options(**options).load(), settings.path)
        limits = {"maxFilesPerTrigger": str(settings.max_per_trigger)}
        if settings.format == "jsonl":
            _make_folder(settings.path)
            # By default Spark leaves out files that are a week older than the newest: late files must not get lost.
            limits["maxFileAge"] = "36500d"
            lines = reader.format("text").options(**{**limits, **options}).load(settings.path)
            rows = lines.where(F.trim("value") != "")
        else:
            # With a log of the table's schemas a query that is started anew goes on after columns came or went.
            limits["schemaTrackingLocation"] = f"{_absolute(settings.checkpoint)}/_delta_schema"
            rows = load(reader.format("delta").options(**{**limits, **options}), settings.path)
            return _payloads(_with_file(rows), settings.format, settings.path)
        rows = rows.withColumns(origin(F.col("_metadata.file_path")))
        rows.schema  # noqa: B018 - Spark finds out here, not at start, whether the source exists
    except NightstreamError:
        raise
    except Exception as error:
        raise unreadable(error, settings.format, settings.path, "stream.path") from error
    return _payloads(rows, settings.format, settings.path)


def read_items(spark: SparkSession, settings: Settings) -> DataFrame:
    """ITEMS rows of sources.items, one per item_id; none where it is null. Raises SourceError as attributes.items."""
    source = settings.sources.items
    if source is None:
        return spark.createDataFrame([], ITEMS.schema)
    return dimensions.items(spark, source, settings.events.max_id_length).rows


def read_users(spark: SparkSession, settings: Settings) -> DataFrame:
    """USERS rows of sources.users, one per user_id; none where it is null. Raises SourceError as attributes.users."""
    source = settings.sources.users
    if source is None:
        return spark.createDataFrame([], USERS.schema)
    return dimensions.users(spark, source, settings.events.max_id_length, settings.serving.default_user).rows


def _payloads(rows: DataFrame, kind: str, path: str) -> DataFrame:
    if kind == "jsonl":
        payload = quoted("value")
    else:
        payload = F.to_json(F.struct(*(as_text(rows, c) for c in own_columns(rows))), JSON_OPTIONS)
        if CORRUPT in rows.columns:
            # A row with too few or too many cells would be read askew: its line goes on as it is, to quarantine.
            payload = F.coalesce(quoted(CORRUPT), payload)
    return rows.select(
        payload.alias("payload"),
        F.lit(f"{kind}:{path}").alias("source"),
        F.col(POSITION).alias("position"),
        F.col(ARRIVAL).alias("arrival_time"),
    )


def _with_file(rows: DataFrame) -> DataFrame:
    """_position and _arrival_time of a stream over a Delta table; see stream_events."""
    try:
        known = rows.withColumns(origin(F.col("_metadata.file_path")))
        known.schema  # noqa: B018 - over Spark Connect only this asks whether the column exists
    except AnalysisException:
        return rows.withColumns({POSITION: F.input_file_name(), ARRIVAL: F.lit(None).cast("timestamp")})
    return known


def kafka_payloads(messages: DataFrame, topic: str) -> DataFrame:
    """The payload rows, with headers, of the messages that Spark's Kafka source gives with includeHeaders."""
    # Messages of the oldest format have no timestamp: Kafka says -1 ms. A producer that gives microseconds for
    # milliseconds is in a year that no calendar here reaches.
    known = F.col("timestamp").between(F.timestamp_seconds(F.lit(0)), F.timestamp_seconds(F.lit(_LAST_SECOND)))
    known = F.when(known, F.col("timestamp"))
    # A key may occur several times, so they are no map; bytes that are not UTF-8 become U+FFFD.
    headers = F.transform(
        "headers",
        lambda h: F.struct(
            F.make_valid_utf8(h["key"]).alias("key"), F.make_valid_utf8(h["value"].cast("string")).alias("value")
        ),
    )
    return messages.select(
        F.col("value").cast("string").alias("payload"),
        headers.alias("headers"),
        F.lit(f"kafka:{topic}").alias("source"),
        F.concat_ws("/", "topic", F.col("partition").cast("string"), F.col("offset").cast("string")).alias("position"),
        known.alias("arrival_time"),
    )


def _absolute(folder: str) -> str:
    """Delta compares it with the checkpoint's full path."""
    return folder.rstrip("/") if ":" in folder else str(Path(folder).absolute())


def local_folder(path: str) -> Path | None:
    """The folder of a stream.path that this process can list itself; None for one in an object store."""
    local = path.removeprefix("file:")
    return None if "://" in local.replace("///", "/") else Path(local)


def _make_folder(path: str) -> None:
    folder = local_folder(path)
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SourceError(f"the stream's folder {path} cannot be made ({error.strerror}); check stream.path") from error
