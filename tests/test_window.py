"""The fold against a slow, obvious reference, in any order, repetition and split."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nightstream.tables import EVENTS, USER_VECTORS
from nightstream.window import fold

EPOCH = datetime(2024, 1, 1, tzinfo=UTC)
LENGTH, SEEN_LIMIT = 4, 5
STATE = ["user_id", "revision", "window", "seen", "seen_overflowed"]

# Few ids, items and times, so that repetitions, ties and changed events are common.
event = st.tuples(
    st.integers(0, 9),
    st.integers(0, 3),
    st.integers(0, 7),
    st.integers(0, 5),
    st.sampled_from(["view", "view", "impression"]),
)
scenario = st.tuples(st.lists(event, max_size=14), st.integers(0, 2**32))


def rows_of(user: str, events: list[tuple]) -> list[tuple]:
    return [
        (
            f"e{number}",
            user,
            f"i{item}",
            kind,
            EPOCH + timedelta(seconds=second),
            1.0,
            None,
            f"h{content}",
            "raw",
            EPOCH,
        )
        for number, content, second, item, kind in events
    ]


def reference(events: list[tuple]) -> tuple[list, list, bool]:
    """Window, seen and overflow flag by the words of the definition."""
    viewed = [e for e in events if e[4] == "view"]
    by_id: dict[int, tuple] = {}
    for e in viewed:
        if e[0] not in by_id or (e[2], f"h{e[1]}") > (by_id[e[0]][2], f"h{by_id[e[0]][1]}"):
            by_id[e[0]] = e
    window = sorted(by_id.values(), key=lambda e: (e[2], f"e{e[0]}"))[-LENGTH:]
    newest: dict[int, int] = {}
    for e in viewed:
        newest[e[3]] = max(newest.get(e[3], 0), e[2])
    seen = sorted((second, f"i{item}") for item, second in newest.items())
    return [(f"e{e[0]}", e[2]) for e in window], seen[-SEEN_LIMIT:], len(seen) > SEEN_LIMIT


def folded(spark, states, events, chunks=1):
    return fold(states, events, LENGTH, SEEN_LIMIT, ["view"], chunks)


def as_plain(row) -> tuple[list, list, bool]:
    window = [(e.event_id, round((e.event_time.replace(tzinfo=UTC) - EPOCH).total_seconds())) for e in row.window]
    seen = [(round((s.event_time.replace(tzinfo=UTC) - EPOCH).total_seconds()), s.item_id) for s in row.seen]
    return window, seen, row.seen_overflowed


@settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(scenario, min_size=150, max_size=150))
def test_any_order_repetition_and_split_gives_the_same_state(spark, scenarios):
    empty = spark.createDataFrame([], USER_VECTORS.schema)
    parts: list[list[tuple]] = [[], [], []]
    distinct = {}
    for number, (events, seed) in enumerate(scenarios):
        user, rng = f"u{number:03}", random.Random(seed)
        # An event may change its content, but not whether it enters the window or which item it is about:
        # that takes a refold from the table of events (see the ledger).
        stable = {e[0]: (e[3], e[4]) for e in events}
        events = [(e[0], e[1], e[2], *stable[e[0]]) for e in events]
        distinct[user] = events
        delivered = events + [rng.choice(events) for _ in range(rng.randrange(4))] if events else []
        rng.shuffle(delivered)
        for e in delivered:
            parts[rng.randrange(3)].append(rows_of(user, [e])[0])
    states = empty
    for part in parts:
        states = folded(spark, states.select(*STATE), spark.createDataFrame(part, EVENTS.schema)).localCheckpoint()
    together = [row for part in parts for row in part]
    once = folded(spark, empty.select(*STATE), spark.createDataFrame(together, EVENTS.schema), chunks=3)
    in_parts = {r.user_id: as_plain(r) for r in states.collect()}
    at_once = {r.user_id: as_plain(r) for r in once.collect()}
    expected = {user: reference(events) for user, events in distinct.items() if events}
    assert in_parts == expected
    assert at_once == expected


def test_what_leaves_seen_is_handed_out_and_the_revision_is_kept(spark):
    rows = rows_of("u", [(n, 0, n, n, "view") for n in range(8)])
    state = [("u", 7, [], [], False)]
    schema = "user_id string, revision bigint, " + ", ".join(
        f"{n} {USER_VECTORS.schema[n].dataType.simpleString()}" for n in STATE[2:]
    )
    (row,) = folded(spark, spark.createDataFrame(state, schema), spark.createDataFrame(rows, EVENTS.schema)).collect()
    assert row.revision == 7
    assert [s.item_id for s in row.overflow] == ["i0", "i1", "i2"]
    assert [s.item_id for s in row.seen] == ["i3", "i4", "i5", "i6", "i7"]


def test_a_user_with_only_impressions_is_known_with_an_empty_window(spark):
    rows = rows_of("u", [(1, 0, 1, 1, "impression")])
    empty = spark.createDataFrame([], USER_VECTORS.schema)
    (row,) = folded(spark, empty, spark.createDataFrame(rows, EVENTS.schema)).collect()
    assert (row.user_id, row.window, row.seen, row.revision) == ("u", [], [], 0)
