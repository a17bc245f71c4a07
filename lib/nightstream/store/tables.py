"""The tables: one TableSpec each, and nothing else in the project knows a schema."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pyspark.sql import types as T
from pyspark.sql.pandas.types import to_arrow_schema

from nightstream.errors import TableError


def _struct(**fields: T.DataType) -> T.StructType:
    return T.StructType([T.StructField(name, kind) for name, kind in fields.items()])


STRING, LONG, INT, DOUBLE = T.StringType(), T.LongType(), T.IntegerType(), T.DoubleType()
TIME, BOOL, BINARY = T.TimestampType(), T.BooleanType(), T.BinaryType()
_SMALL = (T.StringType, T.LongType, T.IntegerType, T.DoubleType, T.TimestampType)
_LONG_TEXTS = ("payload", "position", "title", "text", "reason", "settings", "history")
_PERSONAL = ("user_id", "item_id", "because_item_id")
_IDENTIFIERS = (*_PERSONAL, "event_id", "retracts", "raw_id", "kept_raw_id", "content_hash")
_PARTITION = "bucket"  # Delta refuses statistics of it
VECTOR = T.ArrayType(T.FloatType(), containsNull=False)
CATEGORIES = T.MapType(STRING, T.ArrayType(STRING))
NUMBERS = T.MapType(STRING, DOUBLE)

HEADERS = T.ArrayType(_struct(key=STRING, value=STRING))

# One event inside a window. event_time and event_id lead because structs compare field by field:
# the order of a window is (event_time, event_id).
WINDOW_EVENT = _struct(
    event_time=TIME, event_id=STRING, content_hash=STRING, item_id=STRING, event_type=STRING, value=DOUBLE
)
WINDOW = T.ArrayType(WINDOW_EVENT, containsNull=False)
SEEN = T.ArrayType(_struct(event_time=TIME, item_id=STRING), containsNull=False)
LIST_ENTRY = _struct(rank=INT, item_id=STRING, score=DOUBLE, strategy=STRING, reason=STRING, because_item_id=STRING)


def arrow_schema(schema: T.StructType) -> pa.Schema:
    """The schema in Arrow's types, in which rows are on the driver and in workers: times in microseconds, UTC."""
    return to_arrow_schema(schema, timezone="UTC")


def arrow_table(schema: T.StructType, rows: Sequence[tuple[Any, ...]]) -> pa.Table:
    """Rows of Python values, in the order of the columns, in Arrow's types; one or more."""
    kinds = arrow_schema(schema)
    columns = zip(kinds, zip(*rows, strict=True), strict=True)
    # Arrow takes a map as a list of pairs.
    arrays = [pa.array([list(v.items()) if isinstance(v, dict) else v for v in c], f.type) for f, c in columns]
    return pa.table(arrays, kinds)


@dataclass(frozen=True)
class TableSpec:
    """Name, schema, keys and grain of one Delta table. keys: the columns that identify a row."""

    name: str
    grain: str
    schema: T.StructType
    keys: tuple[str, ...]

    @property
    def properties(self) -> dict[str, str]:
        """Delta table properties: no deletion vectors, which DuckDB and delta-rs cannot read, no identifiers in the
        column statistics, where they would outlive the deletion of their rows, and rarer checkpoints."""
        silent = (*_IDENTIFIERS, *_LONG_TEXTS, _PARTITION)
        counted = [f.name for f in self.schema if isinstance(f.dataType, _SMALL) and f.name not in silent]
        statistics = {"delta.dataSkippingStatsColumns": ",".join(counted)}
        if not counted:
            statistics = {"delta.dataSkippingNumIndexedCols": "0"}
        return {
            "delta.enableDeletionVectors": "false",
            # A checkpoint costs a micro-batch as much as several appends.
            "delta.checkpointInterval": "50",
            **statistics,
        }

    def check(self, columns: Iterable[str]) -> None:
        """Raise TableError, naming the missing and the present columns, unless every column of the spec is there."""
        present = list(columns)
        missing = [f.name for f in self.schema if f.name not in present]
        if missing:
            raise TableError(
                f"table {self.name} lacks the column(s) {', '.join(missing)} (present: {', '.join(present)}); "
                "it was written by another version, migrate it or point storage.root to a new place"
            )


