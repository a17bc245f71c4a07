"""Reading and writing the Delta tables, by path or by catalog name; no transformation logic."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from delta.exceptions import (
    ConcurrentAppendException,
    ConcurrentDeleteDeleteException,
    ConcurrentDeleteReadException,
    ConcurrentTransactionException,
    ConcurrentWriteException,
    MetadataChangedException,
)
from delta.tables import DeltaTable
from pyspark.errors import AnalysisException
from pyspark.sql import DataFrame, DataFrameWriter, SparkSession

from nightstream.errors import TableError
from nightstream.runtime.session import is_remote
from nightstream.runtime.settings import StorageSettings
from nightstream.store import delta_sql
from nightstream.store.delta_sql import SqlTable
from nightstream.store.tables import TableSpec

log = logging.getLogger(__name__)
Result = TypeVar("Result")

# What Delta raises where a concurrent writer got ahead, in this process as over Spark Connect. To import them makes
# PySpark raise them in place of its general errors.
CONFLICTS = (
    ConcurrentAppendException,
    ConcurrentDeleteDeleteException,
    ConcurrentDeleteReadException,
    ConcurrentTransactionException,
    ConcurrentWriteException,
    MetadataChangedException,
)


class Storage:
    """The tables of one installation under `settings.root`.

    conflicts: how often a write of this object has been tried again because a concurrent writer got ahead.
    """

    def __init__(self, spark: SparkSession, settings: StorageSettings) -> None:
        self.spark = spark
        self.settings = settings
        self.conflicts = 0
        self._counting = threading.Lock()
        # Delta's table builder takes a relative path for a table name.
        local = settings.kind == "path" and "://" not in settings.root
        self._root = str(Path(settings.root).absolute()) if local else settings.root.rstrip("/")

    def location(self, spec: TableSpec) -> str:
        """Path of the table, or catalog.schema.name."""
        return f"{self._root}.{spec.name}" if self._by_name else f"{self._root}/{spec.name}"

    def sql_name(self, spec: TableSpec) -> str:
        """What the table is called in SQL."""
        location = self.location(spec)
        return location if self._by_name else delta_sql.path_name(location)

    def create_view(self, name: str, query: str) -> None:
        """Create or replace a view beside the tables; for storage.kind catalog only."""
        self.spark.sql(f"CREATE OR REPLACE VIEW {self._root}.{name} AS {query}")

    @property
    def _by_name(self) -> bool:
        return self.settings.kind == "catalog"

    def exists(self, spec: TableSpec) -> bool:
        if self._by_name:
            return self.spark.catalog.tableExists(self.location(spec))
        if is_remote(self.spark):
            return delta_sql.exists(self.spark, self.sql_name(spec))
        return DeltaTable.isDeltaTable(self.spark, self.location(spec))

    def create(self, *specs: TableSpec) -> None:
        """Create each table that is not there yet, empty."""
        for spec in specs:
            if self.exists(spec):
                continue
            if is_remote(self.spark):
                delta_sql.create(self.spark, self.sql_name(spec), spec)
                continue
            builder = DeltaTable.createIfNotExists(self.spark).addColumns(spec.schema).comment(spec.grain)
            builder = builder.tableName(self.location(spec)) if self._by_name else builder.location(self.location(spec))
            for key, value in spec.properties.items():
                builder = builder.property(key, value)
            builder.execute()

    def read(self, spec: TableSpec, version: int | None = None) -> DataFrame:
        """The table, its columns checked against the spec. Raises TableError where it is missing."""
        try:
            reader = self.spark.read.format("delta")
            if version is not None:
                reader = reader.option("versionAsOf", version)
            frame = reader.table(self.location(spec)) if self._by_name else reader.load(self.location(spec))
            spec.check(frame.columns)
        except AnalysisException as error:
            if self.exists(spec):
                raise
            raise TableError(
                f"table {spec.name} is missing at {self.location(spec)}; "
                "run the nightly job first or check storage.root"
            ) from error
        return frame

    def read_or_empty(self, spec: TableSpec) -> DataFrame:
        return self.read(spec) if self.exists(spec) else self.spark.createDataFrame([], spec.schema)

    def version(self, spec: TableSpec) -> int | None:
        """The number of the table's newest commit; None where there is no table."""
        if not self.exists(spec):
            return None
        row = self.table(spec).history(1).select("version").first()
        return None if row is None else row.version

    def append(self, spec: TableSpec, rows: DataFrame) -> None:
        """Append in one commit."""
        self.create(spec)
        self._save(spec, rows.select(*spec.schema.names).write.format("delta").mode("append"))

    def overwrite(self, spec: TableSpec, rows: DataFrame, where: str | None = None) -> None:
        """Replace the whole table, or the rows that `where` selects, in one commit."""
        self.create(spec)
        writer = rows.select(*spec.schema.names).write.format("delta").mode("overwrite")
        if where is not None:
            writer = writer.option("replaceWhere", where)
        self._save(spec, writer)

    def lay_out(self, spec: TableSpec, rows: DataFrame, partition: str | None) -> None:
        """Replace the whole table, in one commit, by one that is partitioned by this column, or by none."""
        writer = rows.select(*spec.schema.names).write.format("delta").mode("overwrite")
        writer = writer.option("overwriteSchema", "true")
        if partition is not None:
            writer = writer.partitionBy(partition)
        self._save(spec, writer)

    def table(self, spec: TableSpec) -> DeltaTable | SqlTable:
        self.create(spec)
        if is_remote(self.spark):
            return SqlTable(self.spark, self.sql_name(spec))
        if self._by_name:
            return DeltaTable.forName(self.spark, self.location(spec))
        return DeltaTable.forPath(self.spark, self.location(spec))

    def _save(self, spec: TableSpec, writer: DataFrameWriter) -> None:
        if self._by_name:
            writer.saveAsTable(self.location(spec))
        else:
            writer.save(self.location(spec))

    def with_retries(self, action: Callable[[], Result], attempts: int, what: str) -> Result:
        """What the action returns: a write, run again when a concurrent writer got ahead.

        Each repetition is logged and counted in `conflicts`.

        Args:
            action: the write, run as it is each time.
            attempts: how often it is run at most, 1 or more.
            what: the table's name, for the log.

        Raises:
            CONFLICTS: that of the last attempt. Any other error is raised at once.
        """
        for attempt in range(1, attempts + 1):
            try:
                return action()
            except CONFLICTS:
                if attempt == attempts:
                    raise
                with self._counting:
                    self.conflicts += 1
                log.warning("concurrent write, trying again", extra={"what": what, "attempt": attempt})
                time.sleep(random.uniform(0.1, 0.5) * attempt)
        raise AssertionError("unreachable")
