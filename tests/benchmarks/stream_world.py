"""Installations of any size for measuring the stream: a model learnt from some made-up users, who get namesakes."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from nightstream.runtime import settings
from nightstream.runtime.settings import Settings
from nightstream.steps import apply, ingest, publish, train
from nightstream.store import buckets
from nightstream.store.storage import Storage
from nightstream.store.tables import EVENTS, RAW_EVENTS, RECOMMENDATIONS, REFRESHES, USER_VECTORS
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

BASE = Path(__file__).resolve().parent.parent.parent / "conf" / "base.yaml"
LEARNT_FROM = 4_000
EVENTS_PER_USER = 10
NEIGHBOURS = 20
WORDS = 2_000
START = 1_700_000_000
USERS_PER_FILE = 12_500


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """A file that appears whole."""
    hidden = path.with_name(f".{path.name}")
    hidden.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    hidden.rename(path)


def made_settings(folder: Path, engine: str = "auto") -> Settings:
    """Settings of an installation below `folder`; its sources lie beside it. engine: what writes, storage.engine."""
    columns = ("event_id", "user_id", "item_id", "event_type", "event_time", "value", "retracts")
    described = {
        "events": {
            "format": "jsonl",
            "path": str(folder.parent / "events.jsonl"),
            "columns": {c: c for c in columns},
            "time_unit": "seconds",
        },
        "items": {
            "format": "jsonl",
            "path": str(folder.parent / "items.jsonl"),
            "id": "item_id",
            "title": "title",
            "text": ["title"],
            "categories": {"kind": None},
            "numbers": [],
        },
    }
    changes = {
        "storage.root": folder / "tables",
        "storage.work_dir": folder / "work",
        "storage.engine": engine,
        "stream.path": folder / "stream",
        "stream.checkpoint": folder / "checkpoint",
        "stream.max_per_trigger": 40,
        "training.epochs": 1,
    }
    document = settings.load([BASE], [f"{k}={v}" for k, v in changes.items()]).model_dump(mode="json")
    return settings.validate({**document, "sources": {**document["sources"], **described}})


def events_of(users: np.ndarray, items: int, rng: np.random.Generator, since: int) -> list[dict[str, Any]]:
    """One event per entry of `users` (numbers): popular items are taken more often, and neighbours together."""
    centre = (users * 7919) % items
    popular = (items * rng.random(len(users)) ** 3).astype(np.int64)
    near = (centre + rng.integers(0, NEIGHBOURS, len(users))) % items
    chosen = np.where(rng.random(len(users)) < 0.6, near, popular)
    return [
        {"item_id": f"i{item:06}", "event_type": "view", "event_time": since + place}
        for place, item in enumerate(chosen.tolist())
    ]


def small(spark: SparkSession, folder: Path, items: int, engine: str = "auto") -> Settings:
    """The installation of the users that the model is learnt from, after a night with a single epoch: what a model
    costs does not depend on what it has learnt."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    words = [f"word{n}" for n in range(WORDS)]
    described = [
        {"item_id": f"i{n:06}", "title": " ".join(words[w] for w in rng.integers(0, WORDS, 4)), "kind": f"k{n % 40}"}
        for n in range(items)
    ]
    write_lines(folder.parent / "items.jsonl", described)
    users = np.repeat(np.arange(LEARNT_FROM), EVENTS_PER_USER)
    rng.shuffle(users)
    rows = events_of(users, items, rng, START)
    named = [
        {**row, "event_id": f"e{n}", "user_id": f"u{u:05}-0"}
        for n, (u, row) in enumerate(zip(users, rows, strict=True))
    ]
    write_lines(folder.parent / "events.jsonl", named)
    made = made_settings(folder, engine)
    as_of = datetime(2024, 1, 1, tzinfo=UTC)
    ingest.run(spark, made)
    train.run(spark, made, as_of)
    publish.run(spark, made, as_of)
    apply.run(spark, made, as_of)
    return made


def enlarged(spark: SparkSession, origin: Settings, folder: Path, users: int) -> Settings:
    """A copy of the `small` installation with so many users: namesakes have states, lists and events alike."""
    shutil.copytree(origin.storage.root, folder / "tables")
    made = made_settings(folder, origin.storage.engine)
    storage = Storage(spark, made.storage)
    copies, files = users // LEARNT_FROM, max(2, users // USERS_PER_FILE)

    def multiplied(rows: DataFrame, *names: str) -> DataFrame:
        each = rows.withColumn("_copy", F.explode(F.sequence(F.lit(0), F.lit(copies - 1))))
        renamed = {
            n: F.concat(F.regexp_replace(n, "-0$", ""), F.lit("-"), F.col("_copy").cast("string")) for n in names
        }
        return each.withColumns(renamed).drop("_copy").repartition(files)

    for spec in (USER_VECTORS, RECOMMENDATIONS):
        rows = storage.read(spec).where("user_id <> '*'")
        buckets.lay_out(storage, spec, multiplied(rows, "user_id"), buckets.wanted(storage, users))
    for spec, names in ((EVENTS, ("user_id", "event_id", "raw_id")), (RAW_EVENTS, ("raw_id",))):
        storage.overwrite(spec, multiplied(storage.read(spec), *names))
    # What was shown before the measurement plays no part in it.
    storage.overwrite(REFRESHES, storage.read(REFRESHES).limit(0))
    return made
