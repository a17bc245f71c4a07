"""Reading and writing the Delta tables, by path or by catalog name; no transformation logic.

Two engines write: delta-rs what lies in this process, where the tables are in a folder of this machine; Spark all else
(see storage.engine). Both write the same format, and what one has written the other reads.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from delta.exceptions import (
    ConcurrentAppendException,
    ConcurrentDeleteDeleteException,
    ConcurrentDeleteReadException,
    ConcurrentTransactionException,
    ConcurrentWriteException,
    MetadataChangedException,
)
from delta.tables import DeltaTable
from deltalake.exceptions import CommitFailedError
from pyspark.errors import AnalysisException
from pyspark.sql import DataFrame, DataFrameWriter, SparkSession

from nightstream.errors import TableError, WriterBusyError
from nightstream.runtime.session import is_remote
from nightstream.runtime.settings import StorageSettings
from nightstream.store import delta_sql, sql_text
from nightstream.store.delta_rs import TAKEN_OVER, DeltaRs
from nightstream.store.delta_sql import SqlTable
from nightstream.store.fence import APPLICATION, Fence
from nightstream.store.materialize import LOCAL_ROWS, Cut
from nightstream.store.merge import Action, Merge, Replacement
from nightstream.store.tables import FENCED, TableSpec, arrow_schema, arrow_table

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
    CommitFailedError,
)
_CLAUSES: dict[Action, str] = {
    "update": "whenMatchedUpdateAll",
    "insert": "whenNotMatchedInsertAll",
    "delete": "whenMatchedDelete",
}
_IN_MERGE = ("spark.databricks.delta.write.txnAppId", "spark.databricks.delta.write.txnVersion")


class Storage:
    """The tables of one installation under `settings.root`.

    conflicts: how often a write of this object has been tried again because a concurrent writer got ahead.
    fence: of the newest lease that this object was given to; writes of FENCED tables are under it, also when the lease
    has ended. local: the tables as delta-rs sees them; None where they lie in no folder of this machine.
    """

    def __init__(self, spark: SparkSession, settings: StorageSettings) -> None:
        self.spark = spark
        self.settings = settings
        self.conflicts = 0
        self.fence: Fence | None = None
        self._lock = threading.Lock()
        self._writing: dict[str, threading.RLock] = {}
        self._merging: SparkSession | None = None
        # Delta's table builder takes a relative path for a table name.
        self._root = str(Path(settings.root).absolute()) if settings.is_folder else settings.root.rstrip("/")
        # A Spark Connect server may be on another machine.
        self.local = DeltaRs(self._root) if settings.is_folder and not is_remote(spark) else None

    @property
    def writer(self) -> DeltaRs | None:
        """delta-rs, where it writes what lies in this process."""
        return None if self.settings.engine == "spark" else self.local

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
        if self.local is not None:
            return self.local.exists(spec)
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
            if self.writer is not None:
                self.writer.create(spec)
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
            raise TableError.missing(spec.name, self.location(spec)) from error
        return frame

    def read_or_empty(self, spec: TableSpec) -> DataFrame:
        return self.read(spec) if self.exists(spec) else self.spark.createDataFrame([], spec.schema)

    def query(self, sql: str, *specs: TableSpec, **values: sql_text.Value) -> pa.Table:
        """What a query answers that has few rows, whatever the number of users and events.

        Args:
            sql: what Spark and DataFusion both read; tables stand in braces, values behind a colon.
            *specs: the tables in it.
            **values: by name; several stand for what is in the brackets of IN.

        Returns:
            The rows, times in UTC.

        Raises:
            TableError: one of the tables is missing.
        """
        if self.local is not None:
            return self.local.query(sql, specs, values)
        frames: dict[str, Any] = {spec.name: self.read(spec) for spec in specs}
        return self.spark.sql(sql_text.for_spark(sql, values), **frames).toArrow()

    def few_rows(self, spec: TableSpec, condition: str, **values: sql_text.Value) -> pa.Table | None:
        """The rows under a condition, on the driver; None where they are more than LOCAL_ROWS.

        Args:
            spec: the table.
            condition: in SQL, values behind a colon; see `query`.
            **values: by name.

        Raises:
            TableError: the table is missing.
        """
        sql = f"SELECT {', '.join(spec.schema.names)} FROM {{{spec.name}}} WHERE {condition} LIMIT :most"
        rows = self.query(sql, spec, most=LOCAL_ROWS + 1, **values)
        return rows.cast(arrow_schema(spec.schema)) if rows.num_rows <= LOCAL_ROWS else None

    def version(self, spec: TableSpec) -> int | None:
        """The number of the table's newest commit; None where there is no table."""
        if not self.exists(spec):
            return None
        if self.local is not None:
            return self.local.version(spec)
        row = self.table(spec).history(1).select("version").first()
        return None if row is None else row.version

    def append(self, spec: TableSpec, rows: DataFrame | Cut) -> None:
        """Append in one commit. Raises WriterBusyError where another process has taken the tables over."""
        self.create(spec)
        table = rows.table if isinstance(rows, Cut) else None
        with self._write(spec) as fence:
            if self.writer is not None and table is not None:
                self.writer.append(spec, table, fence)
                return
            self._save(spec, _frame(rows).select(*spec.schema.names).write.format("delta").mode("append"), fence)

    def append_values(self, spec: TableSpec, values: list[tuple[Any, ...]]) -> None:
        """Append rows of Python values, in the order of the columns, in one commit."""
        self.append(spec, Cut.of(self.spark, arrow_table(spec.schema, values), spec.schema))

    def merge(self, spec: TableSpec, rows: DataFrame | Cut, merge: Merge) -> None:
        """MERGE rows, in one commit.

        Args:
            spec: the table.
            rows: with its columns.
            merge: what becomes of them.

        Raises:
            CONFLICTS: a concurrent writer got ahead.
            WriterBusyError: another process has taken the tables over.
        """
        self.create(spec)
        table = rows.table if isinstance(rows, Cut) else None
        with self._write(spec) as fence:
            if self.writer is not None and table is not None:
                self.writer.merge(spec, table, merge, fence)
                return
            target = self.table(spec) if fence is None else self._fenced(spec, fence)
            merge.add_to(target.alias("t").merge(_frame(rows).alias("s"), merge.on), _CLAUSES).execute()

    def replace(
        self, spec: TableSpec, rows: DataFrame | Cut, replacement: Replacement, buckets: Sequence[int] | None
    ) -> None:
        """Put rows in the place of older ones of their users: each user's in one commit, many users' in several.

        Args:
            spec: the table.
            rows: with its columns.
            replacement: which rows are the same.
            buckets: see Replacement.as_merge.

        Raises:
            CONFLICTS: a concurrent writer got ahead.
            WriterBusyError: another process has taken the tables over.
        """
        table = rows.table if isinstance(rows, Cut) else None
        if self.writer is None or table is None:
            self.merge(spec, rows, replacement.as_merge(buckets))
            return
        self.create(spec)
        with self._write(spec) as fence:
            self.writer.replace(spec, table, replacement, buckets, fence)

    def seal(self, *specs: TableSpec) -> None:
        """Let each table, made where it is missing, know the epoch of the fence: older ones can write it no more."""
        self.create(*specs)
        for spec in specs:
            with self._write(spec) as fence:
                if fence is None:
                    continue
                if self.local is not None:
                    self.local.seal(spec, fence)
                else:
                    nothing = self.spark.createDataFrame([], spec.schema)
                    self._save(spec, nothing.write.format("delta").mode("append"), fence)

    def overwrite(self, spec: TableSpec, rows: DataFrame, where: str | None = None) -> None:
        """Replace the whole table, or the rows that `where` selects, in one commit, by Spark."""
        self.create(spec)
        writer = rows.select(*spec.schema.names).write.format("delta").mode("overwrite")
        if where is not None:
            writer = writer.option("replaceWhere", where)
        with self._write(spec) as fence:
            self._save(spec, writer, fence)

    def lay_out(self, spec: TableSpec, rows: DataFrame, partition: str | None) -> None:
        """Replace the whole table, in one commit, by one that is partitioned by this column, or by none."""
        writer = rows.select(*spec.schema.names).write.format("delta").mode("overwrite")
        writer = writer.option("overwriteSchema", "true")
        if partition is not None:
            writer = writer.partitionBy(partition)
        with self._write(spec) as fence:
            self._save(spec, writer, fence)

    def table(self, spec: TableSpec) -> DeltaTable | SqlTable:
        self.create(spec)
        if is_remote(self.spark):
            return SqlTable(self.spark, self.sql_name(spec))
        if self._by_name:
            return DeltaTable.forName(self.spark, self.location(spec))
        return DeltaTable.forPath(self.spark, self.location(spec))

    @contextmanager
    def _write(self, spec: TableSpec) -> Iterator[Fence | None]:
        """One write to the table at a time, by this object: Spark's log of a local table is not safe beside another
        writer. Gives the fence that the write is under."""
        with self._lock:
            lock = self._writing.setdefault(spec.name, threading.RLock())
        with lock:
            fence = self.fence if spec in FENCED else None
            try:
                yield fence
            except ConcurrentTransactionException as error:
                if fence is None:
                    raise
                raise WriterBusyError(TAKEN_OVER) from error

    def _save(self, spec: TableSpec, writer: DataFrameWriter, fence: Fence | None) -> None:
        if fence is not None:
            writer = writer.option("txnAppId", APPLICATION).option("txnVersion", fence.next())
        if self._by_name:
            writer.saveAsTable(self.location(spec))
        else:
            writer.save(self.location(spec))

    def _fenced(self, spec: TableSpec, fence: Fence) -> DeltaTable | SqlTable:
        """The table for a MERGE whose commit carries the fence: Delta reads that from the session.

        It is one of our own, for it concerns each statement in it. Over Spark Connect frames can't go to another
        session: there a MERGE is not fenced.
        """
        if is_remote(self.spark):
            return self.table(spec)
        with self._lock:
            if self._merging is None:
                self._merging = _like(self.spark)
                self._merging.conf.set(_IN_MERGE[0], APPLICATION)
            # Versions only grow, so it does no harm that MERGEs of several tables share the setting.
            self._merging.conf.set(_IN_MERGE[1], str(fence.next()))
        by = DeltaTable.forName if self._by_name else DeltaTable.forPath
        return by(self._merging, self.location(spec))

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
                with self._lock:
                    self.conflicts += 1
                log.warning("concurrent write, trying again", extra={"what": what, "attempt": attempt})
                time.sleep(random.uniform(0.1, 0.5) * attempt)
        raise AssertionError("unreachable")


def _frame(rows: DataFrame | Cut) -> DataFrame:
    return rows.rows if isinstance(rows, Cut) else rows


def _like(spark: SparkSession) -> SparkSession:
    """Another session of the same application, with the same settings."""
    session = spark.newSession()
    own = session.conf.getAll
    for key, value in spark.conf.getAll.items():
        if own.get(key) != value:
            # Of what belongs to the application it has the same anyway.
            with suppress(Exception):
                session.conf.set(key, value)
    return session
