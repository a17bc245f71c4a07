"""The fold against a slow, obvious reference, in any order, repetition and split."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st
from nightstream.serving.user_state import STATES, FoldRules, fold
from nightstream.store.tables import EVENTS, arrow_schema

EPOCH = datetime(2024, 1, 1, tzinfo=UTC)
LENGTH, SEEN_LIMIT = 4, 5
RULES = FoldRules(LENGTH, SEEN_LIMIT, ["view"])
NOBODY = STATES.empty_table()

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
    return [(f"e{e[0]}", e[2], f"h{e[1]}") for e in window], seen[-SEEN_LIMIT:], len(seen) > SEEN_LIMIT


def table(events: list[tuple]) -> pa.Table:
    """EVENTS rows as Spark hands them over."""
    columns = list(zip(*events, strict=True)) or [[] for _ in EVENTS.schema]
    return pa.table([pa.array(c) for c in columns], EVENTS.schema.names).cast(arrow_schema(EVENTS.schema))


def folded(states: pa.Table, events: list[tuple]) -> pa.Table:
    return fold(states, table(events), RULES)


def as_plain(row: dict) -> tuple[list, list, bool]:
    def seconds(time):
        return round((time - EPOCH).total_seconds())

    window = [(e["event_id"], seconds(e["event_time"]), e["content_hash"]) for e in row["window"]]
    return window, [(seconds(s["event_time"]), s["item_id"]) for s in row["seen"]], row["seen_overflowed"]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(scenario, min_size=1, max_size=12))
def test_any_order_repetition_and_split_gives_the_same_state(scenarios):
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
    states = NOBODY
    for part in parts:
        states = folded(states, part)
    at_once = folded(NOBODY, [row for part in parts for row in part])
    expected = {user: reference(events) for user, events in distinct.items() if events}
    assert {r["user_id"]: as_plain(r) for r in states.to_pylist()} == expected
    assert {r["user_id"]: as_plain(r) for r in at_once.to_pylist()} == expected


def test_folding_a_state_into_nothing_changes_nothing():
    state = folded(NOBODY, rows_of("u", [(n, 0, n, n, "view") for n in range(3)]))
    again = folded(state, [])
    assert again.drop_columns("overflow").equals(state.drop_columns("overflow"))


def test_what_leaves_seen_is_handed_out_and_the_revision_is_kept():
    rows = rows_of("u", [(n, 0, n, n, "view") for n in range(8)])
    state = pa.table([["u"], [7], [[]], [[]], [False]], schema=STATES)
    (row,) = folded(state, rows).to_pylist()
    assert row["revision"] == 7
    assert [s["item_id"] for s in row["overflow"]] == ["i0", "i1", "i2"]
    assert [s["item_id"] for s in row["seen"]] == ["i3", "i4", "i5", "i6", "i7"]
    assert row["seen_overflowed"]


def test_a_user_who_has_overflowed_stays_one_who_has():
    state = pa.table([["u"], [7], [[]], [[]], [True]], schema=STATES)
    assert folded(state, rows_of("u", [(1, 0, 1, 1, "view")]))["seen_overflowed"].to_pylist() == [True]


def test_a_user_with_only_impressions_is_known_with_an_empty_window():
    (row,) = folded(NOBODY, rows_of("u", [(1, 0, 1, 1, "impression")])).to_pylist()
    assert (row["user_id"], row["window"], row["seen"], row["revision"]) == ("u", [], [], 0)
