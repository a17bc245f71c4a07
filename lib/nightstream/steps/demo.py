"""The whole system on MovieLens-100k: a night on the first part of the events, then the rest as a live stream."""

from __future__ import annotations

import logging
import shutil
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from nightstream.errors import NightstreamError
from nightstream.evaluation import offline
from nightstream.evaluation.offline import Served
from nightstream.files import write_atomically
from nightstream.ingest.history import live
from nightstream.monitoring import report
from nightstream.monitoring.measurements import percentile
from nightstream.runtime import console
from nightstream.runtime.session import is_remote
from nightstream.runtime.settings import Settings, validate
from nightstream.serving import catalogue
from nightstream.steps import nightly, serve
from nightstream.steps.demo_feed import Feed, LiveLine, cut_source
from nightstream.store import registry
from nightstream.store.storage import Storage
from nightstream.store.tables import EVENTS, ITEMS, RECOMMENDATIONS, USER_VECTORS, USERS

EVENTS_PER_FILE = 10
SHOWN = 10


def run(spark: SparkSession, settings: Settings, as_of: datetime, replay_seconds: float = 120.0) -> dict[str, Any]:
    """MovieLens-100k from end to end, in a folder `demo` beside storage.root, which is made anew.

    replay_seconds: over how long the feed spreads the replayed events.
    Raises NightstreamError over Spark Connect.
    """
    if is_remote(spark):
        raise NightstreamError(
            "the demo follows its stream in this process, and over Spark Connect micro-batches run on the server; "
            "run it with spark.remote: null"
        )
    begun = time.monotonic()
    # The bars and the live line tell the story here, without a terminal the console's lines.
    logging.getLogger("nightstream").setLevel(logging.WARNING)
    logging.getLogger(console.__name__).setLevel(logging.INFO)
    home = Path(settings.storage.root).parent / "demo"
    shutil.rmtree(home, ignore_errors=True)
    local = _at(settings, home)
    with console.step("cutting MovieLens-100k at 90 % of its events by time"):
        cut = cut_source(settings.sources.events, settings.evaluation.cut_fraction, Path(local.sources.events.path))
    console.say(f"{cut.before:,} events for the night, {len(cut.after):,} to replay live")
    night = nightly.run(spark, local, as_of)
    storage = Storage(spark, local.storage)
    example = _example_user(storage, cut.after_users)
    before = _list_of(storage, example)
    feed = Feed(cut.after, Path(local.stream.path), EVENTS_PER_FILE, replay_seconds)
    with LiveLine(len(cut.after)) as line, feed:
        streamed = serve.run(
            spark,
            local,
            on_batch=line.update,
            on_start=feed.begin,
            stop=lambda: feed.done and line.events >= len(cut.after),
        )
    with console.step("measuring what the lists would have been worth at other delays (prequential evaluation)"):
        quality = _quality(storage, local, cut.cut_micros)
    example_page = {
        "user_id": example,
        "before": before,
        "after": _list_of(storage, example),
        "window": _window_of(storage, example),
    }
    version = registry.published(storage)
    summary = {
        "ingest": night["ingest"],
        "stream": {**streamed, "events_replayed": len(cut.after)},
        "delays": line.delays,
        "metrics": version.metrics,
        "seconds": time.monotonic() - begun,
    }
    page = home / "report.html"
    write_atomically(page, report.demo_report(version.history, quality, example_page, summary).encode())
    _print(storage, quality, line, page, summary)
    return {"quality": quality, "stream": streamed, "report": str(page), "seconds": summary["seconds"]}


def _at(settings: Settings, home: Path) -> Settings:
    """The same settings with all that the demo writes below `home`."""
    document = settings.model_dump(mode="json")
    document["storage"] |= {"root": str(home / "tables"), "work_dir": str(home / "work")}
    document["stream"] |= {"format": "jsonl", "path": str(home / "stream"), "checkpoint": str(home / "checkpoint")}
    document["sources"]["events"]["path"] = str(home / "night.inter")
    return validate(document)


def _quality(storage: Storage, settings: Settings, cut_micros: int) -> list[dict[str, Any]]:
    """The prequential evaluation of the published model over the replayed events, as they came to lie in `events`."""
    version = registry.published(storage).model_version
    bundle = catalogue.load_bundle(storage, version)
    events = live(storage.read(EVENTS), settings.events.retraction_type)
    served = Served(bundle, storage.read(USERS), settings.window.length, settings.events.window_types)
    rows = offline.prequential(events, cut_micros, settings.evaluation.delays_seconds, served)
    return offline.scores(rows, len(bundle.load().catalogue))


def _example_user(storage: Storage, replayed: dict[str, int]) -> str:
    """A user whom the night knows and for whom the stream changes much: the most replayed events among the known."""
    for user, _ in sorted(replayed.items(), key=lambda pair: (-pair[1], pair[0])):
        known = storage.read(USER_VECTORS).where((F.col("user_id") == user) & (F.size("window") > 0))
        if not known.isEmpty():
            return user
    return next(iter(replayed))


def _list_of(storage: Storage, user: str) -> list[dict[str, Any]]:
    mine = storage.read(RECOMMENDATIONS).where(F.col("user_id") == user)
    rows = _titled(storage, mine, "item_id").orderBy("rank").limit(SHOWN)
    return [r.asDict() for r in rows.select("rank", "item_id", "title", "score", "strategy", "reason").collect()]


def _window_of(storage: Storage, user: str) -> list[dict[str, Any]]:
    mine = (
        storage.read(USER_VECTORS).where(F.col("user_id") == user).select(F.explode("window").alias("e")).select("e.*")
    )
    rows = _titled(storage, mine, "item_id").orderBy(F.desc("event_time"), F.desc("event_id")).limit(SHOWN)
    return [r.asDict() for r in rows.select("event_time", "item_id", "title", "event_type", "value").collect()]


def _titled(storage: Storage, rows: DataFrame, key: str) -> DataFrame:
    titles = storage.read(ITEMS).select(F.col("item_id").alias(key), "title")
    return rows.join(titles, key, "left").withColumn("title", F.coalesce("title", key))


def _print(
    storage: Storage, quality: list[dict[str, Any]], line: LiveLine, page: Path, summary: dict[str, Any]
) -> None:
    out = console.stdout
    title = "Prequential quality on the replayed events, by how late the state knows an event"
    out.print(console.quality_table(quality, title))
    stream = summary["stream"]
    median, late = (percentile(line.delays, share) for share in (50, 95))
    out.print(
        f"stream: {stream['events']:,} events in {stream['batches']} micro-batches, {stream['users']:,} refreshes, "
        f"event in the source → visible p50 {median:.1f} s, p95 {late:.1f} s"
    )
    out.print(f"the whole demo took {summary['seconds']:.0f} s")
    out.print("Delta tables:")
    for spec in (EVENTS, ITEMS, USER_VECTORS, RECOMMENDATIONS):
        out.print(f"  {storage.location(spec)}", soft_wrap=True)
    out.print("read the serving table with DuckDB:")
    out.print(f"  {sql_line(storage.location(RECOMMENDATIONS))}", soft_wrap=True, markup=False)
    out.print(f"report: {page}", soft_wrap=True)


def sql_line(location: str) -> str:
    """A shell line that reads the serving table without Spark."""
    query = "SELECT user_id, rank, item_id, score, reason FROM t ORDER BY user_id, rank LIMIT 10"
    table = f"t = deltalake.DeltaTable('{location}').to_pyarrow_dataset()"
    return f".venv/bin/python -c \"import duckdb, deltalake; {table}; duckdb.sql('{query}').show()\""
