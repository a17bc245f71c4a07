"""Booking what arrived: resolve it against `events`, plan which rows go where and in which order, execute the plan.

All that is read is read before the first write, and a plan holds only rows that its tables lack: so a call that is
repeated, after a crash at any write, adds nothing twice and completes what is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow.compute as pc
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from nightstream.errors import TableError
from nightstream.ingest import history, resolve
from nightstream.ingest.arrival import Arrival
from nightstream.ingest.id_filter import HASHES, IdFilter
from nightstream.ingest.resolve import OUTCOMES, Resolution
from nightstream.store.concurrency import finish, start
from nightstream.store.materialize import LOCAL_ROWS, Cut, cut
from nightstream.store.storage import Storage
from nightstream.store.tables import DUPLICATES, EVENTS, QUARANTINE, RAW_EVENTS, TableSpec

_ROWS_PER_FILE = 500_000


def resolved(
    storage: Storage, arrival: Arrival, retraction_type: str, id_filter: IdFilter | None
) -> tuple[Resolution, list[Cut]]:
    """What becomes of the valid rows, and what is to be released when nobody reads that any more.

    Of `events` at one version: what is computed again later must not see what was written in between.

    Args:
        storage: holds EVENTS.
        arrival: the rows.
        retraction_type: the event_type of a retraction.
        id_filter: of all that `events` holds, kept up to date here; None to ask the table.

    Raises:
        TableError: `events` holds an event_id more than once.
    """
    if _brings_only_new(storage, arrival, retraction_type, id_filter):
        # The common case; what follows takes several jobs.
        return Resolution(resolve.all_new(arrival.valid_rows), new=arrival.valid, as_they_came=True), []
    totals = {outcome: F.count_if(F.col("outcome") == outcome) for outcome in OUTCOMES}
    retraction = (F.col("event_type") == retraction_type) & (F.col("raw_id") == F.col("kept_raw_id"))
    totals |= {"retractions": F.count_if(retraction), "damaged": F.count_if(F.col("copies") > 1)}
    version = None if arrival.valid <= LOCAL_ROWS else storage.version(EVENTS)
    settled = cut(_settled(storage.read(EVENTS, version), arrival, retraction_type), totals, size=arrival.valid)
    counts = {name: settled.totals[name] for name in (*OUTCOMES, "retractions")}
    if settled.totals["damaged"] or sum(counts[outcome] for outcome in OUTCOMES) != arrival.valid:
        raise TableError(
            "table events holds an event_id more than once, written by two processes at a time; "
            "keep the newest row of each event_id and move the others to duplicates"
        )
    return Resolution(settled.rows, **counts), [settled]


def _brings_only_new(storage: Storage, arrival: Arrival, retraction_type: str, id_filter: IdFilter | None) -> bool:
    """Whether no event_id of the rows occurs twice, in them or in `events`, and no retraction is about. Adds the ids to
    the known ones."""
    valid = arrival.valid_table
    if valid is None:
        if id_filter is not None:
            id_filter.add_rows(arrival.valid_rows, arrival.valid)
        return False
    if id_filter is not None:
        hashes = [np.asarray(valid[name], np.int64) for name in HASHES]
        met_before = id_filter.may_hold(hashes[0])
        # Known from here on, whatever becomes of this batch: a claim too many does no harm.
        id_filter.add(np.concatenate(hashes))
    if arrival.retractions or pc.count_distinct(valid["event_id"]).as_py() < arrival.valid:
        return False
    if id_filter is not None and not met_before:
        return True
    wanted = storage.spark.createDataFrame(valid.select(["event_id"]))
    mentioned = resolve.mentions(storage.read(EVENTS), F.broadcast(wanted), retraction_type)
    # A replay finds as many as it brings, and so many are on the driver already.
    return mentioned.select("event_id").toArrow().num_rows == 0


def _settled(before: DataFrame, arrival: Arrival, retraction_type: str) -> DataFrame:
    valid = arrival.valid_rows
    known = resolve.known(before, arrival.broadcast(valid.select("event_id")), retraction_type)
    tombstones = arrival.broadcast(history.tombstones(valid, retraction_type)) if arrival.retractions else None
    return resolve.settle(valid, arrival.broadcast(known), tombstones)


@dataclass(frozen=True)
class Append:
    """Rows that a table lacks. count: how many they are. present: how many more it would have been, and has already."""

    spec: TableSpec
    rows: DataFrame
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
    superseding: DataFrame | None
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
    span = None
    if arrival.arrival_span is not None:
        # What a micro-batch wrote before has its rows' arrival times: Delta then skips most files of large tables.
        first, last = (F.timestamp_micros(F.lit(micros)) for micros in arrival.arrival_span)
        span = F.col("arrival_time").isNull() | F.col("arrival_time").between(first, last)
    others = _verdicts(storage, arrival, resolution, span)
    if fresh and not resolution.stored and not any(append.present for append in others):
        raw = Append(RAW_EVENTS, arrival.rows, arrival.raw)
    else:
        raw = _lacking(storage, RAW_EVENTS, arrival.rows, arrival.raw, arrival, span)
    superseding = _superseding(resolution)
    return Plan([*others, raw], superseding, [], is_awaited=superseding is not None)


def batch_plan(storage: Storage, arrival: Arrival, resolution: Resolution) -> Plan:
    """The plan of a batch ingest: raw_events last, so that its rows tell what was booked completely."""
    others = _verdicts(storage, arrival, resolution, None)
    raw = _lacking(storage, RAW_EVENTS, arrival.rows, arrival.raw, arrival, None)
    return Plan(others, _superseding(resolution), [raw], is_awaited=True)


def _verdicts(storage: Storage, arrival: Arrival, resolution: Resolution, span: Column | None) -> list[Append]:
    """What goes to quarantine, events and duplicates. span: of `_lacking`."""
    appends = [Append(EVENTS, resolution.having(resolve.NEW), resolution.new)]
    if arrival.quarantine:
        appends.insert(0, _lacking(storage, QUARANTINE, arrival.rejected_rows, arrival.quarantine, arrival, span))
    repeated = resolution.duplicate + resolution.superseding
    if repeated:
        # What is superseded came at another time.
        appends.append(_lacking(storage, DUPLICATES, resolution.repetitions, repeated, arrival, None))
    return appends


def _superseding(resolution: Resolution) -> DataFrame | None:
    return resolution.having(resolve.SUPERSEDING).select(*EVENTS.schema.names) if resolution.superseding else None


def _lacking(
    storage: Storage, spec: TableSpec, rows: DataFrame, count: int, arrival: Arrival, span: Column | None
) -> Append:
    """Those of the rows, which are so many, whose raw_id the table does not have yet. span: the only rows of the table
    that may have them; None for all."""
    there = storage.read(spec, storage.version(spec))
    if span is not None:
        there = there.where(span)
    known = there.select("raw_id").join(arrival.broadcast(rows.select("raw_id")), "raw_id", "left_semi")
    hits = known.count()
    return Append(
        spec, rows.join(arrival.broadcast(known), "raw_id", "left_anti") if hits else rows, count - hits, hits
    )


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
    files = append.count // _ROWS_PER_FILE + 1
    storage.append(append.spec, append.rows.coalesce(files) if few_files else append.rows)


def supersede(storage: Storage, superseding: DataFrame, attempts: int) -> None:
    """Put EVENTS rows in the place of the older ones with their event_id, in one MERGE."""
    rows = cut(superseding, {}, cached=False).rows
    newer = "struct(new.event_time, new.content_hash) > struct(old.event_time, old.content_hash)"

    def run() -> None:
        merge = storage.table(EVENTS).alias("old").merge(rows.alias("new"), "old.event_id = new.event_id")
        merge.whenMatchedUpdateAll(condition=newer).execute()

    storage.with_retries(run, attempts, EVENTS.name)
