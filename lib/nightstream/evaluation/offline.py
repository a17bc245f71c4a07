"""Offline evaluation through the refresh that serves: what is measured is what a user would have been shown.

Full ranking over the whole catalogue, items already seen removed, no sampled metrics. A target that the catalogue does
not hold is a miss, never left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from nightstream.models import ranking_metrics
from nightstream.models.bundle import Bundle
from nightstream.serving.refresh import Refresher, refresh, unfolded
from nightstream.serving.user_state import FoldRules
from nightstream.store.tables import SEEN, WINDOW, WINDOW_EVENT
from nightstream.training.splits import TEST

CUTOFFS = (5, 10, 20)
LIST_LENGTH = max(CUTOFFS)
FROZEN = math.inf

# In evaluation nothing overflows: the states live for one call, so the side table would only be read back.
_ALL_SEEN = 2**31 - 1


class Lister(Protocol):
    """Whatever makes lists from states: what serves, and in benchmarks what it is compared with."""

    @property
    def users(self) -> DataFrame:
        """USERS rows."""

    @property
    def window_length(self) -> int:
        """The newest events of a user that a list may depend on."""

    def lists(self, states: DataFrame, events: DataFrame, users: DataFrame) -> DataFrame:
        """States and events -> user_id, items (rank, item_id, score; the best LIST_LENGTH, none of them seen)."""


@dataclass(frozen=True)
class Served:
    """What the refresh needs besides states and events: the model and the settings that shape a list."""

    bundle: Bundle
    users: DataFrame
    window_length: int
    window_types: Sequence[str]

    def lists(self, states: DataFrame, events: DataFrame, users: DataFrame) -> DataFrame:
        """States and events -> user_id, items (the best LIST_LENGTH)."""
        rules = FoldRules(self.window_length, _ALL_SEEN, tuple(self.window_types))
        refreshed = refresh(states, events, users, None, Refresher(self.bundle, rules, LIST_LENGTH))
        return refreshed.select("user_id", "items")


def leave_one_out(events: DataFrame, served: Lister) -> DataFrame:
    """Events with role (splits.leave_last_out) -> one row per test event, its list made from all events before it.

    Returns user_id, target_item_id, event_time, delay_s (0), known (the user has an event before), items.
    """
    tests = events.where(F.col("role") == TEST)
    history = events.where(F.col("role") != TEST)
    states = unfolded(tests.select("user_id", F.lit(0).cast("long").alias("revision")).distinct())
    lists = served.lists(states, history, served.users)
    known = history.select("user_id").distinct().withColumn("known", F.lit(True))
    return (
        tests.select("user_id", F.col("item_id").alias("target_item_id"), "event_time", F.lit(0.0).alias("delay_s"))
        .join(known, "user_id", "left")
        .withColumn("known", F.coalesce("known", F.lit(False)))
        .join(lists, "user_id")
    )


def before_each(events: DataFrame, targets: DataFrame, served: Lister) -> DataFrame:
    """For each target the list that its user would have been served just before it, every event before it known.

    events: all events of the targets' users, ordered within a user by (event_time, event_id). targets: event_id, of
    some of them.
    Returns one row per target: event_id, user_id, target_item_id, event_time, delay_s (0), known (the user has an event
    before), items.
    """
    ordered = Window.partitionBy("user_id").orderBy("event_time", "event_id")
    placed = events.withColumn("before", F.row_number().over(ordered) - 1)
    tests = placed.join(targets.select("event_id"), "event_id", "left_semi").select(
        "event_id",
        "user_id",
        F.col("item_id").alias("target_item_id"),
        "event_time",
        F.lit(0.0).alias("delay_s"),
        (F.col("before") > 0).alias("known"),
        F.col("before").alias("known_events"),
        "before",
    )
    queries = tests.withColumnRenamed("event_id", "query_id").select("query_id", "user_id", "known_events", "before")
    lists = _lists(queries, events, served).withColumnRenamed("query_id", "event_id")
    return tests.drop("before", "known_events").join(lists, "event_id")


def prequential(events: DataFrame, cut_micros: int, delays_s: Sequence[float], served: Lister) -> DataFrame:
    """Replay the events after the cut: before each one, the list that a speed layer of a given delay would have served.

    events: all events, before and after the cut, ordered within a user by (event_time, event_id).
    delays_s: how late the speed layer knows an event, seconds; events up to the cut are always known, since the batch
    has seen them. FROZEN is added to them: windows as of the cut. Seen items are removed live in every case.
    Returns one row per event after the cut and delay: user_id, target_item_id, event_time, delay_s, known (the user has
    an event up to the cut), items.
    """
    ordered = Window.partitionBy("user_id").orderBy("event_time", "event_id")
    by_time = Window.partitionBy("user_id").orderBy("micros")
    placed = events.withColumn("micros", F.unix_micros("event_time")).withColumns(
        {
            "before": F.row_number().over(ordered) - 1,
            "at_cut": F.sum((F.col("micros") <= cut_micros).cast("int"))
            .over(Window.partitionBy("user_id"))
            .cast("int"),
        }
    )
    known_at: list[Column] = []
    for delay in sorted(set(delays_s)):
        reach = by_time.rangeBetween(Window.unboundedPreceding, -round(delay * 1e6))
        so_far = F.count(F.lit(1)).over(reach).cast("int")
        count = F.least(F.col("before"), F.greatest(F.col("at_cut"), so_far)) if delay > 0 else F.col("before")
        known_at.append(F.struct(F.lit(float(delay)).alias("delay_s"), count.cast("int").alias("known_events")))
    known_at.append(F.struct(F.lit(FROZEN).alias("delay_s"), F.col("at_cut").alias("known_events")))
    tests = (
        placed.withColumn("case", F.array(*known_at))
        .where(F.col("micros") > cut_micros)
        .select("user_id", "item_id", "event_time", "before", "at_cut", F.explode("case").alias("case"))
        .select(
            "user_id",
            F.col("item_id").alias("target_item_id"),
            "event_time",
            "case.delay_s",
            (F.col("at_cut") > 0).alias("known"),
            "before",
            "case.known_events",
            F.concat_ws("\u241f", "user_id", "known_events", "before").alias("query_id"),
        )
    ).persist()
    # Many cases share one state (a burst of events under a long delay), and each state is refreshed once.
    queries = tests.select("query_id", "user_id", "known_events", "before").distinct()
    return tests.join(_lists(queries, events, served), "query_id").drop("query_id", "before", "known_events")


def predictions(rows: DataFrame) -> DataFrame:
    """Evaluated rows -> one row per recommended item, so that anyone can score them again."""
    return rows.select("user_id", "target_item_id", "event_time", "delay_s", F.explode("items").alias("entry")).select(
        "user_id", "target_item_id", "event_time", "delay_s", "entry.rank", "entry.item_id", "entry.score"
    )


def scores(rows: DataFrame, catalogue_size: int) -> list[dict[str, Any]]:
    """HR and NDCG at CUTOFFS, and coverage, per delay for all users, known ones and unknown ones.

    With one target per list, NDCG@k is the mean of ranking_metrics.gains.
    coverage: share of the catalogue that stands in at least one of the lists (to LIST_LENGTH).
    """
    ranked = rows.withColumn("rank", _target_rank()).persist()
    measures = [F.count(F.lit(1)).alias("events")]
    for k in CUTOFFS:
        hit = F.coalesce(F.col("rank") <= k, F.lit(False))
        measures.append(F.avg(hit.cast("double")).alias(f"hr@{k}"))
        measures.append(F.avg(_gain(F.col("rank"), k)).alias(f"ndcg@{k}"))
    groups = F.explode(F.array(F.lit("all"), F.when(F.col("known"), "known").otherwise("unknown")))
    by_group = ranked.withColumn("users", groups).groupBy("delay_s", "users").agg(*measures)
    items = ranked.select("delay_s", F.explode("items.item_id").alias("item_id"))
    covered = items.groupBy("delay_s").agg(F.count_distinct("item_id").alias("covered"))
    # One row per delay and kind of user: a handful.
    figures = by_group.join(covered, "delay_s", "left").orderBy("delay_s", "users").collect()
    ranked.unpersist()
    return [
        {
            "delay_s": None if math.isinf(row.delay_s) else row.delay_s,
            "users": row["users"],
            "events": row.events,
            **{f"{m}@{k}": row[f"{m}@{k}"] for k in CUTOFFS for m in ("hr", "ndcg")},
            "coverage": (row.covered or 0) / max(catalogue_size, 1) if row["users"] == "all" else None,
        }
        for row in figures
    ]


def gains(rows: DataFrame, k: int) -> DataFrame:
    """Evaluated rows -> with `gain`, what each target adds to NDCG@k: their mean is what `scores` calls ndcg@k."""
    return rows.withColumn("gain", _gain(_target_rank(), k))


def _target_rank() -> Column:
    """The target's place in `items`, null where it is not there."""
    place = F.array_position(F.transform("items", lambda i: i.item_id), F.col("target_item_id"))
    return F.when(place > 0, place)


