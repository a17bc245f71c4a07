"""The speed layer: the users of each micro-batch, refreshed, committed and merged as the batch layer does it.

It has no logic of its own beyond choosing users.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime

from pyspark.sql import DataFrame

from nightstream.ingest import changes
from nightstream.ingest.id_filter import IdFilter
from nightstream.ingest.ledger import Counts, Recorded, arrive, book, is_balanced
from nightstream.monitoring.batch_report import BatchReport, Laps
from nightstream.runtime.settings import Settings
from nightstream.serving import commits
from nightstream.serving.background_merge import BackgroundMerge
from nightstream.serving.batch_layer import apply_all
from nightstream.serving.handover import some_behind
from nightstream.serving.snapshot import Snapshots
from nightstream.serving.state_cache import StateCache
from nightstream.serving.state_source import Asked, DriverStates, ExecutorStates, StateSource, Touched
from nightstream.store import registry
from nightstream.store.materialize import Cut
from nightstream.store.storage import Storage

log = logging.getLogger(__name__)


class SpeedLayer:
    """The function that foreachBatch calls, with what it keeps between micro-batches (the bundle).

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
        on_merge: Callable[[float, int], None] = lambda seconds, commits: None,
    ) -> None:
        self.storage, self.settings = storage, settings
        self._writer_of, self.writer = writer, ""
        self.clock, self.on_batch = clock, on_batch
        self.snapshots = Snapshots(storage, settings)
        self.bundle = self.snapshots.first()
        self.background_merge = BackgroundMerge(
            storage, settings.serving.top_k, settings.serving.merge_attempts, settings.stream.merge_share, on_merge
        )
        self.state_cache = StateCache(storage, settings.storage.scratch("known"))
        self.driver = DriverStates(storage, settings, self.state_cache, self.background_merge.pending)
        self.executors = ExecutorStates(storage, settings, self.background_merge.pending)
        self._id_filter: IdFilter | None = None
        self._some_behind = True
        self._half_booked = False

    def start(self) -> None:
        """Merge what an earlier process committed and did not merge; before the first micro-batch of each query.

        Another model may have been published, and applied, while the lease was waited for.
        """
        self.writer = ""
        if registry.published(self.storage).model_version != self.bundle.model_version:
            self.bundle = self.snapshots.first()
        self.background_merge.start()
        self._fold_in()
        self._half_booked = not is_balanced(self.storage)
        if self._half_booked:
            log.warning("a write was cut off: every payload is looked for in raw_events until the sums are right again")
        self.bundle.load()
        self._id_filter = IdFilter.of(self.storage)
        # It reads on in the background, and takes a core for it.
        self.state_cache.start()

    def __call__(self, arrived: DataFrame, batch_id: int) -> None:
        """Record the rows (see ledger.parsed), refresh their users, commit; the MERGEs follow behind.

        Repeating a batch changes nothing. Raises what the MERGEs of earlier batches have met.
        """
        laps = Laps()
        storage, settings = self.storage, self.settings
        first = not self.writer
        if first:
            self.writer = self._writer_of()
        self._take_up_snapshots()
        arriving = arrive(arrived, settings, micro_batch=True)
        asked = self.driver.ask_ahead(arriving)
        # Spark repeats a micro-batch only as the first one after a start; under a new checkpoint, what was cut off
        # comes again at any time.
        fresh = not first and not self._half_booked
        recorded = book(storage, arriving, settings, micro_batch=True, fresh=fresh, id_filter=self._id_filter)
        laps.end("record")
        try:
            if first and commits.is_committed(storage, self.writer, batch_id):
                return
            refreshed = self._refresh(recorded, asked)
            laps.end("refresh")
            recorded.written()
            laps.end("write")
            committed = commits.commit(
                storage,
                refreshed,
                self.writer,
                batch_id,
                self.clock(),
                refolded=None if recorded.refold is None else recorded.refold.users,
                attempts=settings.serving.merge_attempts,
            )
            laps.end("commit")
        finally:
            # Whatever happens, no write may run on: this batch may come again.
            recorded.written()
            recorded.release()
        now, visible_seconds = self.clock(), sum(laps.seconds.values())
        self.state_cache.committed(committed)
        self.background_merge.add(committed)
        laps.end("queue")
        counts = recorded.counts
        self.on_batch(
            BatchReport(
                batch_id=batch_id,
                events=counts.events,
                quarantined=counts.quarantine,
                duplicates=counts.duplicates,
                users=refreshed.totals["users"] or 0,
                visible_seconds=visible_seconds,
                delay_seconds=_seconds(recorded.first_arrival, now),
                oldest_event_seconds=_seconds(recorded.oldest_event, now),
                newest_event_seconds=_seconds(recorded.newest_event, now),
                last_arrival=recorded.last_arrival,
                phases=laps.seconds,
                unmerged=len(self.background_merge.pending()),
                model_version=self.bundle.model_version,
            )
        )

    def between_batches(self) -> None:
        """What must not wait for an event: take up a new model or catalogue, and refresh some of those that are behind.

        Raises what the MERGEs of earlier batches have met.
        """
        self.background_merge.check()
        self._take_up_snapshots()
        refreshed = self._refresh(Recorded(Counts(), {}), None) if self._some_behind else None
        if refreshed is None or not refreshed.totals["users"]:
            return
        now = self.clock()
        writer = f"{self._writer_of()} between micro-batches"
        number = int(now.timestamp() * 1e6)
        committed = commits.commit(self.storage, refreshed, writer, number, now)
        self.state_cache.committed(committed)
        self.background_merge.add(committed)
        log.info("handed over", extra={"users": refreshed.totals["users"], "model_version": self.bundle.model_version})

    def _take_up_snapshots(self) -> None:
        has_looked, newer = self.snapshots.take(self.bundle)
        if not has_looked:
            return
        if newer is not None:
            self.bundle, self._some_behind = newer, True
        self.state_cache.look_again()
        if self._half_booked:
            self._half_booked = not is_balanced(self.storage)

    def _fold_in(self) -> None:
        """Fold in what an ingest has recorded and no night has applied since."""
        storage, settings, now = self.storage, self.settings, self.clock()
        if not changes.is_marked(storage):
            return
        touched = changes.touched_users(storage, settings.events.retraction_type, now)
        writer = f"start of a stream {now:%Y%m%dT%H%M%S.%f}"
        users = apply_all(storage, settings, self.bundle, writer, 0, now, only=touched)
        changes.unmark(storage)
        log.info("folded in what a night had recorded and not applied", extra={"users": users})

    def settle(self) -> None:
        """Wait until all that is committed is merged. Raises what the MERGEs have met; the next start merges then."""
        self.background_merge.settle()

    def close(self) -> None:
        """End what runs in the background, and delete its files."""
        self.background_merge.close()
        self.snapshots.close()
        self.state_cache.close()
        self.driver.close()

    def _refresh(self, recorded: Recorded, asked: Asked | None) -> Cut:
        """Refresh the users of the micro-batch, and some of those that are behind."""
        touched = Touched(recorded, self._behind(), asked)
        source: StateSource = self.driver if self.driver.takes(touched) else self.executors
        return source.refresh(touched, self.bundle)

    def _behind(self) -> Cut | None:
        if not self._some_behind:
            return None
        most = self.settings.stream.handover_slice
        some = some_behind(self.storage, self.bundle, self.background_merge.pending(), most)
        self._some_behind = some is not None
        return some


def _seconds(since: datetime | None, now: datetime) -> float | None:
    return None if since is None else (now - since).total_seconds()
