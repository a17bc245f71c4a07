"""The freshest lists as one query, and as a view for catalogs: `recommendations`, with what `refreshes` has beyond it
laid over. `reading.py` says the same without Spark."""

from __future__ import annotations

import logging

from pyspark.errors import PySparkException

from nightstream.reading import CLOCK_SKEW
from nightstream.runtime.settings import Settings
from nightstream.store.storage import Storage
from nightstream.store.tables import LIST_ENTRY, RECOMMENDATIONS, REFRESHES

log = logging.getLogger(__name__)

VIEW = "recommendations_now"
# docs/operations.md has the same for DuckDB. Of equal revisions the first one counts, as it is with MERGEs.
_QUERY = """
WITH lists AS (
  SELECT {columns}
  FROM {recommendations}
), tail AS (
  SELECT *, row_number() OVER (PARTITION BY user_id ORDER BY revision DESC, refreshed_at) AS place
  FROM (SELECT {of_user}, items FROM {refreshes})
  WHERE refreshed_at >= (
    SELECT coalesce(max(refreshed_at) - INTERVAL '{skew}' SECOND, TIMESTAMP '1970-01-01 00:00:00') FROM lists
  )
), newer AS (
  SELECT t.*
  FROM tail t LEFT JOIN lists l ON t.user_id = l.user_id AND l.rank = 1
  WHERE t.place = 1 AND (l.user_id IS NULL OR t.revision > l.revision)
)
SELECT {columns}
FROM lists
WHERE NOT EXISTS (SELECT 1 FROM newer WHERE newer.user_id = lists.user_id)
UNION ALL
SELECT {of_entry}
FROM (SELECT {of_user}, explode(items) AS entry FROM newer)
"""


def query(storage: Storage) -> str:
    """The definition, as SQL over the tables of an installation: rows of RECOMMENDATIONS without `bucket`."""
    columns = [name for name in RECOMMENDATIONS.schema.names if name != "bucket"]
    return _QUERY.format(
        columns=", ".join(columns),
        of_user=", ".join(name for name in columns if name not in LIST_ENTRY.names),
        of_entry=", ".join(f"entry.{name}" if name in LIST_ENTRY.names else name for name in columns),
        recommendations=storage.sql_name(RECOMMENDATIONS),
        refreshes=storage.sql_name(REFRESHES),
        skew=int(CLOCK_SKEW.total_seconds()),
    )


def make_view(storage: Storage, settings: Settings) -> None:
    """Make it a view beside the tables of a catalog; tables that lie by path have no views.

    A catalog that refuses it is logged: lists are served without the view, too.
    """
    if settings.storage.kind != "catalog":
        return
    storage.create(REFRESHES, RECOMMENDATIONS)
    try:
        storage.create_view(VIEW, query(storage))
    except PySparkException:
        log.warning("the view %s could not be made", VIEW, exc_info=True)
