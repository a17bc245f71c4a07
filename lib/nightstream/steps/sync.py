"""The key-value copy: follows `refreshes` into PostgreSQL or Redis.

Tables in a folder are followed by their commits, without Spark, which takes longer to start than to copy; tables in a
catalog or an object store by Structured Streaming. Both write with key_value.write.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.parquet as pq

from nightstream.errors import SettingsError, TableError
from nightstream.runtime import secrets
from nightstream.runtime.clock import utc_now
from nightstream.runtime.settings import Settings, SyncSettings
from nightstream.serving import key_value, targets
from nightstream.serving.key_value import COLUMNS, Patient, Position, Stopped, Tally, Target
from nightstream.store.delta_rs import DeltaRs
from nightstream.store.tables import REFRESHES

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession
    from pyspark.sql.streaming.query import StreamingQuery

    from nightstream.store.storage import Storage

log = logging.getLogger(__name__)

FILES, SPARK = "files", "spark"
# Commits that are read before the position moves.
MOST_COMMITS = 200
MOST_VAIN_READS = 5
# How often the folder is listed, and the target is asked for its position, while nothing is new.
LOOK_SECONDS = 5.0
REPORT_SECONDS = 10.0
_TALLY = "rows long, written long, refused long, delays array<double>, slowest double"
_DELAYS_PER_TASK = 100
_READ_AHEAD_BYTES = 1 << 20
# What ends a query that can go on once everything is read anew.
_LOST = ("LostError", "DELTA_MISSING_FILES_UNEXPECTED_VERSION", "FILE_NOT_EXIST", "DELTA_FILE_NOT_FOUND")
# run_id -> who counts what the micro-batches of a query in this process have written.
_RUNS: dict[str, _Progress] = {}


def run(
    settings: Settings,
    spark: SparkSession | None = None,
    stop: Callable[[], bool] = lambda: False,
    until_idle: bool = False,
) -> dict[str, Any]:
    """Copy the newest list of every user, then every new one, until it is stopped.

    Args:
        settings: of the installation.
        spark: follows the table where it lies in no folder of this machine; None where it does.
        stop: asked several times a second.
        until_idle: copy what is there and end.

    Returns:
        Tally.summary; {} over Spark Connect, where micro-batches run on the server and only its log has the figures.

    Raises:
        SettingsError: sync.target or sync.url is missing or wrong.
        TableError: there is no table, or it is older than the copy.
        MachineError: a package is missing, or the server does not answer at the start or for sync.retry_seconds.
    """
    progress = _Progress(Tally(utc_now()), stop)
    sync = settings.sync
    kind, url = _server(sync)
    target_there = targets.target_of(kind, url, sync.table, sync.prefix)
    with closing(Patient(target_there, sync.retry_seconds, stop)) as target:
        try:
            if spark is None:
                follow(Commits(Path(settings.storage.root)), target, sync, progress, stop, until_idle)
            else:
                _follow_by_spark(spark, settings, target, progress, stop, until_idle)
        except Stopped:
            pass
    progress.report()
    if spark is not None:
        from nightstream.runtime.session import is_remote

        if is_remote(spark):
            return {}
    return progress.tally.summary()


class Commits:
    """The commits of `refreshes` in a folder, read as files: to ask for the next one is to look for its name.

    root: the folder of the tables. What was cleaned up, rewritten or vacuumed before it was read leads to reading
    everything, which is right because of the revisions.
    """

    def __init__(self, root: Path) -> None:
        self._tables = DeltaRs(str(root.absolute()))
        self._folder = Path(self._tables.path(REFRESHES))
        self._log = self._folder / "_delta_log"
        self._next_look = 0.0
        self.id = str(self._tables.open(REFRESHES).metadata().id)

    def since(self, at: int | None) -> Unread | None:
        """What is new after that version, everything where it is None; None where nothing is.

        Raises TableError where the table is missing, another one, or older than that version.
        """
        if at is None:
            return self._everything()
        files: list[str] = []
        version = at
        while version - at < MOST_COMMITS and (added := self._added(version + 1)) is not None:
            # The newest first: of a user who is in several commits one row is sent.
            files[:0] = added
            version += 1
        if version > at:
            return Unread(files, version)
        if time.monotonic() < self._next_look:
            return None
        newest = self._newest()
        self._next_look = time.monotonic() + LOOK_SECONDS
        if newest < at:
            raise TableError(
                f"table {REFRESHES.name} at {self._folder} is older than its copy and can no longer replace its rows; "
                "empty it, or name another sync.table or sync.prefix"
            )
        # The log of a commit is deleted some time after it was checkpointed.
        return self._everything() if newest > at and self._added(at + 1) is None else None

    def batches(self, unread: Unread, at_once: int, stop: Callable[[], bool]) -> Iterator[pa.RecordBatch]:
        """COLUMNS of the rows, so many at once. Raises FileNotFoundError where a file was vacuumed, Stopped."""
        for file in unread.files:
            # No more than a part of a file is in memory.
            with pq.ParquetFile(self._folder / file, buffer_size=_READ_AHEAD_BYTES, pre_buffer=False) as rows:
                for batch in rows.iter_batches(at_once, columns=list(COLUMNS), use_threads=False):
                    if stop():
                        raise Stopped
                    yield batch

    def _everything(self) -> Unread:
        table = self._tables.open(REFRESHES)
        files = pa.table(table.get_add_actions()).select(["path", "modification_time"])
        newest_first = files.sort_by([("modification_time", "descending")])["path"].to_pylist()
        return Unread([unquote(path) for path in newest_first], table.version())

    def _added(self, version: int) -> list[str] | None:
        """The files that a commit has added, without those that only arrange older rows anew; None where it is not
        there."""
        try:
            text = (self._log / f"{version:020}.json").read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        files = []
        for action in map(json.loads, text.splitlines()):
            if action.get("add", {}).get("dataChange"):
                files.append(unquote(action["add"]["path"]))
            if "metaData" in action and action["metaData"]["id"] != self.id:
                raise TableError(
                    f"table {REFRESHES.name} at {self._folder} was made anew; start this command again, "
                    "with the copy emptied or under another sync.table or sync.prefix"
                )
        return files

    def _newest(self) -> int:
        try:
            names = [name for name in (entry.name for entry in self._log.iterdir()) if name[:20].isdigit()]
        except FileNotFoundError:
            names = []
        if not names:
            raise TableError.missing(REFRESHES.name, str(self._folder))
        return max(int(name[:20]) for name in names)


@dataclass(frozen=True)
class Unread:
    """Files to read, the newest first, after which a copy is at that version."""

    files: list[str]
    version: int


class _Progress:
    """Counts what was written, and tells it every REPORT_SECONDS. stop: that of the run which counts."""

    def __init__(self, tally: Tally, stop: Callable[[], bool]) -> None:
        self.tally, self.stop = tally, stop
        self._unreported = Tally(tally.since)
        self._last = time.monotonic()

    def add(self, tally: Tally) -> None:
        self.tally.add(tally)
        self._unreported.add(tally)
        self.report_in_time()

    def report_in_time(self) -> None:
        if time.monotonic() - self._last >= REPORT_SECONDS:
            self.report()

    def report(self) -> None:
        self._last = time.monotonic()
        if self._unreported.rows:
            figures = self._unreported.summary().items()
            log.info("copied", extra={name: value for name, value in figures if value is not None})
        self._unreported = Tally(self.tally.since)


def follow(
    commits: Commits,
    target: Patient,
    sync: SyncSettings,
    progress: _Progress,
    stop: Callable[[], bool],
    until_idle: bool,
) -> None:
    """Write the rows of a table in a folder, everything first, then what each commit adds.

    The position moves after the rows. Where the server may have lost some (it was connected anew, or its position is
    not where this process has left it), they are written again from the position that it has.

    Args:
        commits: of the table.
        target: not connected yet.
        sync: settings.
        progress: takes what was written.
        stop: asked between two polls, and while rows are read.
        until_idle: return when nothing is new.

    Raises:
        Stopped: `stop` said so in the midst of reading or waiting.
        TableError, MachineError: see run.
    """
    target.connect()
    kept, at = _position(target, commits.id, FILES)
    log.info("following refreshes", extra={"to": target.name, "from_version": "all" if at is None else at})
    next_look, vain = time.monotonic() + LOOK_SECONDS, 0
    while not stop():
        connections, unread = target.connections, commits.since(at)
        if unread is None:
            if until_idle:
                return
            progress.report_in_time()
            key_value.sleep(sync.poll_seconds, stop)
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + LOOK_SECONDS
                if target.position() != kept:
                    kept, at = _lost(target, commits.id)
            continue
        try:
            rows = commits.batches(unread, sync.batch_rows, stop)
            progress.add(key_value.write(rows, target, sync.batch_rows, progress.tally.since, utc_now))
        except FileNotFoundError as error:
            vain += 1
            if vain > MOST_VAIN_READS:
                raise TableError(
                    f"a file of table {REFRESHES.name} is missing ({error}); let VACUUM keep files longer"
                ) from error
            at = None
            continue
        after = Position(commits.id, FILES, unread.version).text()
        moved = target.move(kept, after)
        if moved and target.connections == connections:
            kept, at, vain = after, unread.version, 0
        else:
            before = at
            kept, at = _lost(target, commits.id)
            if target.connections != connections:
                # The position may be newer than the rows that went over the connection before.
                at = None if at is None or before is None else min(at, before)


def _position(target: Target, table: str, reader: str) -> tuple[str | None, int | None]:
    """The position that the target keeps, and where a reader goes on; None for everything."""
    kept, position = key_value.position_in(target, table)
    return kept, position.at if position is not None and position.reader == reader else None


def _lost(target: Target, table: str) -> tuple[str | None, int | None]:
    kept, at = _position(target, table, FILES)
    log.warning("the server was changed meanwhile: copying again", extra={"from_version": "all" if at is None else at})
    return kept, at


def _server(sync: SyncSettings) -> tuple[targets.Kind, str]:
    """The kind of the server, and its address with the secrets in it. Raises SettingsError for what is missing."""
    if sync.target is None or sync.url is None:
        missing = "sync.target: write postgresql or redis" if sync.target is None else "sync.url: write its address"
        raise SettingsError([f"{missing}, the server that the lists are copied to"])
    references = [match.group() for match in secrets.REFERENCE.finditer(sync.url)]
    values, problems = secrets.resolve({text: text for text in references})
    if problems:
        raise SettingsError([f"sync.url: {problem}" for problem in problems])
    if references == [sync.url]:
        return sync.target, values[sync.url]
    # A password in the midst of an address may hold characters that mean something there.
    return sync.target, secrets.REFERENCE.sub(lambda match: quote(values[match.group()], safe=""), sync.url)


class LostError(Exception):
    """The target lacks what earlier micro-batches have written."""


@dataclass(frozen=True)
class WriteBatch:
    """The function that foreachBatch calls: it can be pickled, and connects where it runs.

    table: id of the Delta table. reader: of the position. run_id: under which the figures are counted.
    """

    sync: SyncSettings
    table: str
    reader: str
    run_id: str
    since: datetime
    kind: targets.Kind
    url: str = field(repr=False)

    def __call__(self, rows: DataFrame, batch_id: int) -> None:
        """Write a micro-batch; repeating it changes nothing. Raises LostError, MachineError."""
        after = Position(self.table, self.reader, batch_id).text()
        with closing(self.target()) as target:
            while True:
                kept, position = key_value.position_in(target, self.table)
                if position is None or position.reader != self.reader or position.at < batch_id - 1:
                    raise LostError(f"{target.name} has lost its position")
                connections = target.connections
                tally = self._write(rows)
                # A server that was away meanwhile, and may have lost rows, has to be connected anew for this.
                if target.move(kept, after) and target.connections == connections:
                    break
        if (progress := _RUNS.get(self.run_id)) is not None:
            progress.add(tally)
        else:
            log.info("copied", extra={n: v for n, v in tally.summary().items() if v is not None})

    def target(self) -> Patient:
        progress = _RUNS.get(self.run_id)
        stop = (lambda: False) if progress is None else progress.stop
        target = targets.target_of(self.kind, self.url, self.sync.table, self.sync.prefix)
        return Patient(target, self.sync.retry_seconds, stop)

    def write(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """The rows of a partition, written where they are; one row of figures."""
        with closing(self.target()) as target:
            tally = key_value.write(batches, target, self.sync.batch_rows, self.since, utc_now)
        delays = list(tally.delays)[-_DELAYS_PER_TASK:]
        figures = [[tally.rows], [tally.written], [tally.refused], [delays], [tally.slowest]]
        kinds = (pa.int64(), pa.int64(), pa.int64(), pa.list_(pa.float64()), pa.float64())
        names = ("rows", "written", "refused", "delays", "slowest")
        yield pa.record_batch([pa.array(v, k) for v, k in zip(figures, kinds, strict=True)], list(names))

    def _write(self, rows: DataFrame) -> Tally:
        from pyspark.sql import functions as F

        figures = rows.select(*COLUMNS).mapInArrow(self.write, _TALLY)
        sums = (F.coalesce(F.sum(name), F.lit(0)).alias(name) for name in ("rows", "written", "refused"))
        delays = F.flatten(F.collect_list("delays")).alias("delays")
        row = figures.agg(*sums, delays, F.max("slowest").alias("slowest")).first()
        tally = Tally(self.since)
        if row is not None:
            tally.rows, tally.written, tally.refused = row.rows, row.written, row.refused
            tally.add_delays(row.delays, row.slowest)
        return tally


def _follow_by_spark(
    spark: SparkSession,
    settings: Settings,
    target: Patient,
    progress: _Progress,
    stop: Callable[[], bool],
    until_idle: bool,
) -> None:
    """As `follow`, by a streaming query. Its checkpoint belongs to what the target has: where that, or what is left of
    the table's log, no longer fits, a new checkpoint reads everything."""
    from nightstream.runtime.spark_errors import has_new_columns, ours_in
    from nightstream.store.storage import Storage

    storage = Storage(spark, settings.storage)
    storage.read(REFRESHES)
    detail = spark.sql(f"DESCRIBE DETAIL {storage.sql_name(REFRESHES)}").first()
    table = "" if detail is None else str(detail.id)
    target.connect()
    run_id, is_lost, vain, rows = uuid.uuid4().hex, False, 0, 0
    _RUNS[run_id] = progress
    try:
        while not stop():
            kept, position = key_value.position_in(target, table)
            reader = position.reader if position is not None else ""
            if is_lost or not reader.startswith(f"{SPARK}-"):
                reader = f"{SPARK}-{uuid.uuid4().hex}"
                if not target.move(kept, Position(table, reader, -1).text()):
                    continue
            log.info("following refreshes", extra={"to": target.name, "reader": reader})
            function = WriteBatch(settings.sync, table, reader, run_id, progress.tally.since, *_server(settings.sync))
            query = _query(storage, function, until_idle)
            try:
                if _run_out(query, partial(_is_at, target, function), stop):
                    return
                is_lost = True
            except Exception as error:
                if stop():
                    return
                vain = vain + 1 if progress.tally.rows == rows else 1
                is_lost = any(sign in str(error) for sign in _LOST)
                if vain > MOST_VAIN_READS or not (is_lost or has_new_columns(error)):
                    raise ours_in(error) or error from error
            rows = progress.tally.rows
            log.warning("starting the query again", extra={"from": "all" if is_lost else "where it was"})
    finally:
        del _RUNS[run_id]


