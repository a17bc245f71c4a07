"""What serves, read from the tables, and when two such states count as the same."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from nightstream.runtime.settings import Settings
from nightstream.serving import batch_layer, catalogue
from nightstream.store import registry
from nightstream.store.storage import Storage
from nightstream.store.tables import RECOMMENDATIONS, REFRESHES, USER_VECTORS
from pyspark.sql import functions as F

NOW = datetime(2024, 6, 1, tzinfo=UTC)
NEAR = 1e-5
# How often a user was refreshed, when and under which catalogue depends on the cut of the stream (a new catalogue
# refreshes again only who has a withdrawn item in the list), and the bucket on the number of users at a night.
OF_THE_WRITING = ("revision", "refreshed_at", "catalogue_version", "bucket")


def state_of(storage: Storage) -> tuple[dict, dict]:
    """Per user the row of user_vectors, and per user the rows of the list by rank; without OF_THE_WRITING."""
    vectors = {}
    for r in storage.read(USER_VECTORS).drop(*OF_THE_WRITING).collect():
        row = r.asDict(recursive=True)
        vectors[row.pop("user_id")] = row
    lists: dict = {}
    for r in storage.read(RECOMMENDATIONS).drop(*OF_THE_WRITING).orderBy("user_id", "rank").collect():
        row = r.asDict()
        lists.setdefault(row.pop("user_id"), []).append(row)
    return vectors, lists


def assert_same(left: Storage, right: tuple[dict, dict]) -> None:
    """Equal states; vectors within 1e-5; two items may swap only where their scores lie closer than that."""
    (vectors, lists), (other_vectors, other_lists) = state_of(left), right
    assert vectors.keys() == other_vectors.keys()
    for user, row in vectors.items():
        other = other_vectors[user]
        differing = {c: (row[c], other[c]) for c in row if c != "vector" and row[c] != other[c]}
        assert not differing, (user, differing)
        np.testing.assert_allclose(row["vector"], other["vector"], atol=NEAR)
    assert lists.keys() == other_lists.keys()
    for user, rows in lists.items():
        others = other_lists[user]
        assert [r["rank"] for r in rows] == [r["rank"] for r in others] == list(range(1, len(rows) + 1))
        np.testing.assert_allclose([r["score"] for r in rows], [r["score"] for r in others], atol=NEAR)
        by_item = {r["item_id"]: r for r in others}
        for row in rows:
            # An item that only one list has must tie with the end of the other.
            other = by_item.get(row["item_id"], others[-1])
            assert abs(other["score"] - row["score"]) < NEAR, (user, row)
            if other["item_id"] == row["item_id"]:
                placed = {"rank": None, "score": None}
                assert {**row, **placed} == {**other, **placed}, user


def assert_merged(storage: Storage) -> None:
    """Every refresh is committed once, and what serves is the newest that was committed."""
    commits = storage.read(REFRESHES).groupBy("user_id", "revision").count()
    assert commits.where("count > 1").isEmpty()
    newest = {r.user_id: r[1] for r in storage.read(REFRESHES).groupBy("user_id").agg(F.max("revision")).collect()}
    assert newest == {r.user_id: r.revision for r in storage.read(USER_VECTORS).collect()}
    listed = storage.read(RECOMMENDATIONS).select("user_id", "revision", "model_version").distinct().collect()
    assert len(listed) == len({r.user_id for r in listed})
    assert all(newest[r.user_id] == r.revision for r in listed)


def recomputed(storage: Storage, settings: Settings, folder: Path) -> tuple[dict, dict]:
    """The state that one batch over all events, under the published model, gives; computed in a copy of the tables
    below `folder`."""
    shutil.copytree(settings.storage.root, folder / "tables")
    copy = Storage(storage.spark, settings.storage.model_copy(update={"root": str(folder / "tables")}))
    bundle = catalogue.load_bundle(copy, registry.published(copy).model_version)
    batch_layer.apply_all(copy, settings, bundle, "recomputation", 0, NOW)
    return state_of(copy)
