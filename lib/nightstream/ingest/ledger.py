"""The books of what arrived: raw_events = events + quarantine + duplicates, to the row, through replays and crashes.

Every payload row ends in exactly one of events, quarantine and duplicates. There must be one recording process at a
time: two at once could both take an event for new.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from nightstream.errors import TableError
from nightstream.ingest import history, parse, resolve
from nightstream.ingest.id_filter import HASHES, KnownIds, with_hashes
from nightstream.runtime.settings import Settings
from nightstream.store.concurrency import finish, start
from nightstream.store.materialize import LOCAL_ROWS, Cut, cut
from nightstream.store.storage import Storage
from nightstream.store.tables import DUPLICATES, EVENTS, QUARANTINE, RAW_EVENTS, TableSpec

log = logging.getLogger(__name__)

TABLES = (RAW_EVENTS, EVENTS, QUARANTINE, DUPLICATES)
# Up to so many rows of a batch, their ids (some 50 bytes each) go to every task instead of shuffling `events`.
_BROADCAST_ROWS = 200_000
_ROWS_PER_FILE = 500_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Counts:
    """What the payload rows of one call are in the tables now; raw = events + quarantine + duplicates."""

    raw: int = 0
    events: int = 0
    quarantine: int = 0
    duplicates: int = 0


@dataclass(frozen=True)
class Recorded:
    """The outcome of one call of `record`.

    counts: rows of this call by where they ended, the ones that were there already included.
    added: rows that this call added to each table by name (a superseding event adds none to events, its predecessor
    one to duplicates). After a crash, the replay counts only what it had to add itself.
    accepted: EVENTS rows of this call to be folded into windows, as events.foldable gives them; the same on
    a replay. None when nothing valid came.
    accepted_table: the same rows where they are few enough to be on the driver, else None.
    refold_users: user_id of the users whose windows must be folded again from `events`, distinct; None when nobody.
    first_arrival, last_arrival: the earliest and the latest arrival time of the rows (UTC); None when they have none.
    oldest_event, newest_event: the earliest and the latest event time of the valid rows; None where nothing valid came.
    """

    counts: Counts
    added: dict[str, int]
    accepted: DataFrame | None = None
    accepted_table: pa.Table | None = None
    refold_users: DataFrame | None = None
    first_arrival: datetime | None = None
    last_arrival: datetime | None = None
    oldest_event: datetime | None = None
    newest_event: datetime | None = None
    _cuts: list[Cut] = field(default_factory=list, repr=False)
    _writes: list[Future[None]] = field(default_factory=list, repr=False)

    def written(self) -> None:
        """Wait until all is in the tables. Raises what the writes have met."""
        finish(self._writes)

    def release(self) -> None:
        """Free the cached rows; the frames stay usable and are computed again."""
        for each in self._cuts:
            each.release()


def parsed(payloads: DataFrame, settings: Settings) -> DataFrame:
    """Payload rows with what `events.parse` reads in them under these settings."""
    source = settings.sources.events
    return parse.parse(payloads, source.columns, source.time_unit, settings.events, settings.serving.default_user)


def arrive(arrived: DataFrame, settings: Settings, micro_batch: bool = False) -> Cut:
    """The rows of `parsed` with their raw_id, cut off for `book`; those of a small micro-batch are on the driver."""
    totals = {
        "raw": F.count(F.lit(1)),
        "quarantine": F.count("reason"),
        "retractions": F.count_if(F.col("event_type") == settings.events.retraction_type),
        "first_arrival": F.min(F.unix_micros("arrival_time")),
        "last_arrival": F.max(F.unix_micros("arrival_time")),
        "oldest_event": F.min(F.unix_micros("event_time")),
        "newest_event": F.max(F.unix_micros("event_time")),
    }
    if not micro_batch:
        # A batch source is large: to try it on the driver first would read it twice.
        return cut(parse.raw_rows(arrived), totals, limit=0)
    return cut(with_hashes(parse.raw_rows(arrived)), totals)


def book(
    storage: Storage,
    arriving: Cut,
    settings: Settings,
    micro_batch: bool = False,
    fresh: bool = False,
    known_ids: KnownIds | None = None,
) -> Recorded:
    """Book the rows of `arrive` (payload, source, position, arrival_time, and what was read) into the four tables.

    Repeating a call with the same rows adds nothing, and completes what a crash left half-done.
    micro_batch: the rows are those of a stream, few or many; the appends may still run when this returns, and
    `Recorded.written` waits for them. Without it (batch ingest), raw_events is written last, and its rows tell what
    was booked completely. fresh: nobody has tried to book these rows before, so they need not be looked for in
    raw_events. Delta's own txnAppId would tell that too, at the price of a job over the table's log per append.
    known_ids: of all that `events` holds, kept up to date here; without it the table is asked for the ids.
    Raises TableError when `events` holds an event_id more than once.
    """
    storage.create(*TABLES)
    if not arriving.totals["raw"]:
        arriving.release()
        return Recorded(Counts(), {t.name: 0 for t in TABLES})
    return _Booking(storage, settings, arriving, micro_batch, fresh, known_ids).run()


def record(
    storage: Storage, arrived: DataFrame, settings: Settings, micro_batch: bool = False, fresh: bool = False
) -> Recorded:
    """`arrive` and `book`."""
    return book(storage, arrive(arrived, settings, micro_batch), settings, micro_batch, fresh)


def is_balanced(storage: Storage) -> bool:
    """Whether raw_events = events + quarantine + duplicates; not so after a write that was cut off, until its rows have
    come again."""
    rows = _row_counts(storage)
    return rows["raw_events"] == rows["events"] + rows["quarantine"] + rows["duplicates"]


def _row_counts(storage: Storage) -> dict[str, int]:
    counted = [
        storage.read_or_empty(t).agg(F.count("*").alias("rows")).withColumn("table", F.lit(t.name)) for t in TABLES
    ]
    both = counted[0].unionByName(counted[1]).unionByName(counted[2].unionByName(counted[3]))
    return {r.table: r.rows for r in both.collect()}  # four rows


def check(storage: Storage) -> dict[str, int]:
    """The row counts of the four tables. Raises TableError unless raw_events = events + quarantine + duplicates."""
    rows = _row_counts(storage)
    total = rows["events"] + rows["quarantine"] + rows["duplicates"]
    if rows["raw_events"] != total:
        raise TableError(
            f"raw_events has {rows['raw_events']} rows, but events ({rows['events']}), "
            f"quarantine ({rows['quarantine']}) and duplicates ({rows['duplicates']}) have {total} together; "
            "a write was cut off: run the ingest again, or restart the stream with its checkpoint"
        )
    return rows


class _Booking:
    """One call of `record`, step by step."""

    def __init__(
        self,
        storage: Storage,
        settings: Settings,
        arrived: Cut,
        micro_batch: bool,
        fresh: bool,
        known_ids: KnownIds | None,
    ) -> None:
        self.storage, self.settings, self.known_ids = storage, settings, known_ids
        self.micro_batch, self.fresh = micro_batch, micro_batch and fresh
        self.cuts, self.parsed, self.table, totals = [arrived], arrived.rows, arrived.table, arrived.totals
        self.raw, self.quarantine, self.retractions = (totals[n] for n in ("raw", "quarantine", "retractions"))
        self.valid = self.raw - self.quarantine
        first, last = totals["first_arrival"], totals["last_arrival"]
        names = ("first_arrival", "last_arrival", "oldest_event", "newest_event")
        self.times = {n: None if totals[n] is None else _EPOCH + timedelta(microseconds=totals[n]) for n in names}
        # What a micro-batch wrote before has its rows' arrival times: Delta then skips most files of large tables.
        self.span: Column | None = None
        if micro_batch and first is not None:
            between = F.col("arrival_time").between(*(F.timestamp_micros(F.lit(t)) for t in (first, last)))
            self.span = F.col("arrival_time").isNull() | between
        self.retraction_type = settings.events.retraction_type
        self.small = self.raw <= _BROADCAST_ROWS
        self.only_new = False

    def run(self) -> Recorded:
        if not self.valid:
            added, writes = self._write(None, {})
            self._log(added)
            counts = Counts(self.raw, 0, self.quarantine, 0)
            return Recorded(counts, added, None, None, None, **self.times, _cuts=self.cuts, _writes=writes)
        resolved, found = self._resolved()
        added, writes = self._write(resolved, found)
        self._log(added)
        counts = Counts(self.raw, self.valid - found[resolve.DUPLICATE], self.quarantine, found[resolve.DUPLICATE])
        current = resolved.where(F.col("raw_id") == F.col("kept_raw_id"))
        refold = self._refold_users(resolved, current, found, writes)
        accepted = current.where(F.col("event_type") != self.retraction_type)
        accepted = accepted.withColumn("event_type", history.taken_back(F.col("dead"), self.retraction_type))
        accepted = accepted.select(*EVENTS.schema.names)
        table = None
        if self.table is not None:
            table = self._valid_table().select(EVENTS.schema.names) if self.only_new else accepted.toArrow()
        return Recorded(counts, added, accepted, table, refold, **self.times, _cuts=self.cuts, _writes=writes)

    def _valid_table(self) -> pa.Table:
        assert self.table is not None
        return self.table.filter(pc.is_null(self.table["reason"]))

    def _brings_only_new(self) -> bool:
        """Whether no event_id of the batch occurs twice, in it or in `events`, and no retraction is about."""
        if self.table is None:
            if self.known_ids is not None:
                self.known_ids.add_rows(self._valid_rows(), self.valid)
            return False
        valid = self._valid_table()
        if self.known_ids is not None:
            hashes = [np.asarray(valid[name], np.int64) for name in HASHES]
            met_before = self.known_ids.may_hold(hashes[0])
            # Known from here on, whatever becomes of this batch: a claim too many does no harm.
            self.known_ids.add(np.concatenate(hashes))
        if self.retractions or pc.count_distinct(valid["event_id"]).as_py() < self.valid:
            return False
        if self.known_ids is not None and not met_before:
            return True
        wanted = self.storage.spark.createDataFrame(valid.select(["event_id"]))
        found = resolve.mentions(self.storage.read(EVENTS), F.broadcast(wanted), self.retraction_type)
        # A replay finds as many as it brings, and so many are on the driver already.
        return found.select("event_id").toArrow().num_rows == 0

    def _resolved(self) -> tuple[DataFrame, dict[str, int]]:
        """The valid rows with their outcome, and how often each outcome occurs.

        Of `events` at one version: what is computed again later must not see what was written in between.
        """
        names = (resolve.NEW, resolve.SUPERSEDING, resolve.STORED, resolve.DUPLICATE)
        self.only_new = self._brings_only_new()
        if self.only_new:
            # The common case; what follows takes several jobs.
            return resolve.all_new(self._valid_rows()), {
                **dict.fromkeys(names, 0),
                resolve.NEW: self.valid,
                "retractions": 0,
            }
        totals = {n: F.count_if(F.col("outcome") == n) for n in names}
        retraction = (F.col("event_type") == self.retraction_type) & (F.col("raw_id") == F.col("kept_raw_id"))
        totals |= {"retractions": F.count_if(retraction), "damaged": F.count_if(F.col("copies") > 1)}
        version = None if self.valid <= LOCAL_ROWS else self.storage.version(EVENTS)
        resolved = cut(self._resolve(self.storage.read(EVENTS, version)), totals, size=self.valid)
        self.cuts.append(resolved)
        found: dict[str, Any] = resolved.totals
        if found["damaged"] or sum(found[n] for n in names) != self.valid:
            raise TableError(
                "table events holds an event_id more than once, written by two processes at a time; "
                "keep the newest row of each event_id and move the others to duplicates"
            )
        return resolved.rows, found

    def _valid_rows(self) -> DataFrame:
        return self.parsed.where(F.col("reason").isNull())

    def _resolve(self, before: DataFrame) -> DataFrame:
        valid = self._valid_rows()
        known = resolve.known(before, self._hint(valid.select("event_id")), self.retraction_type)
        tombstones = self._hint(history.tombstones(valid, self.retraction_type)) if self.retractions else None
        return resolve.settle(valid, self._hint(known), tombstones)

    def _write(self, resolved: DataFrame | None, found: dict[str, int]) -> tuple[dict[str, int], list[Future[None]]]:
        """Write what is not there yet; returns the rows added to each table, and the writes that still run."""
        added = {t.name: 0 for t in TABLES}
        tasks: list[Callable[[], None]] = []
        seen_before = found.get(resolve.STORED, 0) > 0
        if self.quarantine:
            rejected = self.parsed.where(F.col("reason").isNotNull())
            rejected, added["quarantine"] = self._unknown(QUARANTINE, rejected, self.quarantine)
            seen_before |= added["quarantine"] < self.quarantine
            tasks += self._append(QUARANTINE, rejected, added)
        superseding = found.get(resolve.SUPERSEDING, 0)
        if resolved is not None:
            added["events"] = found[resolve.NEW]
            tasks += self._append(EVENTS, resolved.where(F.col("outcome") == resolve.NEW), added)
            repeated = found[resolve.DUPLICATE] + superseding
            if repeated:
                copies, added["duplicates"] = self._unknown(DUPLICATES, _duplicates(resolved), repeated)
                seen_before |= added["duplicates"] < repeated
                tasks += self._append(DUPLICATES, copies, added)
        fresh, added["raw_events"] = self.parsed, self.raw
        if seen_before or not self.fresh:
            fresh, added["raw_events"] = self._unknown(RAW_EVENTS, self.parsed, self.raw)
        raw = self._append(RAW_EVENTS, fresh, added)
        if self.micro_batch and not superseding:
            return added, start([*tasks, *raw])
        finish(start([*tasks, *raw] if self.micro_batch else tasks))
        if resolved is not None and superseding:
            # After duplicates: from events alone a replay could no longer tell what was replaced.
            self._merge(resolved)
        if not self.micro_batch:
            finish(start(raw))
        return added, []

    def _unknown(self, spec: TableSpec, rows: DataFrame, count: int) -> tuple[DataFrame, int]:
        """The rows whose raw_id the table does not have yet, and how many they are; `count` is how many are given."""
        there = self.storage.read(spec, self.storage.version(spec))
        if self.span is not None and spec is not DUPLICATES:
            there = there.where(self.span)
        known = there.select("raw_id").join(self._hint(rows.select("raw_id")), "raw_id", "left_semi")
        hits = known.count()
        return (rows.join(self._hint(known), "raw_id", "left_anti") if hits else rows), count - hits

    def _append(self, spec: TableSpec, rows: DataFrame, added: dict[str, int]) -> list[Callable[[], None]]:
        if not added[spec.name]:
            return []
        files = added[spec.name] // _ROWS_PER_FILE + 1
        few = rows.coalesce(files) if self.small else rows
        return [lambda: self.storage.append(spec, few)]

    def _merge(self, resolved: DataFrame) -> None:
        superseding = resolved.where(F.col("outcome") == resolve.SUPERSEDING).select(*EVENTS.schema.names)
        rows = cut(superseding, {}, cached=False).rows
        newer = "struct(new.event_time, new.content_hash) > struct(old.event_time, old.content_hash)"

        def run() -> None:
            merge = self.storage.table(EVENTS).alias("old").merge(rows.alias("new"), "old.event_id = new.event_id")
            merge.whenMatchedUpdateAll(condition=newer).execute()

        self.storage.with_retries(run, self.settings.serving.merge_attempts, "events")

    def _refold_users(
        self, resolved: DataFrame, current: DataFrame, found: dict[str, int], writes: list[Future[None]]
    ) -> DataFrame | None:
        """Users of superseded and superseding events, and owners of retracted events.

        A replay finds the superseding event already in `events`; what it replaced is then known through duplicates.
        """
        replaced: list[DataFrame] = []
        if found[resolve.SUPERSEDING]:
            replaced.append(resolved.where(F.col("outcome") == resolve.SUPERSEDING).select("old.*"))
            replaced.append(resolved.where(F.col("outcome") == resolve.SUPERSEDING).select(*EVENTS.schema.names))
        if found[resolve.STORED] and self.micro_batch:
            replaced += self._replaced_before(current)
        retraction = F.col("event_type") == self.retraction_type
        # Who takes an event back need not be its user, and has no other window for it.
        users = [r.where(~retraction).select("user_id") for r in replaced]
        retracted = [r.where(retraction).select("retracts") for r in replaced]
        if found["retractions"]:
            retracted.append(current.where(retraction).select("retracts"))
        if retracted:
            targets = _all(retracted).select(F.col("retracts").alias("event_id")).distinct()
            # A retraction and its event may come together.
            finish(writes)
            users.append(
                self.storage.read(EVENTS).join(F.broadcast(targets), "event_id", "left_semi").select("user_id")
            )
        if not users:
            return None
        refold = cut(_all(users).distinct(), {"users": F.count("user_id")})
        self.cuts.append(refold)
        return refold.rows if refold.totals["users"] else None

    def _replaced_before(self, current: DataFrame) -> list[DataFrame]:
        stored = current.where(F.col("outcome") == resolve.STORED).select(F.col("raw_id").alias("kept_raw_id"))
        copies = self.storage.read(DUPLICATES).join(self._hint(stored), "kept_raw_id", "left_semi")
        raw = self.storage.read(RAW_EVENTS).join(F.broadcast(copies.select("raw_id")), "raw_id", "left_semi")
        old = parsed(raw, self.settings)
        old = old.where(F.col("reason").isNull()).select(*EVENTS.schema.names)
        return [] if old.isEmpty() else [old, current.select(*EVENTS.schema.names)]

    def _hint(self, rows: DataFrame) -> DataFrame:
        return F.broadcast(rows) if self.small else rows

    def _log(self, added: dict[str, int]) -> None:
        log.info("recorded", extra={"rows": self.raw, "added": added})


def _duplicates(resolved: DataFrame) -> DataFrame:
    """DUPLICATES rows: the repetitions of the batch, and the stored events that it replaces."""
    here = resolved.where(F.col("outcome") == resolve.DUPLICATE).select(*DUPLICATES.schema.names)
    replaced = resolved.where(F.col("outcome") == resolve.SUPERSEDING).select(
        "old.raw_id", "event_id", F.col("raw_id").alias("kept_raw_id"), "old.arrival_time"
    )
    return here.unionByName(replaced)


def _all(frames: list[DataFrame]) -> DataFrame:
    first, *rest = frames
    for frame in rest:
        first = first.unionByName(frame)
    return first
