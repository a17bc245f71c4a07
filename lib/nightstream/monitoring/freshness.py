"""Freshness: for each user, how old the list in `recommendations` is against the user's newest event in `events`.

The newest event is the newest live one of a type that enters a window: retracted events and, say, impressions change no
list, so a list that has taken up everything has age 0, however long ago it was written.
"""

from __future__ import annotations

import logging

from pyspark.errors import PySparkException
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from nightstream.ingest.history import entering_sql
from nightstream.monitoring.measurements import SHARES
from nightstream.runtime.settings import Settings
from nightstream.store.storage import Storage
from nightstream.store.tables import EVENTS, RECOMMENDATIONS, USER_VECTORS

log = logging.getLogger(__name__)

VIEW = "freshness"
_READ = (EVENTS, USER_VECTORS, RECOMMENDATIONS)
# SQL, because a view is SQL. due: the events that belong into the window, as far as its oldest event tells: all of them
# while it has room.
_QUERY = """
WITH entering AS (
  {entering}
), states AS (
  SELECT user_id, revision, size(window) AS kept, get(window, 0) AS oldest FROM {user_vectors}
), lists AS (
  SELECT user_id, revision, as_of, refreshed_at, model_version FROM {recommendations} WHERE rank = 1
), everyone AS (
  SELECT user_id, event_time, event_id FROM entering UNION ALL SELECT user_id, NULL, NULL FROM states
), counted AS (
  SELECT
    e.user_id,
    max(e.event_time) AS newest_event,
    max(s.revision) AS revision,
    coalesce(max(s.kept), 0) AS kept,
    count_if(e.event_id IS NOT NULL AND (
      s.oldest IS NULL OR s.kept < {length}
      OR named_struct('t', e.event_time, 'i', e.event_id)
        >= named_struct('t', s.oldest.event_time, 'i', s.oldest.event_id)
    )) AS due
  FROM everyone e LEFT JOIN states s ON e.user_id = s.user_id
  GROUP BY e.user_id
)
SELECT
  c.user_id,
  c.newest_event,
  l.as_of,
  (unix_micros(c.newest_event) - unix_micros(l.as_of)) / 1e6 AS age_s,
  c.due <> c.kept OR coalesce(l.revision < c.revision, l.user_id IS NULL AND c.due > 0) AS stale,
  l.refreshed_at,
  l.model_version
FROM counted c LEFT JOIN lists l ON c.user_id = l.user_id
"""


def query(storage: Storage, settings: Settings) -> str:
    """The definition, as SQL over the tables of an installation."""
    rules = settings.events
    return _QUERY.format(
        entering=entering_sql(storage.sql_name(EVENTS), rules.retraction_type, rules.window_types),
        user_vectors=storage.sql_name(USER_VECTORS),
        recommendations=storage.sql_name(RECOMMENDATIONS),
        length=settings.window.length,
    )


def freshness(storage: Storage, settings: Settings) -> DataFrame:
    """One row per user that has events or a state:

    user_id; newest_event: time of the newest event that counts, null for none; as_of: time of the newest event that the
    list has taken up; age_s: newest_event - as_of in seconds, null where one of them is, below 0 where the list still
    holds an event that was taken back; stale: whether the list lacks an event that belongs into the user's window, has
    one too many, is older than the user's state, or is not there; refreshed_at: the wall clock when the list was
    written; model_version.
    Raises TableError where a table is missing.
    """
    for spec in _READ:
        storage.read(spec)
    return storage.spark.sql(query(storage, settings))


def make_view(storage: Storage, settings: Settings) -> None:
    """The same as a view beside the tables of a catalog, for BI tools; tables that lie by path have no views.

    A catalog that refuses it is logged: lists are served without the view, too.
    """
    if settings.storage.kind != "catalog":
        return
    storage.create(*_READ)
    try:
        storage.create_view(VIEW, query(storage, settings))
    except PySparkException:
        log.warning("the view %s could not be made", VIEW, exc_info=True)


def summary(rows: DataFrame) -> dict[str, float]:
    """freshness_users, freshness_stale_share of them, and percentiles and maximum of age_s over those that have one."""
    ages = F.percentile_approx("age_s", [share / 100 for share in SHARES])
    row = rows.agg(
        F.count("user_id").alias("users"),
        F.count_if("stale").alias("stale"),
        ages.alias("ages"),
        F.max("age_s").alias("oldest"),
    ).first()
    assert row is not None
    figures = {"freshness_users": float(row.users)}
    if row.users:
        figures["freshness_stale_share"] = row.stale / row.users
    if row.oldest is not None:
        figures |= {f"freshness_age_p{share}_s": age for share, age in zip(SHARES, row.ages, strict=True)}
        figures["freshness_age_max_s"] = row.oldest
    return figures
