"""Cutting frames off from their plans: computed once, the same however often they are read.

In a micro-batch, planning and starting jobs costs more than computing. Rows that came to the driver are part of the
plan itself: to filter or to broadcast them takes no job.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, Observation, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import StructType

from nightstream.store.tables import arrow_schema

log = logging.getLogger(__name__)

LOCAL_ROWS = 20_000


@dataclass(frozen=True)
class Cut:
    """rows: the frame, cut off. totals: the totals asked for, by name; None where there is no row. table: the rows,
    where they are on the driver."""

    rows: DataFrame
    totals: dict[str, Any]
    table: pa.Table | None = None

    @classmethod
    def of(cls, spark: SparkSession, table: pa.Table, schema: StructType, totals: Mapping[str, Any]) -> Cut:
        """Rows that are on the driver."""
        # One type wherever the rows were computed: tables of several origins can be put together.
        table = table.cast(arrow_schema(schema))
        # One partition: what groups or orders these rows next needs no shuffle.
        return cls(spark.createDataFrame(table, schema).coalesce(1), dict(totals), table)

    def release(self) -> None:
        """Free what is cached; the frame stays usable and is computed again."""
        with suppress(PySparkException):
            self.rows.unpersist()


def cut(
    rows: DataFrame,
    totals: Mapping[str, Column],
    limit: int = LOCAL_ROWS,
    size: int | None = None,
    cached: bool = True,
) -> Cut:
    """Compute rows and totals (aggregates over them) now.

    Up to `limit` rows come to the driver, in one partition: choose it by their width, and 0 where there are surely
    more; where Spark finds that they are wider than the driver takes (spark.driver.maxResultSize), they don't. size:
    how many there are, where the caller knows; else it is found out by computing the first of them, which is lost work
    where there are more. More rows stay on the executors, cached, or, with cached=False, checkpointed
    there: Delta's MERGE refuses a source that is in the cache. Serverless clusters have neither; there, more rows are
    computed again whenever they are read, so they must come from what does not change.
    """
    columns = [column.alias(name) for name, column in totals.items()]
    if limit and (size is None or size <= limit):
        seen = Observation()
        few = rows if size is not None else rows.limit(limit + 1)
        table = _on_driver(few.observe(seen, F.count(F.lit(1)).alias("_rows"), *columns))
        if table is not None and table.num_rows <= limit:
            observed = seen.get if table.num_rows else {}
            return Cut.of(rows.sparkSession, table, rows.schema, {name: observed.get(name) for name in totals})
    try:
        kept = rows.persist() if cached else rows.localCheckpoint()
    except PySparkException as error:
        log.warning(
            "rows are neither cached nor checkpointed here, so they are computed again whenever they are read",
            extra={"wanted": "cache" if cached else "checkpoint", "reason": str(error).partition("\n")[0]},
        )
        kept = rows
    row = kept.agg(*columns, F.count(F.lit(1)).alias("_rows")).first()
    assert row is not None
    return Cut(kept, {name: row[name] for name in totals})


def _on_driver(rows: DataFrame) -> pa.Table | None:
    """The rows; None where they are too many bytes for the driver."""
    try:
        return rows.toArrow()
    except Exception as error:
        if "spark.driver.maxResultSize" not in str(error):
            raise
        return None
