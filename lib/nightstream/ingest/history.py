"""Which events count, and for whom: retractions are permanent tombstones, whichever of the two came first.

The same is said twice for the live events that enter a window: over frames (`live`, `entering`) and as SQL
(`entering_sql`), because a view is SQL. A test compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F


def tombstones(events: DataFrame, retraction_type: str) -> DataFrame:
    """The event ids (column event_id, distinct) that the retractions among the events name."""
    retraction = F.col("event_type") == retraction_type
    return events.where(retraction).select(F.col("retracts").alias("event_id")).distinct()


def live(events: DataFrame, retraction_type: str) -> DataFrame:
    """The events that count: no retractions, and none that a retraction names, whichever of the two came first."""
    kept = events.where(F.col("event_type") != retraction_type)
    return kept.join(tombstones(events, retraction_type), "event_id", "left_anti")


def entering(events: DataFrame, window_types: Sequence[str]) -> DataFrame:
    """Those of the live events that enter a window: what their users have consumed."""
    return events.where(F.col("event_type").isin(*window_types))


def entering_sql(events: str, retraction_type: str, window_types: Sequence[str]) -> str:
    """A query for `entering` of `live`: the rows of `events` (a name in SQL) that enter a window and count."""
    types = ", ".join(map(_literal, window_types))
    return (
        f"SELECT e.* FROM {events} e LEFT ANTI JOIN "
        f"(SELECT retracts FROM {events} WHERE event_type = {_literal(retraction_type)}) r "
        f"ON e.event_id = r.retracts WHERE e.event_type IN ({types})"
    )


def foldable(events: DataFrame, retraction_type: str) -> DataFrame:
    """What a fold takes of events: see `for_fold`; an event is dead where one of them retracts it."""
    dead = tombstones(events, retraction_type).withColumn("_dead", F.lit(True))
    marked = for_fold(events.join(dead, "event_id", "left"), F.col("_dead").isNotNull(), retraction_type)
    return marked.select(*events.columns)


def for_fold(events: DataFrame, dead: Column, retraction_type: str) -> DataFrame:
    """The events without retractions; those that were taken back (dead) get the retractions' type.

    An event that was taken back still makes its user known, as it has done where it was folded before its retraction
    came; a type that enters no window does just that.
    """
    kept = events.where(F.col("event_type") != retraction_type)
    return kept.withColumn("event_type", F.when(dead, F.lit(retraction_type)).otherwise(F.col("event_type")))


def changed_users(rows: DataFrame, events: DataFrame, retraction_type: str) -> DataFrame:
    """user_id, distinct, of those whose history is another one since these rows came into `events` or left it.

    They are the users of the rows, and the owners of what retractions among them name. Who takes an event back need not
    be its user, and has no other history for it.

    Args:
        rows: EVENTS rows that came or left.
        events: EVENTS rows, all that there are.
        retraction_type: the event_type of a retraction.
    """
    users = rows.where(F.col("event_type") != retraction_type).select("user_id")
    # Few beside the events, as are retractions.
    targets = F.broadcast(tombstones(rows, retraction_type))
    owners = events.join(targets, "event_id", "left_semi").select("user_id")
    return users.unionByName(owners).distinct()


def _literal(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