def _gain(rank: Column, k: int) -> Column:
    """ranking_metrics.gains of a rank, 0 where it is null."""
    of_ranks = F.array(*[F.lit(gain) for gain in ranking_metrics.gains(np.arange(1, k + 1), k).tolist()])
    return F.coalesce(F.get(of_ranks, rank - 1), F.lit(0.0))


def _lists(queries: DataFrame, events: DataFrame, served: Lister) -> DataFrame:
    """query_id, items: the list of each query (see _states_before) under the attributes of its user."""
    described = queries.select("query_id", "user_id").join(served.users, "user_id").drop("user_id")
    states = _states_before(queries, events, served.window_length)
    lists = served.lists(states, events.limit(0), described.withColumnRenamed("query_id", "user_id"))
    return lists.withColumnRenamed("user_id", "query_id")


def _states_before(queries: DataFrame, events: DataFrame, length: int) -> DataFrame:
    """The state of each query: the window of the first `known_events` events, the items of the first `before` ones."""
    event = F.struct(*[F.col(f) for f in WINDOW_EVENT.names])
    histories = events.groupBy("user_id").agg(F.sort_array(F.collect_list(event)).alias("all"))
    start = F.greatest(F.col("known_events") - length, F.lit(0)) + 1
    return queries.join(histories, "user_id").select(
        F.col("query_id").alias("user_id"),
        F.lit(0).cast("long").alias("revision"),
        F.slice("all", start, F.least(F.col("known_events"), F.lit(length))).cast(WINDOW).alias("window"),
        F.transform(F.slice("all", 1, F.col("before")), lambda e: F.struct(e.event_time, e.item_id))
        .cast(SEEN)
        .alias("seen"),
        F.lit(False).alias("seen_overflowed"),
    )
