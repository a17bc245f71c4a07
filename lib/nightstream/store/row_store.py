"""Rows of a table by user, in a local file of the one process that writes the table.

A micro-batch asks for a few hundred users, anywhere in the table: Spark would read all of it for them.
"""

from __future__ import annotations

import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import DataFrame

from nightstream.errors import MachineError

KEY = "user_id"
_ENCODED = "key string, revision long, row binary"
_AT_ONCE = 2_000
_PUT = (
    "INSERT INTO rows VALUES (?, ?, ?) ON CONFLICT (key) DO UPDATE SET row = excluded.row, "
    "revision = excluded.revision WHERE excluded.revision >= rows.revision"
)


class RowStore:
    """One row per user; of two, the one of the higher revision stays, so that rows may come in any order.

    file: where they go; it must not exist yet. schema: of the rows, user_id among them; without a column `revision`,
    what comes later stays. is_complete: whether a user without a row here has none in the table either. Safe to be
    used by several threads.
    """

    def __init__(self, file: Path, schema: pa.Schema) -> None:
        self.schema, self.is_complete, self.is_deleted = schema, False, False
        self._file = file
        self._lock = threading.Lock()
        self._rows = sqlite3.connect(file, check_same_thread=False, isolation_level=None)
        # The file ends with the process: nothing of it need survive a crash.
        for pragma in ("journal_mode = OFF", "synchronous = OFF", "cache_size = -65536"):
            self._rows.execute(f"PRAGMA {pragma}")
        self._rows.execute("CREATE TABLE rows (key TEXT PRIMARY KEY, revision INTEGER, row BLOB) WITHOUT ROWID")

    def get(self, users: Sequence[str]) -> pa.Table:
        """The rows of those of the users that have one here, in no particular order."""
        messages: list[bytes] = []
        with self._lock:
            for start in range(0, len(users), _AT_ONCE):
                part = users[start : start + _AT_ONCE]
                places = ",".join("?" * len(part))
                messages += [r for (r,) in self._rows.execute(f"SELECT row FROM rows WHERE key IN ({places})", part)]
        batches = [pa.ipc.read_record_batch(pa.py_buffer(row), self.schema) for row in messages]
        return pa.Table.from_batches(batches, self.schema).combine_chunks()

    def put(self, rows: pa.Table) -> None:
        """rows: with the columns of the schema, one per user."""
        for batch in rows.select(self.schema.names).cast(self.schema).to_batches():
            self._write(_encoded(batch))

    def put_batches(self, batches: Iterable[pa.RecordBatch], stop: Callable[[], bool] = lambda: False) -> None:
        """Rows of any number, with the columns of the schema. stop: asked after each part."""
        for batch in batches:
            for start in range(0, batch.num_rows, _AT_ONCE):
                if stop():
                    return
                self._write(_encoded(_cast(batch.slice(start, _AT_ONCE), self.schema)))

    def put_all(self, rows: DataFrame, scratch: Path, stop: Callable[[], bool] = lambda: False) -> None:
        """Rows of any number. scratch: a folder that does not exist yet, for driver and executors, through which they
        go a part at a time: what Spark hands over itself is at least a whole partition, in memory. stop: asked after
        each part. MachineError where the driver does not see what the executors wrote."""
        schema = self.schema

        def encode(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            for batch in batches:
                keys, revisions, encoded = zip(*_encoded(_cast(batch, schema)), strict=True) if batch else ((),) * 3
                yield pa.record_batch(
                    [pa.array(keys, pa.string()), pa.array(revisions, pa.int64()), pa.array(encoded, pa.binary())],
                    ["key", "revision", "row"],
                )

        try:
            rows.select(*schema.names).mapInArrow(encode, _ENCODED).write.parquet(str(scratch))
            files = sorted(scratch.glob("part-*.parquet"))
            if not files:
                # Spark writes at least one, be it empty.
                raise MachineError(
                    f"nothing of what the executors wrote is in {scratch}; "
                    "storage.work_dir must be one folder for them and the driver"
                )
            for file in files:
                for part in pq.ParquetFile(file).iter_batches(_AT_ONCE):
                    if stop():
                        return
                    self._write(list(zip(*(column.to_pylist() for column in part.columns), strict=True)))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def delete(self) -> None:
        """The file too; nothing can be asked afterwards."""
        with self._lock:
            self.is_complete, self.is_deleted = False, True
            self._rows.close()
            self._file.unlink(missing_ok=True)

    def _write(self, rows: Sequence[tuple[str, int, bytes]]) -> None:
        with self._lock:
            self._rows.execute("BEGIN")
            self._rows.executemany(_PUT, rows)
            self._rows.execute("COMMIT")


def _cast(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    return pa.Table.from_batches([batch]).select(schema.names).cast(schema).combine_chunks().to_batches()[0]


def _encoded(batch: pa.RecordBatch) -> list[tuple[str, int, bytes]]:
    """(user, revision, the row as an Arrow IPC message without its schema)."""
    keys = batch[KEY].to_pylist()
    revisions = batch["revision"].to_pylist() if "revision" in batch.schema.names else [0] * len(keys)
    rows = (batch.slice(place, 1).serialize().to_pybytes() for place in range(len(keys)))
    return list(zip(keys, revisions, rows, strict=True))
