"""The two speeds: `apply_all` refreshes everyone (batch layer), `SpeedLayer` the users of each micro-batch.

Both call the same refresh, the same commit and the same merge; neither has logic of its own beyond choosing users.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from nightstream import serving
from nightstream.cutting import Cut, cut
from nightstream.events import live
from nightstream.following import Follower
from nightstream.known_ids import KnownIds
from nightstream.ledger import Recorded, arrive, book
from nightstream.news import News
from nightstream.payload import Payload
from nightstream.refresh import (
    NO_EVENTS,
    NOBODY,
    OVERFLOW_COLUMNS,
    STATE_COLUMNS,
    USER_COLUMNS,
    Refresher,
    refresh,
    unfolded,
)
from nightstream.settings import Settings
from nightstream.storage import Storage
from nightstream.tables import EVENTS, SEEN_OVERFLOW, USER_VECTORS, USERS
from nightstream.window import FoldRules, newest_rows, states_of

log = logging.getLogger(__name__)

# Up to so many users of a micro-batch are refreshed on the driver, which has the model at hand; more are sent to the
# executors, which takes some seconds before the first of them is refreshed.
DRIVER_USERS = 1_000


def refresher(settings: Settings, payload: Payload) -> Refresher:
    """The refresh under this installation's settings."""
    window = settings.window
    rules = FoldRules(window.length, window.seen_limit, tuple(settings.events.window_types))
    return Refresher(payload, rules, settings.serving.top_k)


def side_tables(storage: Storage) -> tuple[DataFrame, DataFrame | None]:
    """USERS, and SEEN_OVERFLOW where there is one."""
    return storage.read_or_empty(USERS), storage.read(SEEN_OVERFLOW) if storage.exists(SEEN_OVERFLOW) else None


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
    states = everyone(storage, settings)
    refreshed = serving.settled(refresh(states, events, *side_tables(storage), refresher(settings, payload)), limit=0)
    commit = serving.commit(storage, refreshed, writer, batch_id, now)
    width = serving.list_width(storage, settings.serving.top_k)
    serving.merge(storage, commit.rows, width, settings.serving.merge_attempts)
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


