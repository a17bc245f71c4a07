"""Which event may be a target of what: by time for the nightly, by position in the user's history for evaluation.

Ties in time follow the event id everywhere. Ids derived by ingest start with crc32 of "user_id/item_id", so ties are
broken by a hash, never by the item id itself, which would carry popularity and file order into the result.
"""

from __future__ import annotations

from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from nightstream.models.arrays import RANK, TRAIN, VALID

TEST = 3


def quantile_time(events: DataFrame, fraction: float) -> int | None:
    """The event_time (microseconds) that a share of the events does not exceed, exact; None for no events."""
    row = (
        events.select(F.unix_micros("event_time").alias("at"))
        .agg(F.expr(f"percentile_disc({fraction!r}) WITHIN GROUP (ORDER BY at)"))
        .first()
    )
    return None if row is None or row[0] is None else int(row[0])


def by_time(events: DataFrame, validation_fraction: float, ranking_fraction: float) -> DataFrame:
    """Events -> with `role`: the newest share VALID, the share before it RANK, the rest TRAIN."""
    at = F.unix_micros("event_time")
    valid_from = quantile_time(events, 1 - validation_fraction) or 0
    rank_from = quantile_time(events, 1 - validation_fraction - ranking_fraction) or 0
    role = F.when(at > valid_from, VALID).when(at > rank_from, RANK).otherwise(TRAIN)
    return events.withColumn("role", role.cast("byte"))


def held_out_after(events: DataFrame) -> tuple[int, int]:
    """Events with `role` -> (newest time of those that training learns from before the refit, newest time of all),
    microseconds; those of role VALID lie between the two under by_time. (0, 0) for no events."""
    at = F.unix_micros("event_time")
    row = events.agg(F.max(F.when(F.col("role") != VALID, at)), F.max(at)).first()
    return (0, 0) if row is None else (int(row[0] or 0), int(row[1] or 0))


def leave_last_out(events: DataFrame) -> DataFrame:
    """Events -> with `role`: each user's last event TEST, the one before VALID, the third-last RANK, the rest TRAIN.

    A user with a single event keeps it as TEST.
    """
    newest_first = Window.partitionBy("user_id").orderBy(F.desc("event_time"), F.desc("event_id"))
    place = F.row_number().over(newest_first)
    role = F.when(place == 1, TEST).when(place == 2, VALID).when(place == 3, RANK).otherwise(TRAIN)
    return events.withColumn("role", role.cast("byte"))
