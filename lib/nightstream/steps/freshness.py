"""Freshness: which users' lists are behind their events, and by how much."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from nightstream.errors import NightstreamError
from nightstream.monitoring import freshness, measurements
from nightstream.runtime.settings import Settings
from nightstream.serving import recommendations_now
from nightstream.store import registry
from nightstream.store.storage import Storage

MOST_SHOWN = 1000


def run(spark: SparkSession, settings: Settings, user: str | None = None, worst: int = 10) -> dict[str, Any]:
    """The row of one user, or the summary of all and under "worst" the rows of the `worst` stalest, MOST_SHOWN at most.

    Rows as freshness.freshness has them, times in ISO 8601. Raises TableError where a table is missing,
    NightstreamError for a user that nothing is known of.
    """
    rows = freshness.freshness(Storage(spark, settings.storage), settings)
    if user is not None:
        shown = _read(rows.where(F.col("user_id") == user), 1)
        if not shown:
            raise NightstreamError(f"the user {user} has neither events nor a list; check --user")
        return shown[0]
    order = (F.desc("stale"), F.desc_nulls_last("age_s"), F.col("user_id"))
    return {**freshness.summary(rows), "worst": _read(rows.orderBy(*order), min(worst, MOST_SHOWN))}


def after_night(storage: Storage, settings: Settings, as_of: datetime) -> dict[str, float]:
    """Make the views where there is a catalog, and append the summary to `metrics`."""
    for view in (freshness, recommendations_now):
        view.make_view(storage, settings)
    figures = freshness.summary(freshness.freshness(storage, settings))
    measurements.write(storage, figures, registry.published(storage).model_version, as_of, {})
    return figures


def _read(rows: DataFrame, most: int) -> list[dict[str, Any]]:
    times = {n: F.date_format(n, "yyyy-MM-dd'T'HH:mm:ss.SSSXXX") for n in ("newest_event", "as_of", "refreshed_at")}
    return [row.asDict() for row in rows.limit(most).withColumns(times).collect()]
