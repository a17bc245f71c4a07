"""What becomes of each valid row: a new event, a better version of a known one, or a repetition."""

from __future__ import annotations

from dataclasses import dataclass

from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from nightstream.ingest.history import for_fold
from nightstream.store.materialize import Cut
from nightstream.store.tables import DUPLICATES, EVENTS

# What `resolve` makes of a valid row.
NEW, SUPERSEDING, STORED, DUPLICATE = OUTCOMES = ("new", "superseding", "stored", "duplicate")


@dataclass(frozen=True)
class Resolution:
    """What becomes of the valid rows of one call.

    settled: rows as `settle` gives them; None where all are new and as they came. new, superseding, stored, duplicate:
    how many have each outcome. retractions: how many of the kept rows are retractions.
    """

    settled: Cut | None = None
    new: int = 0
    superseding: int = 0
    stored: int = 0
    duplicate: int = 0
    retractions: int = 0

    @property
    def as_they_came(self) -> bool:
        """Whether nothing had to be looked for: all are new, and none is dead."""
        return self.settled is None

    @property
    def rows(self) -> DataFrame:
        """The settled rows; of what is as it came there are none."""
        assert self.settled is not None
        return self.settled.rows

    def having(self, outcome: str) -> Cut:
        """The settled rows with this outcome."""
        assert self.settled is not None
        return self.settled.where_equal("outcome", outcome)

    @property
    def kept(self) -> DataFrame:
        """The settled rows that are in `events` in the end, retractions included."""
        return self.rows.where(F.col("raw_id") == F.col("kept_raw_id"))

    @property
    def superseded(self) -> DataFrame:
        """EVENTS rows of which others take the place."""
        return self.having(SUPERSEDING).rows.select("old.*")

    @property
    def repetitions(self) -> DataFrame:
        """DUPLICATES rows: the repetitions among the rows, and the stored events that are superseded."""
        here = self.having(DUPLICATE).rows.select(*DUPLICATES.schema.names)
        replaced = self.having(SUPERSEDING).rows.select(
            "old.raw_id", "event_id", F.col("raw_id").alias("kept_raw_id"), "old.arrival_time"
        )
        return here.unionByName(replaced)

    def accepted(self, retraction_type: str) -> DataFrame:
        """EVENTS rows to be folded into windows, as history.foldable gives them."""
        return for_fold(self.kept, F.col("dead"), retraction_type).select(*EVENTS.schema.names)


def mentions(events: DataFrame, ids: DataFrame, retraction_type: str) -> DataFrame:
    """The rows of `events` that are, or retract, one of the event ids, with that id in the column mentioned.

    ids: one column event_id, repetitions do no harm. A row that does both stands there twice.
    """
    retraction = (F.col("event_type") == retraction_type) & F.col("retracts").isNotNull()
    # One pass over the table for both questions: it is the largest there is.
    both = F.when(retraction, F.array("event_id", "retracts")).otherwise(F.array("event_id"))
    wanted = ids.select(F.col("event_id").alias("mentioned"))
    return events.withColumn("mentioned", F.explode(both)).join(wanted, "mentioned", "left_semi")


def known(events: DataFrame, ids: DataFrame, retraction_type: str) -> DataFrame:
    """What `events` knows of the event ids: one row per id found there as an event or as the target of a retraction.

    ids: as in `mentions`. Columns: event_id, old (struct of the EVENTS columns, null where only a retraction names the
    id), copies (rows of `events` with this id: more than 1 is damage), retracted.
    """
    rows = mentions(events, ids, retraction_type)
    own = F.col("mentioned") == F.col("event_id")
    retraction = F.col("event_type") == retraction_type
    return rows.groupBy(F.col("mentioned").alias("event_id")).agg(
        F.max(F.when(own, F.struct(*EVENTS.schema.names))).alias("old"),
        F.count_if(own).alias("copies"),
        F.bool_or(retraction & (F.col("mentioned") == F.col("retracts"))).alias("retracted"),
    )


def resolve(valid: DataFrame, existing: DataFrame) -> DataFrame:
    """`settle` against EVENTS rows (any; those with other ids do no harm), without `dead`."""
    return settle(valid, known(existing, valid.select("event_id"), "")).drop("dead")


def settle(valid: DataFrame, known_ids: DataFrame, tombstones: DataFrame | None = None) -> DataFrame:
    """The valid rows with what becomes of each: outcome, kept_raw_id, the stored event `old`, copies, and dead.

    valid: rows of `parse` without a reason. known_ids: `known` for their event ids. tombstones: `tombstones(valid)`, or
    None where valid has no retraction. Of several rows with one event_id
    the greater (event_time, content_hash) wins, and what is equal in both stays as it was stored; among equal new rows
    the greater raw_id wins.
    outcome: NEW (append it), SUPERSEDING (takes the place of the event `old`), STORED (is in `events` under its own
    raw_id), DUPLICATE (repeats, or was overtaken by, the row kept_raw_id). dead: a retraction names the event_id.
    """
    rows = valid.join(known_ids, "event_id", "left")
    stored = F.coalesce(F.col("raw_id") == F.col("old.raw_id"), F.lit(False))
    rank = F.struct("event_time", "content_hash", "raw_id")
    best = F.max(F.when(~stored, rank)).over(Window.partitionBy("event_id"))
    rows = rows.withColumn("_stored", stored).withColumn("_best", best)
    wins = F.struct("_best.event_time", "_best.content_hash") > F.struct("old.event_time", "old.content_hash")
    wins = F.col("_best").isNotNull() & (F.col("old").isNull() | wins)
    rows = rows.withColumn("kept_raw_id", F.when(wins, F.col("_best.raw_id")).otherwise(F.col("old.raw_id")))
    winner = F.col("raw_id") == F.col("kept_raw_id")
    outcome = (
        F.when(F.col("_stored"), STORED)
        .when(winner & F.col("old").isNull(), NEW)
        .when(winner, SUPERSEDING)
        .otherwise(DUPLICATE)
    )
    rows = rows.withColumn("outcome", outcome).withColumn("dead", F.coalesce("retracted", F.lit(False)))
    if tombstones is not None:
        rows = rows.join(tombstones.withColumn("_here", F.lit(True)), "event_id", "left")
        rows = rows.withColumn("dead", F.col("dead") | F.col("_here").isNotNull()).drop("_here")
    return rows.drop("_stored", "_best", "retracted")
