"""Which events count, over frames and as SQL, and whose history a change touches."""

from __future__ import annotations

import random
from datetime import UTC, datetime

import pytest
from nightstream.ingest import history
from nightstream.store.tables import EVENTS

ARRIVAL = datetime(2026, 1, 1, tzinfo=UTC)
BACK = "taken 'back\\"  # needs quoting in SQL


def event(event_id, user="u", kind="view", retracts=None):
    return (event_id, user, "i", kind, ARRIVAL, None, retracts, "c", f"raw {event_id} {user}", ARRIVAL)


def events(spark, *rows):
    return spark.createDataFrame(list(rows), EVENTS.schema)


def ids(frame) -> list[str]:
    return sorted(r.event_id for r in frame.collect())


def test_a_retraction_is_a_tombstone_before_and_after(spark):
    for rows in ([event("e1"), event("e2"), event("r", "v", BACK, "e1")], [event("r", "v", BACK, "e1"), event("e1")]):
        assert "e1" not in ids(history.live(events(spark, *rows), BACK))
    assert ids(history.live(events(spark, event("e2"), event("r", "v", BACK, "e1"), event("f")), BACK)) == ["e2", "f"]


def test_what_was_taken_back_is_folded_under_a_type_that_enters_no_window(spark):
    rows = events(spark, event("e1"), event("e2", kind="buy"), event("r", "v", BACK, "e1"), event("s", "v", BACK, "-"))
    found = history.foldable(rows, BACK)
    assert found.columns == EVENTS.schema.names
    assert {r.event_id: r.event_type for r in found.collect()} == {"e1": BACK, "e2": "buy"}


@pytest.mark.parametrize("types", [("view",), ("it's", "view"), ("no such",)])
def test_the_query_and_the_frames_say_the_same(spark, types):
    rng = random.Random(1)
    rows = []
    for number in range(60):
        kind = rng.choice(["view", "it's", "impression", BACK])
        target = rng.choice([None, f"e{rng.randrange(60)}"]) if kind == BACK else None
        rows.append(event(f"e{number}", f"u{rng.randrange(5)}", kind, target))
    table = events(spark, *rows)
    table.createOrReplaceTempView("some_events")
    expected = history.entering(history.live(table, BACK), types)
    found = spark.sql(history.entering_sql("some_events", BACK, types))
    assert found.columns == expected.columns
    assert sorted(found.collect(), key=str) == sorted(expected.collect(), key=str)
    dead = {r[6] for r in rows if r[3] == BACK}
    assert ids(expected) == sorted(r[0] for r in rows if r[3] in types and r[0] not in dead)


def test_a_change_touches_users_of_events_and_owners_of_what_was_taken_back(spark):
    before = [event("e1", "owner"), event("e2", "other"), event("e3", "gone")]
    came = [event("n", "new"), event("r", "who takes back", BACK, "e1"), event("s", "nobody", BACK, "no such")]
    left = [event("e3", "gone"), event("t", "nobody", BACK, "e2")]
    found = history.changed_users(events(spark, *came, *left), events(spark, *before[:2], *came), BACK)
    assert sorted(r.user_id for r in found.collect()) == ["gone", "new", "other", "owner"]
