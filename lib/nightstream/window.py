"""The fold: one user's window and seen items from any set of that user's events.

`fold(states, events)` is commutative, associative and idempotent. The window is the newest N of the union of events,
ordered by (event_time, event_id), no event_id twice; of two events with one id the greater (event_time, content_hash)
stays. `seen` is item -> newest time, merged by maximum, the newest M kept. Truncation loses nothing that a later fold
would want back: whatever was cut has N (or M) greater ones before it, in every order of arrival.
"""

from __future__ import annotations

from collections.abc import Sequence

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from nightstream.tables import SEEN, WINDOW, WINDOW_EVENT


def newest_events(events: Column, length: int) -> Column:
    """array<WINDOW_EVENT> in any order, with repetitions -> the window: at most `length`, ascending (time, id)."""
    by_id = F.sort_array(
        F.transform(
            events,
            lambda e: F.struct(
                e.event_id.alias("event_id"),
                e.event_time.alias("event_time"),
                e.content_hash.alias("content_hash"),
                e.item_id.alias("item_id"),
                e.event_type.alias("event_type"),
                e.value.alias("value"),
            ),
        )
    )
    greatest = _last_of_each(by_id, "event_id")
    ordered = F.sort_array(F.transform(greatest, lambda e: F.struct(*[e[f].alias(f) for f in WINDOW_EVENT.names])))
    return _last(ordered, length).cast(WINDOW)


def newest_seen(seen: Column) -> Column:
    """array<(event_time, item_id)> with repetitions -> each item once with its newest time, ascending (time, item)."""
    by_item = F.sort_array(
        F.transform(seen, lambda s: F.struct(s.item_id.alias("item_id"), s.event_time.alias("event_time")))
    )
    newest = _last_of_each(by_item, "item_id")
    return F.sort_array(
        F.transform(newest, lambda s: F.struct(s.event_time.alias("event_time"), s.item_id.alias("item_id")))
    )


def unfolded(states: DataFrame) -> DataFrame:
    """States (user_id, revision) with an empty past: what a fold over a whole history starts from."""
    return states.select(
        "user_id",
        "revision",
        F.array().cast(WINDOW).alias("window"),
        F.array().cast(SEEN).alias("seen"),
        F.lit(False).alias("seen_overflowed"),
    )


def window_rows(events: DataFrame, window_types: Sequence[str]) -> DataFrame:
    """Events -> one row per event in the shape of a state: user_id, window, seen.

    An event of another type leaves both empty, so that its user is known without having consumed anything.
    """
    enters = F.col("event_type").isin(*window_types)
    event = F.struct(*[F.col(f) for f in WINDOW_EVENT.names])
    return events.select(
        "user_id",
        F.when(enters, F.array(event)).otherwise(F.array()).cast(WINDOW).alias("window"),
        F.when(enters, F.array(F.struct("event_time", "item_id"))).otherwise(F.array()).cast(SEEN).alias("seen"),
    )


def fold(
    states: DataFrame,
    events: DataFrame,
    length: int,
    seen_limit: int,
    window_types: Sequence[str],
    chunks: int = 1,
) -> DataFrame:
    """Fold live events into states.

    states: one row per user: user_id, revision, window, seen, seen_overflowed.
    events: EVENTS rows without retractions or retracted events, any number per user, any order, any repetition.
    chunks: in how many parts a user's events are folded before the parts are; 1 suits a micro-batch, more bounds the
        memory that one user with very many events takes (the result is the same, folding is associative).
    Returns one row per user of either side: user_id, revision (of the state folded into, 0 for none), window, seen,
    seen_overflowed, overflow (the seen entries that no longer fit, newest times first to go to the side table).
    """
    known = states.select(
        "user_id", F.lit(0).alias("chunk"), "window", "seen", "revision", F.col("seen_overflowed").alias("overflowed")
    )
    chunk = F.pmod(F.hash("window.event_id"), F.lit(chunks)) if chunks > 1 else F.lit(0)
    arriving = window_rows(events, window_types).select(
        "user_id",
        chunk.alias("chunk"),
        "window",
        "seen",
        F.lit(0).cast("long").alias("revision"),
        F.lit(False).alias("overflowed"),
    )
    rows = known.unionByName(arriving)
    if chunks > 1:
        rows = _union_of(rows, ["user_id", "chunk"], length)
    folded = _union_of(rows, ["user_id"], length)
    fits = F.slice("seen", F.greatest(F.size("seen") - seen_limit, F.lit(0)) + 1, seen_limit)
    surplus = F.slice("seen", F.lit(1), F.greatest(F.size("seen") - seen_limit, F.lit(0)))
    return folded.select(
        "user_id",
        "revision",
        "window",
        fits.cast(SEEN).alias("seen"),
        (F.col("overflowed") | (F.size("seen") > seen_limit)).alias("seen_overflowed"),
        surplus.cast(SEEN).alias("overflow"),
    )


def _union_of(rows: DataFrame, keys: list[str], length: int) -> DataFrame:
    gathered = rows.groupBy(*keys).agg(
        F.flatten(F.collect_list("window")).alias("window"),
        F.flatten(F.collect_list("seen")).alias("seen"),
        F.max("revision").alias("revision"),
        F.max("overflowed").alias("overflowed"),
    )
    return gathered.select(
        *keys,
        newest_events(F.col("window"), length).alias("window"),
        newest_seen(F.col("seen")).alias("seen"),
        "revision",
        "overflowed",
    )


def _last_of_each(ordered: Column, field: str) -> Column:
    """Of an array sorted by `field` first, the last entry of each run of equal values."""
    pairs = F.arrays_zip(
        ordered.alias("this"), F.slice(ordered, 2, F.greatest(F.size(ordered), F.lit(1))).alias("next")
    )
    kept = F.filter(
        pairs, lambda p: p["this"].isNotNull() & (p["next"].isNull() | (p["next"][field] != p["this"][field]))
    )
    return F.transform(kept, lambda p: p["this"])


def _last(array: Column, count: int) -> Column:
    return F.slice(array, F.greatest(F.size(array) - count, F.lit(0)) + 1, count)
