"""Cutting frames off from their plans: computed once, the same however often they are read.

In a micro-batch, planning and starting jobs costs more than computing. Rows that came to the driver are part of the
plan itself: to filter or to broadcast them takes no job.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, Observation, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import StructType

from nightstream.store.tables import arrow_schema

log = logging.getLogger(__name__)

LOCAL_ROWS = 20_000
NO_TOTALS: Mapping[str, Any] = MappingProxyType({})


class Cut:
    """Rows cut off from their plan, as a frame and, where they are on the driver, as a table.

    Of those on the driver the frame is made when it is asked for. What selects some of them gives a Cut of the same
    kind, without totals.
    """

    def __init__(
        self, rows: DataFrame | Callable[[], DataFrame], totals: Mapping[str, Any], table: pa.Table | None = None
    ) -> None:
        """rows: the frame, or what makes it. totals: the totals asked for, by name; None where there is no row. table:
        the rows, where they are on the driver."""
        self._rows, self._making = rows, threading.Lock()
        self.totals, self.table = dict(totals), table

    @classmethod
    def of(cls, spark: SparkSession, table: pa.Table, schema: StructType, totals: Mapping[str, Any] = NO_TOTALS) -> Cut:
        """Rows that are on the driver."""
        # One type wherever the rows were computed: tables of several origins can be put together.
        table = table.cast(arrow_schema(schema))
        # One partition: what groups or orders these rows next needs no shuffle.
        return cls(lambda: spark.createDataFrame(table, schema).coalesce(1), totals, table)

    @property
    def rows(self) -> DataFrame:
        with self._making:
            if callable(self._rows):
                self._rows = self._rows()
            return self._rows

    def select(self, *names: str) -> Cut:
        """These columns."""
        return self._derived(lambda rows: rows.select(*names), lambda table: table.select(list(names)))

    def where_equal(self, column: str, value: str) -> Cut:
        """The rows in which a column has this value."""
        return self._derived(
            lambda rows: rows.where(F.col(column) == value), lambda table: table.filter(pc.equal(table[column], value))
        )

    def where_null(self, column: str) -> Cut:
        return self._derived(
            lambda rows: rows.where(F.col(column).isNull()), lambda table: table.filter(pc.is_null(table[column]))
        )

    def where_not_null(self, column: str) -> Cut:
        return self._derived(
            lambda rows: rows.where(F.col(column).isNotNull()), lambda table: table.filter(pc.is_valid(table[column]))
        )

    def where_mask(self, mask: pa.Array) -> Cut:
        """Those of the rows on the driver for which the mask is true."""
        assert self.table is not None
        table = self.table.filter(mask)
        return Cut(lambda: self.rows.sparkSession.createDataFrame(table, self.rows.schema), {}, table)

    def mapped(self, function: Callable[[pa.Table], pa.Table], schema: StructType) -> Cut:
        """What the function makes of each part of the rows: any number of rows of this schema."""

        def run(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            for batch in batches:
                yield from function(pa.Table.from_batches([batch])).to_batches()

        if self.table is None:
            return Cut(lambda: self.rows.mapInArrow(run, schema), {})
        table = function(self.table).cast(arrow_schema(schema))
        return Cut(lambda: self.rows.sparkSession.createDataFrame(table, schema).coalesce(1), {}, table)

    def _derived(self, of_rows: Callable[[DataFrame], DataFrame], of_table: Callable[[pa.Table], pa.Table]) -> Cut:
        return Cut(lambda: of_rows(self.rows), {}, None if self.table is None else of_table(self.table))

    def release(self) -> None:
        """Free what is cached; the frame stays usable and is computed again."""
        if self.table is None:
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
        first = rows if size is not None else rows.limit(limit + 1)
        table = _on_driver(first.observe(seen, F.count(F.lit(1)).alias("_rows"), *columns), limit)
        if table is not None:
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


def few(rows: DataFrame, limit: int = LOCAL_ROWS) -> pa.Table | None:
    """The rows, in one job of one task; None where they are more than `limit`, or too many bytes for the driver."""
    return _on_driver(rows.coalesce(1).limit(limit + 1), limit)


def _on_driver(rows: DataFrame, limit: int) -> pa.Table | None:
    """The rows; None where they are more than `limit`, or too many bytes for the driver."""
    try:
        table = rows.toArrow()
    except Exception as error:
        if "spark.driver.maxResultSize" not in str(error):
            raise
        return None
    return table if table.num_rows <= limit else None
