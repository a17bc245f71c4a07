"""Booking what arrived: resolve it against `events`, plan which rows go where and in which order, execute the plan.

All that is read is read before the first write, and a plan holds only rows that its tables lack: so a call that is
repeated, after a crash at any write, adds nothing twice and completes what is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from nightstream.errors import TableError
from nightstream.ingest import history, resolve
from nightstream.ingest.arrival import EPOCH, Arrival
from nightstream.ingest.id_filter import IdFilter, hashes
from nightstream.ingest.resolve import OUTCOMES, Resolution
from nightstream.store.concurrency import finish, start
from nightstream.store.materialize import LOCAL_ROWS, Cut, cut
from nightstream.store.merge import Merge, When
from nightstream.store.storage import Storage
from nightstream.store.tables import DUPLICATES, EVENTS, QUARANTINE, RAW_EVENTS, TableSpec, arrow_schema

_ROWS_PER_FILE = 500_000
Span = tuple[int, int] | None


def resolved(storage: Storage, arrival: Arrival, retraction_type: str, id_filter: IdFilter | None) -> Resolution:
    """What becomes of the valid rows.

    Of `events` at one version: what is computed again later must not see what was written in between.

    Args:
        storage: holds EVENTS.
        arrival: the rows.
        retraction_type: the event_type of a retraction.
        id_filter: of all that `events` holds, kept up to date here; None to ask the table.

    Raises:
        TableError: `events` holds an event_id more than once.
    """
    valid, mentioning = arrival.valid.table, None
    if valid is not None:
        mentioning = _mentioning(storage, valid, retraction_type, id_filter)
        are_distinct = pc.count_distinct(valid["event_id"]).as_py() == valid.num_rows
        if mentioning is not None and not mentioning.num_rows and are_distinct and not arrival.retractions:
            # The common case; what follows takes several jobs.
            return Resolution(new=arrival.valid_count)
    elif id_filter is not None:
        id_filter.add_rows(arrival.valid.rows, arrival.valid_count)
    totals = {outcome: F.count_if(F.col("outcome") == outcome) for outcome in OUTCOMES}
    retraction = (F.col("event_type") == retraction_type) & (F.col("raw_id") == F.col("kept_raw_id"))
    totals |= {"retractions": F.count_if(retraction), "damaged": F.count_if(F.col("copies") > 1)}
    if mentioning is not None:
        events = Cut.of(storage.spark, mentioning, EVENTS.schema).rows
    else:
        few = arrival.valid_count <= LOCAL_ROWS
        events = storage.read(EVENTS, None if few else storage.version(EVENTS))
    settled = cut(_settled(events, arrival, retraction_type), totals, size=arrival.valid_count)
    counts = {name: settled.totals[name] for name in (*OUTCOMES, "retractions")}
    if settled.totals["damaged"] or sum(counts[outcome] for outcome in OUTCOMES) != arrival.valid_count:
        raise TableError(
            "table events holds an event_id more than once, written by two processes at a time; "
            "keep the newest row of each event_id and move the others to duplicates"
        )
    return Resolution(settled, **counts)


def _mentioning(storage: Storage, valid: pa.Table, retraction_type: str, id_filter: IdFilter | None) -> pa.Table | None:
    """The EVENTS rows that are, or retract, one of the valid rows' events; None where they are too many for the driver.
    Adds the ids of the valid rows to the known ones."""
    if id_filter is not None:
        met_before = id_filter.may_hold(hashes(valid["event_id"]))
        # Known from here on, whatever becomes of this batch: a claim too many does no harm.
        id_filter.add_ids(valid)
        if not met_before:
            return arrow_schema(EVENTS.schema).empty_table()
    condition = "event_id IN (:ids) OR (event_type = :retraction AND retracts IN (:ids))"
    return storage.few_rows(EVENTS, condition, ids=valid["event_id"].to_pylist(), retraction=retraction_type)


def _settled(events: DataFrame, arrival: Arrival, retraction_type: str) -> DataFrame:
    valid = arrival.valid.rows
    known = resolve.known(events, arrival.broadcast(valid.select("event_id")), retraction_type)
    tombstones = arrival.broadcast(history.tombstones(valid, retraction_type)) if arrival.retractions else None
    return resolve.settle(valid, arrival.broadcast(known), tombstones)


@dataclass(frozen=True)
class Append:
    """Rows that a table lacks. count: how many they are. present: how many more it would have been, and has already."""

    spec: TableSpec
    rows: Cut
    count: int
    present: int = 0


@dataclass(frozen=True)
class Plan:
    """What one call writes, in this order.

    first: appends side by side. superseding: EVENTS rows that take the place of those with their event_id, or None.
    They come after the duplicates: from events alone a replay could no longer tell what was replaced. last: appends
    after that. is_awaited: whether the caller must wait until all is in the tables.
    """

    first: Sequence[Append]
    superseding: Cut | None
    last: Sequence[Append]
    is_awaited: bool

    @property
    def added(self) -> dict[str, int]:
        """Rows that come into each table by its name; a superseding one adds none to events."""
        return {append.spec.name: append.count for append in (*self.first, *self.last)}


def stream_plan(storage: Storage, arrival: Arrival, resolution: Resolution, fresh: bool) -> Plan:
    """The plan of a micro-batch: all appends at once, which may run on while its users are refreshed.

    Args:
        storage: holds the four tables.
        arrival: the rows of the micro-batch.
        resolution: of its valid rows.
        fresh: nobody has tried to book these rows before: unless some of them are found elsewhere, they need not be
            looked for in raw_events.
    """
    # What a micro-batch wrote before has its rows' arrival times: Delta then skips most files of large tables.
    span = arrival.arrival_span
    others = _verdicts(storage, arrival, resolution, span)
    if fresh and not resolution.stored and not any(append.present for append in others):
        raw = Append(RAW_EVENTS, arrival.all, arrival.raw)
    else:
        raw = _lacking(storage, RAW_EVENTS, arrival.all, arrival.raw, arrival, span)
    superseding = _superseding(resolution)
    return Plan([*others, raw], superseding, [], is_awaited=superseding is not None)


def batch_plan(storage: Storage, arrival: Arrival, resolution: Resolution) -> Plan:
    """The plan of a batch ingest: raw_events last, so that its rows tell what was booked completely."""
    others = _verdicts(storage, arrival, resolution, None)
    raw = _lacking(storage, RAW_EVENTS, arrival.all, arrival.raw, arrival, None)
    return Plan(others, _superseding(resolution), [raw], is_awaited=True)


def _verdicts(storage: Storage, arrival: Arrival, resolution: Resolution, span: Span) -> list[Append]:
    """What goes to quarantine, events and duplicates. span: of `_lacking`."""
    new = arrival.valid if resolution.as_they_came else resolution.having(resolve.NEW)
    appends = [Append(EVENTS, new, resolution.new)]
    if arrival.quarantine:
        appends.insert(0, _lacking(storage, QUARANTINE, arrival.rejected, arrival.quarantine, arrival, span))
    repeated = resolution.duplicate + resolution.superseding
    if repeated:
        repetitions = resolution.repetitions
        there = Cut(repetitions, {}) if arrival.all.table is None else cut(repetitions, {}, size=repeated)
        # What is superseded came at another time.
        appends.append(_lacking(storage, DUPLICATES, there, repeated, arrival, None))
    return appends


def _superseding(resolution: Resolution) -> Cut | None:
    return resolution.having(resolve.SUPERSEDING).select(*EVENTS.schema.names) if resolution.superseding else None


def _lacking(storage: Storage, spec: TableSpec, rows: Cut, count: int, arrival: Arrival, span: Span) -> Append:
    """Those of the rows, which are so many, whose raw_id the table does not have yet. span: arrival times
    (microseconds) outside which no row of the table has one of them; None where that is not known."""
    if rows.table is not None:
        ids = rows.table["raw_id"]
        within = "true" if span is None else "(arrival_time IS NULL OR arrival_time BETWEEN :first AND :last)"
        sql = f"SELECT raw_id FROM {{{spec.name}}} WHERE {within} AND raw_id IN (:ids)"
        first, last = (EPOCH + timedelta(microseconds=micros) for micros in span or (0, 0))
        present = storage.query(sql, spec, first=first, last=last, ids=ids.to_pylist())["raw_id"]
        lacking = pc.invert(pc.is_in(ids, value_set=present)) if len(present) else None
        return Append(spec, rows if lacking is None else rows.where_mask(lacking), count - len(present), len(present))
    there = storage.read(spec, storage.version(spec))
    if span is not None:
        ends = (F.timestamp_micros(F.lit(micros)) for micros in span)
        there = there.where(F.col("arrival_time").isNull() | F.col("arrival_time").between(*ends))
    frame = rows.rows
    known = there.select("raw_id").join(arrival.broadcast(frame.select("raw_id")), "raw_id", "left_semi")
    hits = known.count()
    frame = frame.join(arrival.broadcast(known), "raw_id", "left_anti") if hits else frame
    return Append(spec, Cut(frame, {}), count - hits, hits)


def execute(storage: Storage, plan: Plan, attempts: int, few_files: bool) -> list[Future[None]]:
    """The appends that still run; none where the plan is awaited.

    Args:
        storage: where to.
        plan: what.
        attempts: how often the MERGE is tried where another writer is met.
        few_files: the rows fit into one task for each _ROWS_PER_FILE of them.

    Raises:
        Exception: what a write that is waited for has met.
    """

    def begun(appends: Sequence[Append]) -> list[Future[None]]:
        return start([partial(_append, storage, each, few_files) for each in appends if each.count])

    first = begun(plan.first)
    if not plan.is_awaited:
        return first
    finish(first)
    if plan.superseding is not None:
        supersede(storage, plan.superseding, attempts)
    finish(begun(plan.last))
    return []


def _append(storage: Storage, append: Append, few_files: bool) -> None:
    rows = append.rows
    if few_files and rows.table is None:
        rows = Cut(rows.rows.coalesce(append.count // _ROWS_PER_FILE + 1), {})
    storage.append(append.spec, rows)


def supersede(storage: Storage, superseding: Cut, attempts: int) -> None:
    """Put EVENTS rows in the place of the older ones with their event_id, in one MERGE."""
    rows = superseding if superseding.table is not None else cut(superseding.rows, {}, cached=False)
    newer = "s.event_time > t.event_time OR (s.event_time = t.event_time AND s.content_hash > t.content_hash)"
    change = Merge("t.event_id = s.event_id", (When("update", newer),))
    storage.with_retries(lambda: storage.merge(EVENTS, rows, change), attempts, EVENTS.name)
