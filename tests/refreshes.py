"""Rows of `refreshes`, made up and written without Spark, and what a key-value copy of them has to hold."""

from __future__ import annotations

import random
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
from deltalake import DeltaTable, write_deltalake
from nightstream.store.tables import REFRESHES, arrow_schema

START = datetime(2024, 1, 1, tzinfo=UTC)
VALUE = ("revision", "model_version", "as_of", "refreshed_at", "items")


def rows(revisions: Iterable[tuple[str, int]], refreshed_at: datetime | None = None, length: int = 3) -> pa.Table:
    """One row per (user, revision), whose list has so many items, in no order; by default refreshed at START."""
    made = []
    for user, revision in revisions:
        entries = [
            {
                "rank": rank,
                "item_id": f"i{revision}-{rank}",
                "score": 1 / (rank + revision),
                "strategy": "similar",
                "reason": f"weil du „{user}“ magst \\ \n",
                "because_item_id": None if rank % 2 else "i0",
            }
            for rank in range(1, length + 1)
        ]
        random.Random(revision).shuffle(entries)
        made.append(
            {
                "user_id": user,
                "revision": revision,
                "window": [],
                "seen": [],
                "seen_overflowed": False,
                "vector": [0.5],
                "model_version": f"v{revision}",
                "catalogue_version": "c",
                "as_of": START + timedelta(seconds=revision),
                "refreshed_at": refreshed_at or START,
                "items": entries,
                "writer": "test",
                "batch_id": revision,
            }
        )
    return pa.Table.from_pylist(made, arrow_schema(REFRESHES.schema))


def append(root: Path | str, made: pa.Table) -> None:
    """Append rows in one commit to the table below the folder, made where it is missing."""
    write_deltalake(f"{root}/{REFRESHES.name}", made, mode="append", configuration=REFRESHES.properties)


def newest(root: Path | str) -> dict[str, tuple[Any, ...]]:
    """User -> VALUE of the row of the highest revision, the items by rank."""
    table = DeltaTable(f"{root}/{REFRESHES.name}").to_pyarrow_table(columns=["user_id", *VALUE])
    found: dict[str, tuple[Any, ...]] = {}
    for row in table.to_pylist():
        row["items"].sort(key=lambda entry: entry["rank"])
        value = tuple(row[name] for name in VALUE)
        if row["user_id"] not in found or found[row["user_id"]][0] < value[0]:
            found[row["user_id"]] = value
    return found