RAW_EVENTS = TableSpec(
    "raw_events",
    "one payload as it arrived: payload_bytes where it is not UTF-8, headers where it is a message that has some",
    _struct(
        raw_id=STRING,
        payload=STRING,
        payload_bytes=BINARY,
        headers=HEADERS,
        source=STRING,
        position=STRING,
        arrival_time=TIME,
    ),
    ("raw_id",),
)
EVENTS = TableSpec(
    "events",
    "one valid, cleaned, distinct event",
    _struct(
        event_id=STRING,
        user_id=STRING,
        item_id=STRING,
        event_type=STRING,
        event_time=TIME,
        value=DOUBLE,
        retracts=STRING,
        content_hash=STRING,
        raw_id=STRING,
        arrival_time=TIME,
    ),
    ("event_id",),
)
QUARANTINE = TableSpec(
    "quarantine",
    "one rejected payload, with the reason and the field that caused it",
    _struct(raw_id=STRING, payload=STRING, source=STRING, arrival_time=TIME, reason=STRING, field=STRING),
    ("raw_id",),
)
DUPLICATES = TableSpec(
    "duplicates",
    "one payload whose event was, or has become, a repetition of another",
    _struct(raw_id=STRING, event_id=STRING, kept_raw_id=STRING, arrival_time=TIME),
    ("raw_id",),
)
ITEMS = TableSpec(
    "items",
    "one item of the catalogue: display title, text, categories, numbers",
    _struct(item_id=STRING, title=STRING, text=STRING, categories=CATEGORIES, numbers=NUMBERS, available=BOOL),
    ("item_id",),
)
USERS = TableSpec(
    "users",
    "one known user: categories and numbers",
    _struct(user_id=STRING, categories=CATEGORIES, numbers=NUMBERS),
    ("user_id",),
)
ITEM_EMBEDDINGS = TableSpec(
    "item_embeddings",
    "one item under one model version: its vector, and the hash of the content that it was made from",
    _struct(model_version=STRING, item_id=STRING, vector=VECTOR, from_content=BOOL, content_hash=STRING),
    ("model_version", "item_id"),
)
_STATE = {
    "user_id": STRING,
    "revision": LONG,
    "window": WINDOW,
    "seen": SEEN,
    "seen_overflowed": BOOL,
    "vector": VECTOR,
    "model_version": STRING,
    "catalogue_version": STRING,
    "as_of": TIME,
    "refreshed_at": TIME,
}
REFRESHES = TableSpec(
    "refreshes",
    "one refreshed user in one micro-batch or night: state, list and versions; append-only",
    _struct(**_STATE, items=T.ArrayType(LIST_ENTRY, containsNull=False), writer=STRING, batch_id=LONG),
    ("user_id", "revision"),
)
# What the refresh computes for a user: a row of refreshes before it is committed, and the seen entries that no longer
# fit into the state.
REFRESHED = T.StructType(
    [
        *[f for f in REFRESHES.schema if f.name not in ("refreshed_at", "writer", "batch_id")],
        T.StructField("overflow", SEEN),
    ]
)
SEEN_OVERFLOW = TableSpec(
    "seen_overflow",
    "one consumed item that no longer fits into its user's state; repeated rows mean the same as one",
    _struct(user_id=STRING, item_id=STRING, event_time=TIME),
    ("user_id", "item_id", "event_time"),
)
# bucket: see buckets.py.
USER_VECTORS = TableSpec(
    "user_vectors", "one user: window, seen items, vector", _struct(**_STATE, bucket=INT), ("user_id",)
)
RECOMMENDATIONS = TableSpec(
    "recommendations",
    "one user and rank: the serving table",
    _struct(
        user_id=STRING,
        rank=INT,
        item_id=STRING,
        score=DOUBLE,
        strategy=STRING,
        reason=STRING,
        because_item_id=STRING,
        revision=LONG,
        model_version=STRING,
        catalogue_version=STRING,
        as_of=TIME,
        refreshed_at=TIME,
        bucket=INT,
    ),
    ("user_id", "rank"),
)
MODELS = TableSpec(
    "models",
    "one step in the life of a model version (trained, rejected, published); the newest published row is the one that "
    "serves",
    _struct(model_version=STRING, status=STRING, at=TIME, settings=STRING, metrics=STRING, history=STRING),
    ("model_version", "status", "at"),
)
MODEL_ARTIFACTS = TableSpec(
    "model_artifacts",
    "one part of at most 32 MB of one file of one model version",
    _struct(model_version=STRING, file=STRING, part=INT, parts=INT, sha256=STRING, content=BINARY),
    ("model_version", "file", "part"),
)
METRICS = TableSpec(
    "metrics",
    "one measurement",
    _struct(name=STRING, value=DOUBLE, model_version=STRING, labels=T.MapType(STRING, STRING), at=TIME),
    ("name", "model_version", "at"),
)
WRITER_LEASE = TableSpec(
    "writer_lease",
    "the one row that says which process may write the serving tables, and until when",
    _struct(name=STRING, holder=STRING, kind=STRING, token=STRING, expires_at=TIME),
    ("name",),
)
UNFOLDED = TableSpec(
    "unfolded",
    "one batch ingest whose events may not be in the windows yet: applied by the night, or by a stream when it starts",
    _struct(source=STRING, at=TIME, events_version=LONG),
    ("at",),
)

ALL = (
    RAW_EVENTS,
    EVENTS,
    QUARANTINE,
    DUPLICATES,
    ITEMS,
    USERS,
    ITEM_EMBEDDINGS,
    REFRESHES,
    SEEN_OVERFLOW,
    USER_VECTORS,
    RECOMMENDATIONS,
    MODELS,
    MODEL_ARTIFACTS,
    METRICS,
    WRITER_LEASE,
    UNFOLDED,
)
# What the holder of the lease alone writes.
FENCED = (
    RAW_EVENTS,
    EVENTS,
    QUARANTINE,
    DUPLICATES,
    REFRESHES,
    SEEN_OVERFLOW,
    USER_VECTORS,
    RECOMMENDATIONS,
    UNFOLDED,
)
BY_NAME = {spec.name: spec for spec in ALL}
