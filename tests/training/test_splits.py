"""Roles by time and by position, ties included."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from nightstream.models.arrays import RANK, TRAIN, VALID
from nightstream.training import splits

EPOCH = datetime(2024, 1, 1, tzinfo=UTC)


def frame(spark, rows):
    return spark.createDataFrame(
        [(f"e{n:03}", user, EPOCH + timedelta(seconds=second)) for n, (user, second) in enumerate(rows)],
        "event_id string, user_id string, event_time timestamp",
    )


def test_by_time_cuts_the_newest_shares_and_never_tears_a_second_apart(spark):
    events = frame(spark, [("u", n // 2) for n in range(100)])
    roles = {r.event_id: (r.role, r.event_time) for r in splits.by_time(events, 0.1, 0.2).collect()}
    counts = [sum(role == wanted for role, _ in roles.values()) for wanted in (TRAIN, RANK, VALID)]
    assert counts == [70, 20, 10]
    newest_of = {wanted: max(at for role, at in roles.values() if role == wanted) for wanted in (TRAIN, RANK)}
    oldest_of = {wanted: min(at for role, at in roles.values() if role == wanted) for wanted in (RANK, VALID)}
    assert newest_of[TRAIN] < oldest_of[RANK]
    assert newest_of[RANK] < oldest_of[VALID]


def test_what_is_held_out_lies_after_all_that_is_learnt_before_the_refit(spark):
    events = splits.by_time(frame(spark, [("u", n // 2) for n in range(100)]), 0.1, 0.2)
    after, until = splits.held_out_after(events)
    at = {r.event_id: (round(r.event_time.replace(tzinfo=UTC).timestamp() * 1e6), r.role) for r in events.collect()}
    assert {e for e, (_, role) in at.items() if role == VALID} == {e for e, (t, _) in at.items() if after < t <= until}
    assert splits.held_out_after(events.limit(0)) == (0, 0)


def test_leave_last_out_takes_the_last_by_time_then_id(spark):
    events = frame(spark, [("u", 5), ("u", 5), ("u", 1), ("u", 9), ("u", 5), ("single", 3)])
    roles = {r.event_id: r.role for r in splits.leave_last_out(events).collect()}
    assert roles == {
        "e003": splits.TEST,
        "e004": VALID,
        "e001": RANK,
        "e000": TRAIN,
        "e002": TRAIN,
        "e005": splits.TEST,
    }


def test_quantile_time_is_an_event_time_of_the_data(spark):
    events = frame(spark, [("u", n) for n in (1, 2, 3, 10)])
    micros = round(EPOCH.timestamp() * 1e6)
    assert splits.quantile_time(events, 0.75) == micros + 3_000_000
    assert splits.quantile_time(events.limit(0), 0.75) is None
