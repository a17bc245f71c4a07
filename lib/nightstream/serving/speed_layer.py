"""The speed layer: the users of each micro-batch, refreshed, committed and merged as the batch layer does it.

It has no logic of its own beyond choosing users.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from nightstream.ingest import changes
from nightstream.ingest.history import foldable
from nightstream.ingest.id_filter import KnownIds
from nightstream.ingest.ledger import Counts, Recorded, arrive, book, is_balanced
from nightstream.monitoring.batch_report import BatchReport, Laps
from nightstream.runtime.settings import Settings
from nightstream.serving import commits
from nightstream.serving.background_merge import Follower
from nightstream.serving.batch_layer import apply_all, refresher
from nightstream.serving.refresh import (
    NO_EVENTS,
    NOBODY,
    STATE_COLUMNS,
    refresh,
    unfolded,
)
from nightstream.serving.snapshot import News
from nightstream.serving.state_cache import KnownUsers
from nightstream.store import registry
from nightstream.store.materialize import Cut, cut
from nightstream.store.storage import Storage
from nightstream.store.tables import EVENTS, SEEN_OVERFLOW, USER_VECTORS, USERS

log = logging.getLogger(__name__)

# Up to so many users of a micro-batch are refreshed on the driver, which has the model at hand; more are sent to the
# executors, which takes some seconds before the first of them is refreshed.
DRIVER_USERS = 4_000


@dataclass(frozen=True)
class Asked:
    """A question for what is known of some users (string [B]), and its answer, see KnownUsers.of."""

    users: pa.Array
    answer: Future[tuple[pa.Table, pa.Table, pa.Table | None]]


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
        on_merge: Callable[[float, int], None] = lambda seconds, commits: None,
    ) -> None:
        self.storage, self.settings = storage, settings
        self._writer_of, self.writer = writer, ""
        self.clock, self.on_batch = clock, on_batch
        self.news = News(storage, settings)
        self.payload = self.news.first()
        self.follower = Follower(storage, settings.serving.top_k, settings.serving.merge_attempts, on_merge)
        self.known_users = KnownUsers(storage, Path(settings.storage.work_dir) / "known")
        self._pool = ThreadPoolExecutor(1, "ask")
        self._known_ids: KnownIds | None = None
        self._some_behind = True
        self._half_booked = False

    def start(self) -> None:
        """Merge what an earlier process committed and did not merge; before the first micro-batch of each query.

        Another model may have been published, and applied, while the lease was waited for.
        """
        self.writer = ""
        if registry.published(self.storage).model_version != self.payload.model_version:
            self.payload = self.news.first()
        self.follower.start()
        self._fold_in()
        self._half_booked = not is_balanced(self.storage)
        if self._half_booked:
            log.warning("a write was cut off: every payload is looked for in raw_events until the sums are right again")
        self.known_users.start()
        self.payload.load()
        self._known_ids = KnownIds.of(self.storage.read_or_empty(EVENTS))

    def __call__(self, arrived: DataFrame, batch_id: int) -> None:
        """Record the rows (see ledger.parsed), refresh their users, commit; the MERGEs follow behind.

        Repeating a batch changes nothing. Raises what the MERGEs of earlier batches have met.
        """
        laps = Laps()
        storage, settings = self.storage, self.settings
        first = not self.writer
        if first:
            self.writer = self._writer_of()
        self._take_up_news()
        arriving = arrive(arrived, settings, micro_batch=True)
        ahead = self._ask_ahead(arriving)
        # Spark repeats a micro-batch only as the first one after a start; under a new checkpoint, what was cut off
        # comes again at any time.
        fresh = not first and not self._half_booked
        recorded = book(storage, arriving, settings, micro_batch=True, fresh=fresh, known_ids=self._known_ids)
        laps.end("record")
        try:
            if first and commits.is_committed(storage, self.writer, batch_id):
                return
            refreshed = self._refresh(recorded, ahead)
            laps.end("refresh")
            recorded.written()
            laps.end("write")
            committed = commits.commit(
                storage,
                refreshed,
                self.writer,
                batch_id,
                self.clock(),
                refolded=recorded.refold_users,
                attempts=settings.serving.merge_attempts,
            )
            laps.end("commit")
        finally:
            # Whatever happens, no write may run on: this batch may come again.
            recorded.written()
            recorded.release()
        now, visible_seconds = self.clock(), sum(laps.seconds.values())
        self.known_users.committed(committed)
        self.follower.add(committed)
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
                unmerged=len(self.follower.pending()),
                model_version=self.payload.model_version,
            )
        )

    def between_batches(self) -> None:
        """What must not wait for an event: take up a new model or catalogue, and refresh some of those that are behind.

        Raises what the MERGEs of earlier batches have met.
        """
        self.follower.check()
        self._take_up_news()
        refreshed = self._refresh(Recorded(Counts(), {}), None) if self._some_behind else None
        if refreshed is None or not refreshed.totals["users"]:
            return
        now = self.clock()
        writer = f"{self._writer_of()} between micro-batches"
        number = int(now.timestamp() * 1e6)
        committed = commits.commit(self.storage, refreshed, writer, number, now)
        self.known_users.committed(committed)
        self.follower.add(committed)
        log.info("handed over", extra={"users": refreshed.totals["users"], "model_version": self.payload.model_version})

    def _take_up_news(self) -> None:
        if not self.news.is_due():
            return
        newer = self.news.newer(self.payload)
        if newer is not None:
            self.payload, self._some_behind = newer, True
        self.known_users.look_again()
        if self._half_booked:
            self._half_booked = not is_balanced(self.storage)

    def _fold_in(self) -> None:
        """Fold in what an ingest has recorded and no night has applied since."""
        storage, settings, now = self.storage, self.settings, self.clock()
        if not changes.is_marked(storage):
            return
        touched = changes.touched_users(storage, settings.events.retraction_type, now)
        writer = f"start of a stream {now:%Y%m%dT%H%M%S.%f}"
        users = apply_all(storage, settings, self.payload, writer, 0, now, only=touched)
        changes.unmark(storage)
        log.info("folded in what a night had recorded and not applied", extra={"users": users})

    def settle(self) -> None:
        """Wait until all that is committed is merged. Raises what the MERGEs have met; the next start merges then."""
        self.follower.settle()

    def close(self) -> None:
        """End what runs in the background, and delete its files."""
        self.known_users.close()
        self._pool.shutdown(cancel_futures=True)

    def _ask_ahead(self, arriving: Cut) -> Asked | None:
        """Ask for the users of the arriving rows, while it is found out which rows are new."""
        if arriving.table is None:
            return None
        users = pc.unique(arriving.table["user_id"].drop_null())
        return self._ask(users, arriving.table.num_rows) if 0 < len(users) <= DRIVER_USERS else None

    def _ask(self, users: pa.Array, events: int) -> Asked:
        """events: how many more of them the states may take up."""
        pending, room = self.follower.pending(), self.settings.window.seen_limit - events
        return Asked(users, self._pool.submit(self.known_users.of, users, pending, room))

    def _refresh(self, recorded: Recorded, ahead: Asked | None) -> Cut:
        """Refresh the users of the micro-batch, and some of those that are behind."""
        behind = self._behind()
        events = recorded.accepted_table
        on_driver = events is not None or recorded.accepted is None
        if on_driver and recorded.refold_users is None and (behind is None or behind.table is not None):
            named = [t["user_id"] for t in (events, behind.table if behind is not None else None) if t is not None]
            users = pc.unique(pa.chunked_array([c for column in named for c in column.chunks], pa.string()))
            if not len(users):
                return commits.settled_table(self.storage.spark, NOBODY)
            if len(users) <= DRIVER_USERS:
                return self._refresh_here(users, events, ahead)
        return commits.settled(self._refresh_there(recorded, None if behind is None else behind.rows))

    def _refresh_here(self, users: pa.Array, events: pa.Table | None, ahead: Asked | None) -> Cut:
        """On the driver. users: string [B], those to refresh. events: EVENTS rows of some of them."""
        spark = self.storage.spark
        if ahead is None or not pc.all(pc.is_in(users, value_set=ahead.users)).as_py():
            ahead = self._ask(users, 0 if events is None else events.num_rows)
        states, described, older = ahead.answer.result()
        states = states.filter(pc.is_in(states["user_id"], value_set=users))
        if events is None:
            events = NO_EVENTS
        refreshed = refresher(self.settings, self.payload, os.cpu_count() or 1)(states, events, described, older)
        return commits.settled_table(spark, refreshed)

    def _refresh_there(self, recorded: Recorded, behind: DataFrame | None) -> DataFrame:
        """On the executors; any number of users, some of them folded again over their whole history."""
        storage, pending = self.storage, self.follower.pending()
        history = foldable(storage.read(EVENTS), self.settings.events.retraction_type)
        events = recorded.accepted if recorded.accepted is not None else history.limit(0)
        touched = events.select("user_id")
        if behind is not None:
            touched = touched.unionByName(behind)
        refold = recorded.refold_users
        if refold is not None:
            recorded.written()
            refold = F.broadcast(refold)
            again = history.join(refold, "user_id", "left_semi")
            events = events.join(refold, "user_id", "left_anti").unionByName(again.select(*events.columns))
            touched = touched.unionByName(refold)
        touched = F.broadcast(touched.distinct())
        known = storage.read(USER_VECTORS).select(*STATE_COLUMNS).join(touched, "user_id", "left_semi")
        if pending:
            newer = commits.newest_committed(storage, pending).rows.select(*STATE_COLUMNS)
            known = commits.newest([known, newer.join(touched, "user_id", "left_semi")])
        if refold is not None:
            kept = known.join(refold, "user_id", "left_anti")
            known = kept.unionByName(unfolded(known.join(refold, "user_id", "left_semi")))
        users, overflow = storage.read_or_empty(USERS).join(touched, "user_id", "left_semi"), None
        if storage.exists(SEEN_OVERFLOW):
            # Of those that are folded again it may hold events that have been taken back.
            folded_on = touched if refold is None else touched.join(refold, "user_id", "left_anti")
            overflow = storage.read(SEEN_OVERFLOW).join(folded_on, "user_id", "left_semi")
        return refresh(known, events, users, overflow, refresher(self.settings, self.payload))

    def _behind(self) -> Cut | None:
        """Some user_id whose newest row is under another model than the one that serves, or whose newest list holds a
        withdrawn item; None when there is nobody."""
        if not self._some_behind:
            return None
        pending = self.follower.pending()
        columns = ("user_id", "revision", "model_version")
        table = self.storage.read(USER_VECTORS)
        known = table
        if pending:
            newer = commits.newest_committed(self.storage, pending).rows
            known = commits.newest([table.select(*columns), newer.select(*columns)])
        found = known.where(F.col("model_version") != self.payload.model_version).select("user_id")
        withdrawn = self.payload.load().withdrawn()
        if withdrawn.num_rows:
            items = self.storage.spark.createDataFrame(withdrawn)
            found = found.unionByName(commits.holders(self.storage, pending, items)).distinct()
        some = cut(found.limit(self.settings.stream.handover_slice), {"users": F.count("user_id")})
        self._some_behind = bool(some.totals["users"])
        return some if self._some_behind else None


def _seconds(since: datetime | None, now: datetime) -> float | None:
    return None if since is None else (now - since).total_seconds()
