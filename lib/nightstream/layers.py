"""The two speeds: `apply_all` refreshes everyone (batch layer), `SpeedLayer` the users of each micro-batch.

Both call the same refresh, the same commit and the same merge; neither has logic of its own beyond choosing users.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from nightstream import catalogue, registry, serving
from nightstream.cutting import cut
from nightstream.events import live
from nightstream.following import Follower
from nightstream.ledger import Recorded, record
from nightstream.payload import Payload
from nightstream.refresh import refresh
from nightstream.settings import Settings
from nightstream.storage import Storage
from nightstream.tables import EVENTS, ITEMS, MODELS, SEEN_OVERFLOW, USER_VECTORS, USERS
from nightstream.window import unfolded

log = logging.getLogger(__name__)

STATE_COLUMNS = ("user_id", "revision", "window", "seen", "seen_overflowed")


def call_refresh(
    storage: Storage, settings: Settings, payload: Payload, states: DataFrame, events: DataFrame, chunks: int = 1
) -> DataFrame:
    """`refresh` with this installation's settings and side tables."""
    overflow = storage.read(SEEN_OVERFLOW) if storage.exists(SEEN_OVERFLOW) else None
    return refresh(
        states,
        events,
        storage.read_or_empty(USERS),
        overflow,
        payload,
        length=settings.window.length,
        seen_limit=settings.window.seen_limit,
        window_types=settings.events.window_types,
        top_k=settings.serving.top_k,
        chunks=chunks,
    )


def everyone(storage: Storage, settings: Settings) -> DataFrame:
    """Unfolded states of all known users: those with a state, those only described, and the default user."""
    present = storage.read_or_empty(USER_VECTORS).select("user_id", "revision")
    described = storage.read_or_empty(USERS).select("user_id", F.lit(0).cast("long").alias("revision"))
    stranger = storage.spark.range(1).select(
        F.lit(settings.serving.default_user).alias("user_id"), F.lit(0).cast("long").alias("revision")
    )
    revisions = (
        present.unionByName(described).unionByName(stranger).groupBy("user_id").agg(F.max("revision").alias("revision"))
    )
    return unfolded(revisions)


def apply_all(storage: Storage, settings: Settings, payload: Payload, writer: str, batch_id: int, now: datetime) -> int:
    """Refresh every known user over the whole history under one model and merge; returns the number of users."""
    events = live(storage.read(EVENTS), settings.events.retraction_type)
    lists = call_refresh(storage, settings, payload, everyone(storage, settings), events, chunks=8)
    refreshed = serving.settled(lists, limit=0)
    rows = serving.commit(storage, refreshed, writer, batch_id, now)
    width = serving.list_width(storage, settings.serving.top_k)
    serving.merge(storage, rows, width, settings.serving.merge_attempts)
    return refreshed.totals["users"] or 0


@dataclass(frozen=True)
class BatchReport:
    """What one micro-batch did. visible_seconds: from its start to its commit; delay_seconds: from the arrival of its
    oldest event to its commit."""

    batch_id: int
    events: int
    quarantined: int
    duplicates: int
    users: int
    visible_seconds: float
    delay_seconds: float | None
    model_version: str