def _query(storage: Storage, function: WriteBatch, until_idle: bool) -> StreamingQuery:
    # What deletes or updates rows of an append-only table brings no list.
    rows = storage.spark.readStream.format("delta").option("skipChangeCommits", "true")
    place = storage.location(REFRESHES)
    frame = rows.table(place) if storage.settings.kind == "catalog" else rows.load(place)
    writer = frame.select(*COLUMNS).writeStream.foreachBatch(function).queryName("nightstream-sync")
    writer = writer.option("checkpointLocation", f"{function.sync.checkpoint.rstrip('/')}/{function.reader}")
    if until_idle:
        return writer.trigger(availableNow=True).start()
    return writer.trigger(processingTime=f"{function.sync.poll_seconds} seconds").start()


def _run_out(query: StreamingQuery, is_at: Callable[[], bool], stop: Callable[[], bool]) -> bool:
    """Wait until the query is to end, and end it; returns whether the target still has its position."""
    next_look = time.monotonic() + LOOK_SECONDS
    try:
        while not query.awaitTermination(1):
            if stop():
                return True
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + LOOK_SECONDS
                if not is_at():
                    return False
        return True
    finally:
        query.stop()


def _is_at(target: Patient, function: WriteBatch) -> bool:
    position = key_value.position_in(target, function.table)[1]
    return position is not None and position.reader == function.reader