@dataclass(frozen=True)
class Asked:
    """A question for what the tables know of some users (string [B]), and its answer, see _known_of."""

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
    ) -> None:
        self.storage, self.settings = storage, settings
        self._writer_of, self.writer = writer, ""
        self.clock, self.on_batch = clock, on_batch
        self.news = News(storage, settings)
        self.payload = self.news.first()
        self.follower = Follower(storage, settings.serving.top_k, settings.serving.merge_attempts)
        self._pool = ThreadPoolExecutor(1, "ask")
        self._known_ids: KnownIds | None = None
        self._some_behind = True

    def start(self) -> None:
        """Merge what an earlier process committed and did not merge; before the first micro-batch of each query."""
        self.writer = ""
        serving.merge_tail(self.storage, self.follower.width, self.settings.serving.merge_attempts)
        self.payload.load()
        self._known_ids = KnownIds.of(self.storage.read_or_empty(EVENTS))

    def __call__(self, arrived: DataFrame, batch_id: int) -> None:
        """Record the rows (see ledger.parsed), refresh their users, commit; the MERGEs follow behind.

        Repeating a batch changes nothing. Raises what the MERGEs of earlier batches have met.
        """
        begun = time.monotonic()
        storage, settings = self.storage, self.settings
        first = not self.writer
        if first:
            self.writer = self._writer_of()
        newer = self.news.newer(self.payload)
        if newer is not None:
            self.payload, self._some_behind = newer, True
        arriving = arrive(arrived, settings, micro_batch=True)
        ahead = self._ask_ahead(arriving)
        # Spark repeats a micro-batch only as the first one after a start.
        recorded = book(storage, arriving, settings, micro_batch=True, fresh=not first, known_ids=self._known_ids)
        try:
            if first and serving.is_committed(storage, self.writer, batch_id):
                return
            refreshed = self._refresh(recorded, ahead)
        finally:
            # Whatever happens, no write may run on: this batch may come again.
            recorded.written()
            recorded.release()
        now = self.clock()
        self.follower.add(serving.commit(storage, refreshed, self.writer, batch_id, now, fresh=True))
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

    def _ask_ahead(self, arriving: Cut) -> Asked | None:
        """Ask for the users of the arriving rows, while it is found out which rows are new."""
        if arriving.table is None:
            return None
        users = pc.unique(arriving.table["user_id"].drop_null())
        return self._ask(users, arriving.table.num_rows) if 0 < len(users) <= DRIVER_USERS else None

    def _ask(self, users: pa.Array, events: int) -> Asked:
        """events: how many more of them the states may take up."""
        pending, room = self.follower.pending(), self.settings.window.seen_limit - events
        return Asked(users, self._pool.submit(_known_of, self.storage, users, pending, room))

    def _refresh(self, recorded: Recorded, ahead: Asked | None) -> Cut:
        """Refresh the users of the micro-batch, and some of those that are behind."""
        behind = self._behind()
        events = recorded.accepted_table
        on_driver = events is not None or recorded.accepted is None
        if on_driver and recorded.refold_users is None and (behind is None or behind.table is not None):
            named = [t["user_id"] for t in (events, behind.table if behind is not None else None) if t is not None]
            users = pc.unique(pa.chunked_array([c for column in named for c in column.chunks], pa.string()))
            if not len(users):
                return serving.settled_table(self.storage.spark, NOBODY)
            if len(users) <= DRIVER_USERS:
                return self._refresh_here(users, events, ahead)
        return serving.settled(self._refresh_there(recorded, None if behind is None else behind.rows))

    def _refresh_here(self, users: pa.Array, events: pa.Table | None, ahead: Asked | None) -> Cut:
        """On the driver. users: string [B], those to refresh. events: EVENTS rows of some of them."""
        spark = self.storage.spark
        if ahead is None or not pc.all(pc.is_in(users, value_set=ahead.users)).as_py():
            ahead = self._ask(users, 0 if events is None else events.num_rows)
        states, described, older = ahead.answer.result()
        states = states.filter(pc.is_in(states["user_id"], value_set=users))
        if events is None:
            events = NO_EVENTS
        refreshed = refresher(self.settings, self.payload)(states, events, described, older)
        return serving.settled_table(spark, refreshed)

    def _refresh_there(self, recorded: Recorded, behind: DataFrame | None) -> DataFrame:
        """On the executors; any number of users, some of them folded again over their whole history."""
        storage, pending = self.storage, self.follower.pending()
        history = live(storage.read(EVENTS), self.settings.events.retraction_type)
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
            newer = serving.newest_committed(storage, pending).select(*STATE_COLUMNS)
            known = serving.newest([known, newer.join(touched, "user_id", "left_semi")])
        if refold is not None:
            kept = known.join(refold, "user_id", "left_anti")
            known = kept.unionByName(unfolded(known.join(refold, "user_id", "left_semi")))
        users, overflow = side_tables(storage)
        users = users.join(touched, "user_id", "left_semi")
        if overflow is not None:
            overflow = overflow.join(touched, "user_id", "left_semi")
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
            newer = serving.newest_committed(self.storage, pending)
            known = serving.newest([table.select(*columns), newer.select(*columns)])
        found = known.where(F.col("model_version") != self.payload.model_version).select("user_id")
        withdrawn = self.payload.load().withdrawn()
        if withdrawn.num_rows:
            items = self.storage.spark.createDataFrame(withdrawn)
            found = found.unionByName(serving.holders(self.storage, pending, items)).distinct()
        some = cut(found.limit(self.settings.stream.handover_slice), {"users": F.count("user_id")})
        self._some_behind = bool(some.totals["users"])
        return some if self._some_behind else None


def _known_of(
    storage: Storage, users: pa.Array, pending: list[Cut], room: int
) -> tuple[pa.Table, pa.Table, pa.Table | None]:
    """The newest states, the USERS rows, and where a state has overflowed or may do so the SEEN_OVERFLOW rows.

    users: string [B], distinct. pending: commits that USER_VECTORS may lack, from before it is read. room: seen items
    up to which a state can't overflow.
    """
    wanted = F.broadcast(storage.spark.createDataFrame(pa.table({"user_id": users})))

    def of_users(frame: DataFrame, columns: Sequence[str]) -> DataFrame:
        return frame.select(*columns).join(wanted, "user_id", "left_semi")

    described = storage.read_or_empty(USERS).select(*USER_COLUMNS)
    both = of_users(storage.read(USER_VECTORS), STATE_COLUMNS).unionByName(
        of_users(described, USER_COLUMNS), allowMissingColumns=True
    )
    # One job for both tables; a state has a revision.
    found = both.toArrow()
    is_state = pc.is_valid(found["revision"])
    parts = [states_of(found.filter(is_state))]
    for commit in pending:
        if commit.table is not None:
            rows = commit.table.filter(pc.is_in(commit.table["user_id"], value_set=users))
        else:
            rows = of_users(commit.rows, STATE_COLUMNS).toArrow()
        parts.append(states_of(rows))
    states, older = newest_rows(parts), None
    full = pc.or_(states["seen_overflowed"], pc.greater(pc.list_value_length(states["seen"]), room))
    if pc.any(full).as_py() and storage.exists(SEEN_OVERFLOW):
        older = of_users(storage.read(SEEN_OVERFLOW), OVERFLOW_COLUMNS).distinct().toArrow()
    return states, found.filter(pc.invert(is_state)).select(list(USER_COLUMNS)), older


def utc_now() -> datetime:
    return datetime.now(UTC)
