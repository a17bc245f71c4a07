"""The two protocols: what of a source may be learnt from, and which events judge the lists."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from nightstream.errors import SourceError
from nightstream.evaluation import offline
from nightstream.evaluation.offline import Lister, Served
from nightstream.ingest import ledger, sources
from nightstream.ingest.history import entering, live
from nightstream.ingest.parse import raw_rows
from nightstream.ingest.resolve import NEW, resolve
from nightstream.runtime.settings import Settings
from nightstream.serving import catalogue
from nightstream.store.tables import EVENTS
from nightstream.training import spark_job, splits

Protocol = Literal["leave-one-out", "prequential"]


@dataclass(frozen=True)
class Split:
    """A source under a protocol: every model that is compared gets the same one.

    events: all of them, with `role` under leave-one-out. history: those that may be learnt from, with `role`.
    items: ITEMS rows of the catalogue, known from descriptions and history. users: USERS rows.
    cut_micros: where prequential cuts, microseconds since the epoch; None under leave-one-out.
    """

    events: DataFrame
    history: DataFrame
    items: DataFrame
    users: DataFrame
    cut_micros: int | None


def split(spark: SparkSession, settings: Settings, protocol: Protocol) -> Split:
    """The settings' sources under the protocol. Raises SourceError where they have too few events for it."""
    events = clean_events(spark, settings).persist()
    cut = None
    if protocol == "leave-one-out":
        events = splits.leave_last_out(events).persist()
        history = events.where(F.col("role") != splits.TEST)
    else:
        cut = splits.quantile_time(events, 1 - settings.evaluation.cut_fraction)
        if cut is None:
            raise SourceError(
                f"{settings.sources.events.path} has no valid event; see its rows and sources.events.columns"
            )
        past = events.where(F.unix_micros("event_time") <= cut)
        history = splits.by_time(past, settings.training.validation_fraction, settings.training.ranking_fraction)
    if history.isEmpty() or (cut is not None and events.where(F.unix_micros("event_time") > cut).isEmpty()):
        raise SourceError(f"{settings.sources.events.path} has too few events for {protocol}; give a larger source")
    known = catalogue.known_items(sources.read_items(spark, settings), history).persist()
    return Split(events, history, known, sources.read_users(spark, settings), cut)


def fit(settings: Settings, parts: Split) -> spark_job.Fitted:
    """The model that the nightly job would learn from the history."""
    # A name of its own for each run: two evaluations side by side must not share scratch files.
    name = f"evaluation-{uuid.uuid4().hex[:12]}"
    return spark_job.fit(settings, parts.history, parts.items, parts.users, name)


def served(settings: Settings, parts: Split, files: dict[str, bytes]) -> Served:
    """A fitted model's files as what the refresh serves."""
    return Served(
        catalogue.bundle_of("evaluation", files, parts.items),
        parts.users,
        settings.window.length,
        settings.events.window_types,
    )


def judged(parts: Split, lister: Lister, delays_s: Sequence[float]) -> DataFrame:
    """One row per test event, and under prequential per delay (seconds), with its list; see evaluation."""
    if parts.cut_micros is None:
        return offline.leave_one_out(parts.events, lister)
    return offline.prequential(parts.events, parts.cut_micros, delays_s, lister)


def clean_events(spark: SparkSession, settings: Settings) -> DataFrame:
    """The source's valid, distinct, live events that enter a window, made by the functions that ingest uses.

    Event ids are preceded by crc32 of "user_id/item_id", so that ties in time are broken by it whatever ids the source
    has. Raises SourceError for a source without a valid event.
    """
    rules = settings.events
    parsed = raw_rows(ledger.parsed(sources.read_events(spark, settings.sources.events), settings))
    nothing = spark.createDataFrame([], EVENTS.schema)
    distinct = resolve(parsed.where(F.col("reason").isNull()), nothing).where(F.col("outcome") == NEW)
    tie = F.lpad(F.crc32(F.concat("user_id", F.lit("/"), "item_id")).cast("string"), 10, "0")
    events = entering(live(distinct.select(*EVENTS.schema.names), rules.retraction_type), rules.window_types)
    return events.withColumn("event_id", F.concat(tie, F.lit("/"), "event_id"))


def write_predictions(rows: DataFrame, target: str) -> None:
    """One Parquet file at `target` if it ends in .parquet and is local, written beside and renamed; else a folder."""
    if not target.endswith(".parquet") or "://" in target:
        rows.write.mode("overwrite").parquet(target)
        return
    beside = Path(f"{target}.{uuid.uuid4().hex[:8]}")
    rows.coalesce(1).write.parquet(str(beside))
    (part,) = beside.glob("part-*.parquet")
    os.replace(part, target)
    shutil.rmtree(beside)