class SpeedLayer:
    """The function that foreachBatch calls, with what it keeps between micro-batches (the payload).

    writer: gives the identity of the query's checkpoint, by which commits are numbered; asked at the first batch,
        because the checkpoint does not exist before.
    clock: the wall clock, for the columns that say when a row was written.
    """

    def __init__(
        self,
        storage: Storage,
        settings: Settings,
        writer: Callable[[], str],
        clock: Callable[[], datetime],
        on_batch: Callable[[BatchReport], None] = lambda report: None,
    ) -> None:
        self.storage, self.settings = storage, settings
        self._writer_of, self.writer = writer, ""
        self.clock, self.on_batch = clock, on_batch
        self.payload = self._load()
        self.follower = Follower(storage, settings.serving.top_k, settings.serving.merge_attempts)
        self._some_behind = True
        self._seen_commits: tuple[int | None, int | None] | None = None
        self._looked_at = time.monotonic()

    def __call__(self, arrived: DataFrame, batch_id: int) -> None:
        """Record the rows (see ledger.parsed), refresh their users, commit; the MERGEs follow behind.

        Repeating a batch changes nothing. Raises what the MERGEs of earlier batches have met.
        """
        begun = time.monotonic()
        storage = self.storage
        first = not self.writer
        if first:
            self.writer = self._writer_of()
            serving.merge_tail(storage, self.follower.width, self.settings.serving.merge_attempts)
        self._look_for_news()
        recorded = record(storage, arrived, self.settings, (self.writer, batch_id))
        try:
            if first and serving.is_committed(storage, self.writer, batch_id):
                return
            refreshed = serving.settled(self._refresh(recorded))
        finally:
            # Whatever happens, no write may run on: this batch may come again.
            recorded.written()
            recorded.release()
        now = self.clock()
        rows = serving.commit(storage, refreshed, self.writer, batch_id, now)
        self.follower.add(rows)
        self.on_batch(
            BatchReport(
                batch_id,
                recorded.counts.events,
                recorded.counts.quarantine,
                recorded.counts.duplicates,
                refreshed.totals["users"] or 0,
                time.monotonic() - begun,
                None if recorded.first_arrival is None else (now - recorded.first_arrival).total_seconds(),
                self.payload.model_version,
            )
        )

    def settle(self) -> None:
        """Wait until all that is committed is merged. Raises what the MERGEs have met; the next start merges then."""
        self.follower.settle()

    def _refresh(self, recorded: Recorded) -> DataFrame:
        """Refresh the users of the micro-batch, and some of those that are still under an older model."""
        storage, settings = self.storage, self.settings
        history = live(storage.read(EVENTS), settings.events.retraction_type)
        events = recorded.accepted if recorded.accepted is not None else history.limit(0)
        pending = self.follower.pending()
        table = storage.read(USER_VECTORS)
        touched = events.select("user_id")
        behind = self._behind(table, pending)
        if behind is not None:
            touched = touched.unionByName(behind)
        refold = recorded.refold_users
        if refold is not None:
            recorded.written()
            refold = F.broadcast(refold)
            again = history.join(refold, "user_id", "left_semi")
            events = events.join(refold, "user_id", "left_anti").unionByName(again)
            touched = touched.unionByName(refold)
        touched = F.broadcast(touched.distinct())
        states = [f.select(*STATE_COLUMNS).join(touched, "user_id", "left_semi") for f in (table, *pending)]
        known = serving.newest(states) if pending else states[0]
        if refold is not None:
            kept = known.join(refold, "user_id", "left_anti")
            known = kept.unionByName(unfolded(known.join(refold, "user_id", "left_semi")))
        return call_refresh(storage, settings, self.payload, known, events)

    def _behind(self, table: DataFrame, pending: list[DataFrame]) -> DataFrame | None:
        """Some user_id whose newest row is under another model than the one that serves; None when nobody's is."""
        if not self._some_behind:
            return None
        columns = ("user_id", "revision", "model_version")
        known = serving.newest([f.select(*columns) for f in (table, *pending)]) if pending else table
        found = known.where(F.col("model_version") != self.payload.model_version).select("user_id")
        some = cut(found.limit(self.settings.stream.handover_slice), {"users": F.count("user_id")})
        self._some_behind = bool(some.totals["users"])
        return some.rows if self._some_behind else None

    def _load(self) -> Payload:
        row = registry.published(self.storage)
        return catalogue.load_payload(self.storage, row.model_version)

    def _look_for_news(self) -> None:
        """Take up a newly published model and newly described items, every few seconds at most."""
        if time.monotonic() - self._looked_at < self.settings.stream.snapshot_seconds:
            return
        self._looked_at = time.monotonic()
        storage = self.storage
        commits = (storage.version(MODELS), storage.version(ITEMS))
        if commits == self._seen_commits:
            return
        version = registry.published(storage).model_version
        payload = self.payload if version == self.payload.model_version else catalogue.load_payload(storage, version)
        catalogue.embed_missing(storage, storage.read_or_empty(ITEMS), payload)
        newest = catalogue.load_payload(storage, version, payload.files)
        if (newest.model_version, newest.catalogue_version) != (
            self.payload.model_version,
            self.payload.catalogue_version,
        ):
            self._some_behind |= newest.model_version != self.payload.model_version
            log.info("new snapshot", extra={"model": newest.model_version, "catalogue": newest.catalogue_version})
            self.payload = newest
        # What was committed while this ran is looked at next time.
        self._seen_commits = commits


def utc_now() -> datetime:
    return datetime.now(UTC)
