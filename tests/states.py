"""What serves, read from the tables, and when two such states count as the same."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from nightstream import catalogue, layers, registry
from nightstream.settings import Settings
from nightstream.storage import Storage
from nightstream.tables import RECOMMENDATIONS, REFRESHES, USER_VECTORS
from pyspark.sql import functions as F

NOW = datetime(2024, 6, 1, tzinfo=UTC)
NEAR = 1e-5


def state_of(storage: Storage) -> tuple[dict, dict]:
    """Per user (vector, window, seen, as_of), and per user the list of (rank, item, score)."""
    vectors = {
        r.user_id: (
            np.array(r.vector),
            [(e.event_id, e.item_id, e.event_time) for e in r.window],
            [(s.item_id, s.event_time) for s in r.seen],
            r.as_of,
        )
        for r in storage.read(USER_VECTORS).collect()
    }
    lists: dict = {}
    for r in storage.read(RECOMMENDATIONS).orderBy("user_id", "rank").collect():
        lists.setdefault(r.user_id, []).append((r.rank, r.item_id, r.score))
    return vectors, lists


def assert_same(left: Storage, right: tuple[dict, dict]) -> None:
    """Equal states; vectors within 1e-5; two items may swap only where their scores lie closer than that."""
    (vectors, lists), (other_vectors, other_lists) = state_of(left), right
    assert vectors.keys() == other_vectors.keys()
    for user, (vector, *state) in vectors.items():
        assert state == list(other_vectors[user][1:]), user
        np.testing.assert_allclose(vector, other_vectors[user][0], atol=NEAR)
    assert lists.keys() == other_lists.keys()
    for user, rows in lists.items():
        others = other_lists[user]
        assert [r[0] for r in rows] == [r[0] for r in others] == list(range(1, len(rows) + 1))
        np.testing.assert_allclose([r[2] for r in rows], [r[2] for r in others], atol=NEAR)
        scores = {item: score for _, item, score in others}
        for _, item, score in rows:
            # An item that only one list has must tie with the end of the other.
            assert abs(scores.get(item, others[-1][2]) - score) < NEAR, (user, item)


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
    payload = catalogue.load_payload(copy, registry.published(copy).model_version)
    layers.apply_all(copy, settings, payload, "recomputation", 0, NOW)
    return state_of(copy)
