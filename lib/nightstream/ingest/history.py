"""Which events count: retractions are permanent tombstones, whichever of the two came first."""

from __future__ import annotations

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F


def tombstones(events: DataFrame, retraction_type: str) -> DataFrame:
    """The event ids (column event_id, distinct) that the retractions among the events name."""
    retraction = F.col("event_type") == retraction_type
    return events.where(retraction).select(F.col("retracts").alias("event_id")).distinct()


def foldable(events: DataFrame, retraction_type: str) -> DataFrame:
    """What a fold takes: events without retractions; those that were taken back get another type (see taken_back)."""
    dead = tombstones(events, retraction_type).withColumn("_dead", F.lit(True))
    kept = events.where(F.col("event_type") != retraction_type).join(dead, "event_id", "left")
    marked = kept.withColumn("event_type", taken_back(F.col("_dead").isNotNull(), retraction_type))
    return marked.select(*events.columns)


def taken_back(dead: Column, retraction_type: str) -> Column:
    """The event_type for a fold. An event that was taken back still makes its user known, as it has done where it was
    folded before its retraction came; a type that enters no window does just that."""
    return F.when(dead, F.lit(retraction_type)).otherwise(F.col("event_type"))


def live(events: DataFrame, retraction_type: str) -> DataFrame:
    """The events that count: no retractions, and none that a retraction names, whichever of the two came first."""
    kept = events.where(F.col("event_type") != retraction_type)
    return kept.join(tombstones(events, retraction_type), "event_id", "left_anti")
