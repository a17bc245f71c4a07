"""Measure recommendation quality on any source that ingest reads, through the refresh that serves."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from nightstream import catalogue, evaluation, fitting, progress, sources, splits
from nightstream.errors import SourceError
from nightstream.evaluation import Served
from nightstream.events import NEW, live, parse, raw_rows, resolve
from nightstream.learning_files import write_atomically
from nightstream.payload import Payload, encode_catalogue
from nightstream.settings import Settings
from nightstream.tables import EVENTS

Protocol = Literal["leave-one-out", "prequential"]


def run(
    spark: SparkSession,
    settings: Settings,
    protocol: Protocol,
    predictions: str | None = None,
    delays: Sequence[float] | None = None,
    json_out: str | None = None,
) -> dict[str, Any]:
    """Train on what the protocol allows and score the rest. No table is read or written.

    leave-one-out: each user's last event is the test, the one before is validation, the third-last trains the ranker.
    prequential: the newest `evaluation.cut_fraction` of the events by time is replayed event by event.
    predictions: a Parquet file or folder to write the lists to. json_out: a file for the scores.
    Returns {"protocol", "scores", "metrics"}; see evaluation.scores.
    """
    events = clean_events(spark, settings).persist()
    items = sources.read_items(spark, settings)
    users = sources.read_users(spark, settings)
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
    known = catalogue.known_items(items, history).persist()
    # A name of its own for each run: two evaluations side by side must not share scratch files.
    fitted = fitting.fit(settings, history, known, users, f"evaluation-{uuid.uuid4().hex[:12]}")
    payload = _payload(fitted.files, known)
    served = Served(payload, users, settings.window.length, settings.events.window_types)
    if cut is None:
        rows = evaluation.leave_one_out(events, served)
    else:
        rows = evaluation.prequential(events, cut, delays or settings.evaluation.delays_seconds, served)
    rows = rows.persist()
    found = evaluation.scores(rows, known.count())
    if predictions is not None:
        write_predictions(evaluation.predictions(rows), predictions)
    progress.console.print(progress.quality_table(found, f"{protocol} on {settings.sources.events.path}"))
    result = {"protocol": protocol, "scores": found, "metrics": fitted.metrics}
    if json_out is not None:
        write_atomically(json_out, json.dumps(result, indent=2).encode())
    return result


def clean_events(spark: SparkSession, settings: Settings) -> DataFrame:
    """The source's valid, distinct, live events that enter a window, made by the functions that ingest uses.

    Event ids are preceded by crc32 of "user_id/item_id", so that ties in time are broken by it whatever ids the source
    has. Raises SourceError for a source without a valid event.
    """
    source, rules = settings.sources.events, settings.events
    payloads = sources.read_events(spark, source)
    parsed = raw_rows(parse(payloads, source.columns, source.time_unit, rules, settings.serving.default_user))
    nothing = spark.createDataFrame([], EVENTS.schema)
    distinct = resolve(parsed.where(F.col("reason").isNull()), nothing).where(F.col("outcome") == NEW)
    tie = F.lpad(F.crc32(F.concat("user_id", F.lit("/"), "item_id")).cast("string"), 10, "0")
    events = live(distinct.select(*EVENTS.schema.names), rules.retraction_type)
    events = events.where(F.col("event_type").isin(*rules.window_types))
    return events.withColumn("event_id", F.concat(tie, F.lit("/"), "event_id"))


def _payload(files: dict[str, bytes], items: DataFrame) -> Payload:
    """A payload that no table holds: the fitted model with the embeddings of `items`, bounded by the catalogue."""
    encoder = Payload("evaluation", uuid.uuid4().hex, files, catalogue.NO_ITEMS)
    embedded = catalogue.embed(items, encoder).select("item_id", "vector")
    table = items.join(embedded, "item_id").select("item_id", "title", "available", "vector").toArrow()
    return Payload("evaluation", encoder.catalogue_version + "+", files, encode_catalogue(table))


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
