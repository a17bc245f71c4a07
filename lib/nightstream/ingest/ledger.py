"""The books of what arrived: raw_events = events + quarantine + duplicates, to the row, through replays and crashes.

Every payload row ends in exactly one of events, quarantine and duplicates. There must be one recording process at a
time: two at once could both take an event for new.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import datetime

import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql import types as T

from nightstream.errors import TableError
from nightstream.ingest import booking, history, parse, resolve
from nightstream.ingest.arrival import Arrival, totals, totals_of
from nightstream.ingest.id_filter import IdFilter
from nightstream.ingest.resolve import Resolution
from nightstream.runtime.settings import Settings
from nightstream.store.concurrency import finish
from nightstream.store.materialize import Cut, cut, few
from nightstream.store.storage import Storage
from nightstream.store.tables import DUPLICATES, EVENTS, QUARANTINE, RAW_EVENTS

log = logging.getLogger(__name__)

TABLES = (RAW_EVENTS, EVENTS, QUARANTINE, DUPLICATES)


@dataclass(frozen=True)
class Counts:
    """What the payload rows of one call are in the tables now; raw = events + quarantine + duplicates."""

    raw: int = 0
    events: int = 0
    quarantine: int = 0
    duplicates: int = 0


@dataclass(frozen=True)
class Refold:
    """Users whose windows must be folded again.

    users: user_id, distinct. history: all of their events, as history.foldable gives them; few are on the driver, and
    then the users are, too.
    """

    users: Cut
    history: Cut


@dataclass(frozen=True)
class Recorded:
    """The outcome of one call of `record`.

    counts: rows of this call by where they ended, the ones that were there already included.
    added: rows that this call added to each table by name (a superseding event adds none to events, its predecessor
    one to duplicates). After a crash, the replay counts only what it had to add itself.
    accepted: EVENTS rows of this call to be folded into windows, as history.foldable gives them; the same on
    a replay. None when nothing valid came.
    refold: the users whose windows must be folded again; None when nobody's.
    first_arrival, last_arrival: the earliest and the latest arrival time of the rows (UTC); None when they have none.
    oldest_event, newest_event: the earliest and the latest event time of the valid rows; None where nothing valid came.
    """

    counts: Counts
    added: dict[str, int]
    accepted: Cut | None = None
    refold: Refold | None = None
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
    """Payload rows with what `parse.parse` reads in them under these settings."""
    source = settings.sources.events
    reserved = settings.serving.default_user
    return parse.parse(payloads, source.columns, source.time_unit, settings.events, reserved, source.time_zone)


def arrive(arrived: DataFrame, settings: Settings, micro_batch: bool = False) -> Cut:
    """The rows of `parsed` with their raw_id, cut off for `book`.

    Args:
        arrived: the rows.
        settings: those that they were parsed under.
        micro_batch: the rows are those of a stream, few or many; the few are on the driver.
    """
    retraction_type = settings.events.retraction_type
    # A batch source is large: to try it on the driver first would read it twice.
    table = few(arrived) if micro_batch else None
    if table is None:
        return cut(parse.raw_rows(arrived), totals(retraction_type), limit=0)
    schema = T.StructType([RAW_EVENTS.schema["raw_id"], *arrived.schema.fields])
    return Cut.of(arrived.sparkSession, parse.raw_table(table), schema, totals_of(table, retraction_type))


def book(
    storage: Storage,
    arriving: Cut,
    settings: Settings,
    micro_batch: bool = False,
    fresh: bool = False,
    id_filter: IdFilter | None = None,
) -> Recorded:
    """The outcome of booking the rows of `arrive` into the four tables.

    Repeating a call with the same rows adds nothing, and completes what a crash left half-done.

    Args:
        storage: holds the four tables, or will.
        arriving: RAW_EVENTS columns and what was read in the payloads.
        settings: those that they were parsed under.
        micro_batch: the rows are those of a stream; the appends may still run when this returns, and `Recorded.written`
            waits for them. Without it (batch ingest), raw_events is written last, and its rows tell what was booked
            completely.
        fresh: nobody has tried to book these rows before, so those of a micro-batch need not be looked for in
            raw_events. Delta's own txnAppId would tell that too, at the price of a job over the table's log per append.
        id_filter: of all that `events` holds, kept up to date here; without it the table is asked for the ids.

    Raises:
        TableError: `events` holds an event_id more than once.
    """
    storage.create(*TABLES)
    if not arriving.totals["raw"]:
        arriving.release()
        return Recorded(Counts(), {t.name: 0 for t in TABLES})
    arrival, retraction_type = Arrival.of(arriving), settings.events.retraction_type
    cuts = [arriving]
    resolution = Resolution()
    if arrival.valid_count:
        resolution = booking.resolved(storage, arrival, retraction_type, id_filter)
    if resolution.settled is not None:
        cuts.append(resolution.settled)
    if micro_batch:
        plan = booking.stream_plan(storage, arrival, resolution, fresh)
    else:
        plan = booking.batch_plan(storage, arrival, resolution)
    writes = booking.execute(storage, plan, settings.serving.merge_attempts, few_files=arrival.is_small)
    added = {t.name: 0 for t in TABLES} | plan.added
    log.info("recorded", extra={"rows": arrival.raw, "added": added})
    refold = None
    touching = _touching(storage, arrival, resolution, settings, with_earlier=micro_batch)
    if touching is not None:
        # A retraction and its event may come together.
        finish(writes)
        refold = None if arrival.all.table is None else _refold_of_few(storage, touching, retraction_type)
        refold = refold or _refold(storage, touching, retraction_type)
        cuts.append(refold.users)
    return Recorded(
        Counts(arrival.raw, arrival.valid_count - resolution.duplicate, arrival.quarantine, resolution.duplicate),
        added,
        _accepted(arrival, resolution, retraction_type),
        refold if refold is not None and refold.users.totals["users"] else None,
        arrival.first_arrival,
        arrival.last_arrival,
        arrival.oldest_event,
        arrival.newest_event,
        cuts,
        writes,
    )


def record(storage: Storage, arrived: DataFrame, settings: Settings, micro_batch: bool = False) -> Recorded:
    """`arrive` and `book`."""
    return book(storage, arrive(arrived, settings, micro_batch), settings, micro_batch)


def is_balanced(storage: Storage) -> bool:
    """Whether raw_events = events + quarantine + duplicates; not so after a write that was cut off, until its rows have
    come again."""
    rows = _row_counts(storage)
    return rows["raw_events"] == rows["events"] + rows["quarantine"] + rows["duplicates"]


def _row_counts(storage: Storage) -> dict[str, int]:
    storage.create(*TABLES)
    counts = " UNION ALL ".join(f"SELECT '{t.name}' AS name, count(*) AS rows FROM {{{t.name}}}" for t in TABLES)
    counted = storage.query(f"SELECT name, rows FROM ({counts}) c", *TABLES)
    rows = dict(zip(counted["name"].to_pylist(), counted["rows"].to_pylist(), strict=True))
    # A query gives them in no order.
    return {table.name: rows[table.name] for table in TABLES}


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


def _accepted(arrival: Arrival, resolution: Resolution, retraction_type: str) -> Cut | None:
    """As of `Recorded`."""
    if not arrival.valid_count:
        return None
    if resolution.as_they_came:
        return arrival.valid.select(*EVENTS.schema.names)
    settled = resolution.accepted(retraction_type)
    return Cut(settled, {}, None if arrival.all.table is None else settled.toArrow())


def _touching(
    storage: Storage, arrival: Arrival, resolution: Resolution, settings: Settings, with_earlier: bool
) -> DataFrame | None:
    """EVENTS rows that no fold takes up by itself: superseded and superseding ones, and retractions; None for none.

    with_earlier: also those that an earlier call with these rows has superseded. A replay finds the superseding event
    already in `events`; what it replaced is then known through duplicates.
    """
    frames: list[DataFrame] = []
    if resolution.superseding:
        frames += [resolution.superseded, resolution.having(resolve.SUPERSEDING).rows]
    if with_earlier and resolution.stored:
        earlier = _superseded_earlier(storage, arrival, resolution, settings)
        frames += [] if earlier.isEmpty() else [earlier, resolution.kept]
    if resolution.retractions:
        frames.append(resolution.kept.where(F.col("event_type") == settings.events.retraction_type))
    if not frames:
        return None
    first, *rest = (frame.select(*EVENTS.schema.names) for frame in frames)
    for frame in rest:
        first = first.unionByName(frame)
    return first


def _refold(storage: Storage, touching: DataFrame, retraction_type: str) -> Refold:
    """Whom the rows of `_touching` concern."""
    events = storage.read(EVENTS)
    users = _changed_users(touching, events, retraction_type)
    theirs = history.foldable(events, retraction_type).join(F.broadcast(users.rows), "user_id", "left_semi")
    return Refold(users, Cut(theirs.select(*EVENTS.schema.names), {}))


def _refold_of_few(storage: Storage, touching: DataFrame, retraction_type: str) -> Refold | None:
    """The same without a job over `events`; None where too many rows would come to the driver."""
    rows = few(touching)
    if rows is None:
        return None
    retracted = rows.filter(pc.equal(rows["event_type"], retraction_type))["retracts"].drop_null()
    targets = storage.few_rows(EVENTS, "event_id IN (:ids)", ids=retracted.to_pylist())
    if targets is None:
        return None
    touching, owned = (Cut.of(storage.spark, table, EVENTS.schema).rows for table in (rows, targets))
    users = _changed_users(touching, owned, retraction_type)
    if users.table is None:
        return None
    theirs = storage.few_rows(EVENTS, "user_id IN (:users)", users=users.table["user_id"].to_pylist())
    if theirs is None:
        return None
    # Who has taken an event back need not be its user.
    naming = "event_type = :retraction AND retracts IN (:ids)"
    retractions = storage.few_rows(EVENTS, naming, retraction=retraction_type, ids=theirs["event_id"].to_pylist())
    if retractions is None:
        return None
    of_both = Cut.of(storage.spark, pa.concat_tables([theirs, retractions]), EVENTS.schema)
    return Refold(users, cut(history.foldable(of_both.rows, retraction_type), {}, size=theirs.num_rows))


def _changed_users(touching: DataFrame, events: DataFrame, retraction_type: str) -> Cut:
    """As history.changed_users gives them; totals: users."""
    return cut(history.changed_users(touching, events, retraction_type), {"users": F.count("user_id")})


def _superseded_earlier(storage: Storage, arrival: Arrival, resolution: Resolution, settings: Settings) -> DataFrame:
    """EVENTS rows, as their payloads tell them, in whose place those of the rows stand that are in `events` already."""
    stored = resolution.kept.where(F.col("outcome") == resolve.STORED).select(F.col("raw_id").alias("kept_raw_id"))
    copies = storage.read(DUPLICATES).join(arrival.broadcast(stored), "kept_raw_id", "left_semi")
    raw = storage.read(RAW_EVENTS).join(F.broadcast(copies.select("raw_id")), "raw_id", "left_semi")
    return parsed(raw, settings).where(F.col("reason").isNull()).select(*EVENTS.schema.names)
