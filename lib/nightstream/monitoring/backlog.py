"""How far the stream is behind its source: what has arrived and has not been read.

Spark's progress tells it for Kafka only (and on Databricks for Delta); for the other sources it is found out here,
without a Spark job.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from pyspark.sql import SparkSession

from nightstream.ingest.formats import newest_version
from nightstream.ingest.sources import local_folder
from nightstream.runtime.settings import StreamSettings

# What sources that know their backlog call it -> our name.
_REPORTED = {"numFilesOutstanding": "backlog_files", "numBytesOutstanding": "backlog_bytes"}
_MILLISECOND = timedelta(milliseconds=1)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def reported(source: Mapping[str, Any]) -> dict[str, float]:
    """The backlog that one source of a Spark progress tells, when its micro-batch was planned; {} where it tells none.

    backlog_files, backlog_bytes: as the source counts them. backlog_offsets: Kafka's offsets that were there and did
    not get into the micro-batch, over all partitions.
    """
    sizes = {_REPORTED[name]: float(value) for name, value in source["metrics"].items() if name in _REPORTED}
    end, latest = (_offsets(source[name]) for name in ("endOffset", "latestOffset"))
    if end and latest:
        behind = (max(0, there - end.get(partition, 0)) for partition, there in latest.items())
        sizes["backlog_offsets"] = float(sum(behind))
    return sizes


def probed(
    spark: SparkSession, stream: StreamSettings, end_offset: str, last_arrival: datetime | None
) -> dict[str, float]:
    """The backlog now, for a source that does not tell it; {} where it can't be found out.

    backlog_files: visible files of a folder of JSON lines that were modified later than last_arrival, the arrival of
    the newest row read so far: Spark reads the oldest files first. A file that is moved in with an older time is read,
    but not counted here. backlog_versions: commits of a Delta table behind the one of end_offset, to which Spark has
    read. A folder in an object store is not listed.
    """
    if stream.format == "delta":
        return {"backlog_versions": float(_versions_behind(spark, stream.path, json.loads(end_offset)))}
    folder = local_folder(stream.path)
    if stream.format != "jsonl" or folder is None or last_arrival is None:
        return {}
    # Spark knows the time of a file to the millisecond.
    read_to = (last_arrival - _EPOCH) // _MILLISECOND
    with os.scandir(folder) as entries:
        seen = [entry.stat() for entry in entries if not entry.name.startswith((".", "_")) and entry.is_file()]
    return {"backlog_files": float(sum(status.st_mtime_ns // 1_000_000 > read_to for status in seen))}


def _offsets(text: str | None) -> dict[tuple[str, str], int]:
    """Kafka's {"topic": {"partition": offset}} by (topic, partition); {} for the offsets of other sources."""
    try:
        document = json.loads(text or "null")
        return {(topic, part): int(at) for topic, parts in document.items() for part, at in parts.items()}
    except (AttributeError, TypeError, ValueError):
        return {}


def _versions_behind(spark: SparkSession, path: str, end: Mapping[str, Any]) -> int:
    row = newest_version(spark, path)
    newest = row.version if row is not None else 0
    # A negative index stands for a version of which nothing has been read yet.
    return max(0, newest - int(end["reservoirVersion"]) + (int(end["index"]) < 0))
