"""How old each list is against its user's newest event: one definition, as frame, as command and as view."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from nightstream.errors import NightstreamError, TableError
from nightstream.ingest.history import live
from nightstream.monitoring.freshness import freshness, make_view, summary
from nightstream.runtime.settings import validate
from nightstream.steps import freshness as step
from nightstream.store.storage import Storage
from nightstream.store.tables import EVENTS, RECOMMENDATIONS, USER_VECTORS
from pyspark.sql import functions as F

DAY = datetime(2026, 3, 1, tzinfo=UTC)
LENGTH = 3
AWAY = "it's"  # a type that needs quoting, and that enters no window


def at(hours: float) -> datetime:
    return DAY + timedelta(hours=hours)


def event(user, name, hours, kind="view", retracts=None):
    return (name, user, "i", kind, at(hours), None, retracts, name, name, DAY)


def state(user, window, revision=2):
    """A state whose window holds (event, hours)."""
    entries = [(at(hours), name, name, "i", "view", None) for name, hours in window]
    as_of = entries[-1][0] if entries else None
    return (user, revision, entries, [], False, [1.0], "m1", "c1", as_of, at(100), 1)


def ranks(user, hours, revision=2):
    as_of = None if hours is None else at(hours)
    told = (revision, "m1", "c1", as_of, at(100), 1)
    return [(user, rank, "i", 1.0, "sequence", "why", None, *told) for rank in (1, 2)]


EVENT_ROWS = [
    event("fresh", "f1", 1),
    event("fresh", "f2", 2),
    event("fresh", "f3", 3, kind=AWAY),  # later, but it enters no window
    event("behind", "b1", 1),
    event("behind", "b2", 3.5),
    event("late", "l1", 1),  # older than what the list has
    event("late", "l2", 2),
    *[event("full", f"x{n}", n) for n in range(5)],
    *[event("inside", f"y{n}", n) for n in range(4)],
    event("taken back", "t1", 1),
    event("taken back", "t2", 2),
    event("taken back", "t3", 9, kind="retract", retracts="t2"),
    event("newcomer", "n1", 1),
    event("unmerged", "u1", 1),
]
STATES = [
    state("fresh", [("f1", 1), ("f2", 2)]),
    state("behind", [("b1", 1)]),
    state("late", [("l2", 2)]),
    state("full", [("x2", 2), ("x3", 3), ("x4", 4)]),
    state("inside", [("y0", 0), ("y1", 1), ("y3", 3)]),
    state("taken back", [("t1", 1), ("t2", 2)]),
    state("unmerged", [("u1", 1)]),
    state("idle", []),
    state("*", []),
]
LISTS = [
    *ranks("fresh", 2),
    *ranks("behind", 1),
    *ranks("late", 2),
    *ranks("full", 4),
    *ranks("inside", 3),
    *ranks("taken back", 2),
    *ranks("unmerged", None, revision=1),
    *ranks("idle", None),
    *ranks("*", None),
]
# user -> age in hours, stale
EXPECTED = {
    "fresh": (0, False),
    "behind": (2.5, True),
    "late": (0, True),
    "full": (0, False),
    "inside": (0, True),
    "taken back": (-1, True),
    "newcomer": (None, True),
    "unmerged": (None, True),
    "idle": (None, False),
    "*": (None, False),
}


def filled(storage):
    for spec, rows in ((EVENTS, EVENT_ROWS), (USER_VECTORS, STATES), (RECOMMENDATIONS, LISTS)):
        storage.append(spec, storage.spark.createDataFrame(rows, spec.schema).coalesce(1))
    return storage


@pytest.fixture
def own(settings):
    """Settings with a short window and an event type that enters none."""
    document = settings.model_dump(mode="json")
    document["events"] |= {"types": ["view", AWAY]}
    document["window"]["length"] = LENGTH
    return validate(document)


def judged(rows):
    return {r.user_id: (None if r.age_s is None else r.age_s / 3600, r.stale) for r in rows.collect()}


def test_a_stale_list_is_told_from_a_fresh_one(spark, storage, own):
    filled(storage)
    rows = freshness(storage, own).cache()
    assert judged(rows) == EXPECTED
    newest = live(storage.read(EVENTS), own.events.retraction_type).where("event_type = 'view'")
    newest = newest.groupBy("user_id").agg(F.max("event_time").alias("newest_event"))
    assert set(newest.collect()) == set(rows.where("newest_event IS NOT NULL").select(*newest.columns).collect())
    assert {(r.model_version, r.refreshed_at is None) for r in rows.collect()} == {("m1", False), (None, True)}
    found = summary(rows)
    assert (found["freshness_users"], found["freshness_stale_share"]) == (10, 0.6)
    assert (found["freshness_age_p50_s"], found["freshness_age_max_s"]) == (0, 9000)

    # The command tells the same.
    told = step.run(spark, own, worst=2)
    assert [r["user_id"] for r in told["worst"]] == ["behind", "inside"]
    assert told["freshness_users"] == 10
    assert step.run(spark, own, user="behind") == {
        "user_id": "behind",
        "newest_event": "2026-03-01T03:30:00.000Z",
        "as_of": "2026-03-01T01:00:00.000Z",
        "age_s": 9000.0,
        "stale": True,
        "refreshed_at": "2026-03-05T04:00:00.000Z",
        "model_version": "m1",
    }
    with pytest.raises(NightstreamError, match="the user nobody has neither events nor a list"):
        step.run(spark, own, user="nobody")


def test_without_tables_it_says_what_to_run(storage, own):
    with pytest.raises(TableError, match="run the nightly job first"):
        freshness(storage, own)


def test_a_catalog_has_it_as_a_view(spark, own):
    document = own.model_dump(mode="json")
    document["storage"] |= {"kind": "catalog", "root": "fresh_catalog"}
    named = validate(document)
    spark.sql("CREATE DATABASE fresh_catalog")
    try:
        storage = Storage(spark, named.storage)
        make_view(storage, named)
        assert spark.table("fresh_catalog.freshness").isEmpty()
        filled(storage)
        make_view(storage, named)
        assert judged(spark.table("fresh_catalog.freshness")) == EXPECTED
    finally:
        spark.sql("DROP DATABASE fresh_catalog CASCADE")
