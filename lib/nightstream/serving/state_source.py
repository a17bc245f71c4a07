"""Where the states of a micro-batch's users come from, and with that where these users are refreshed."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from nightstream.ingest.ledger import Recorded, Refold
from nightstream.models.arrow import combined
from nightstream.models.bundle import Bundle
from nightstream.runtime.settings import Settings
from nightstream.serving import commits
from nightstream.serving.batch_layer import refresher
from nightstream.serving.refresh import NO_EVENTS, NOBODY, STATE_COLUMNS, refresh, unfolded, unfolded_rows
from nightstream.serving.state_cache import StateCache
from nightstream.store.materialize import Cut
from nightstream.store.storage import Storage
from nightstream.store.tables import EVENTS, SEEN_OVERFLOW, USER_VECTORS, USERS


@dataclass(frozen=True)
class Asked:
    """A question for what is known of some users (string [B]), and its answer, see StateCache.of."""

    users: pa.Array
    answer: Future[tuple[pa.Table, pa.Table, pa.Table | None]]


@dataclass(frozen=True)
class Touched:
    """Whom a micro-batch refreshes.

    recorded: what was booked of it; its users are refreshed. behind: user_id of others that are refreshed along with
    them; None for nobody. asked: what `DriverStates.ask_ahead` was asked when the rows had just arrived.
    """

    recorded: Recorded
    behind: Cut | None
    asked: Asked | None = None

    def users(self) -> pa.Array | None:
        """string [B], distinct; None where not all of them are on the driver."""
        refold = self.recorded.refold
        all_of_them = (self.recorded.accepted, self.behind, None if refold is None else refold.users)
        cuts = [each for each in all_of_them if each is not None]
        tables = [each.table for each in cuts if each.table is not None]
        if len(tables) < len(cuts):
            return None
        named = [table["user_id"] for table in tables]
        return pc.unique(pa.chunked_array([c for column in named for c in column.chunks], pa.string()))


class StateSource(Protocol):
    """Gives the users of a micro-batch their states, and refreshes them there."""

    def takes(self, touched: Touched) -> bool:
        """Whether it can refresh all of them."""

    def refresh(self, touched: Touched, bundle: Bundle) -> Cut:
        """REFRESHED rows under the bundle's model, one per touched user, computed now; see commits.settled."""


class DriverStates:
    """States at hand in this process, which has the model, too: of few users, and few events to be folded again."""

    def __init__(
        self, storage: Storage, settings: Settings, state_cache: StateCache, pending: Callable[[], list[Cut]]
    ) -> None:
        """pending: gives the commits that USER_VECTORS may lack."""
        self.storage, self.settings = storage, settings
        self.state_cache, self.pending = state_cache, pending
        self._pool = ThreadPoolExecutor(1, "ask")

    def ask_ahead(self, arriving: Cut) -> Asked | None:
        """Ask for the users of the arriving rows, while it is found out which rows are new. None for too many."""
        if arriving.table is None:
            return None
        users = pc.unique(arriving.table["user_id"].drop_null())
        return self._ask(users, arriving.table.num_rows) if 0 < len(users) <= commits.LOCAL_USERS else None

    def takes(self, touched: Touched) -> bool:
        users, refold = touched.users(), touched.recorded.refold
        if users is None or (refold is not None and refold.history.table is None):
            return False
        return len(users) <= commits.LOCAL_USERS

    def refresh(self, touched: Touched, bundle: Bundle) -> Cut:
        spark, users, asked = self.storage.spark, touched.users(), touched.asked
        assert users is not None
        if not len(users):
            return commits.settled_table(spark, NOBODY)
        accepted, refold = touched.recorded.accepted, touched.recorded.refold
        events = None if accepted is None else accepted.table
        if events is None:
            events = NO_EVENTS
        if asked is None or not pc.all(pc.is_in(users, value_set=asked.users)).as_py():
            asked = self._ask(users, events.num_rows)
        states, described, older = asked.answer.result()
        states = states.filter(pc.is_in(states["user_id"], value_set=users))
        if refold is not None:
            states, events, older = _folded_again(refold, states, events, older)
        refreshed = refresher(self.settings, bundle, os.cpu_count() or 1)(states, events, described, older)
        return commits.settled_table(spark, refreshed)

    def close(self) -> None:
        """Ask nothing more."""
        self._pool.shutdown(cancel_futures=True)

    def _ask(self, users: pa.Array, events: int) -> Asked:
        """events: how many more of them the states may take up."""
        pending, room = self.pending(), self.settings.window.seen_limit - events
        return Asked(users, self._pool.submit(self.state_cache.of, users, pending, room))


def _folded_again(
    refold: Refold, states: pa.Table, events: pa.Table, older: pa.Table | None
) -> tuple[pa.Table, pa.Table, pa.Table | None]:
    """States, events and SEEN_OVERFLOW rows, with the past of some users replaced by their whole history."""
    again, history = refold.users.table, refold.history.table
    assert again is not None
    assert history is not None

    def is_other(rows: pa.Table) -> pa.Array:
        return pc.invert(pc.is_in(rows["user_id"], value_set=combined(again["user_id"])))

    others = is_other(states)
    states = pa.concat_tables([states.filter(others), unfolded_rows(states.filter(pc.invert(others)))])
    # Spark says of one that a column holds no null, and of the other not.
    both = [events.filter(is_other(events)), history.select(events.column_names)]
    events = pa.concat_tables(both, promote_options="permissive")
    # Of those that are folded again it may hold events that have been taken back.
    return states, events, None if older is None else older.filter(is_other(older))


class ExecutorStates:
    """States in the tables: of any number of users, some of them folded again over their whole history."""

    def __init__(self, storage: Storage, settings: Settings, pending: Callable[[], list[Cut]]) -> None:
        """pending: gives the commits that USER_VECTORS may lack."""
        self.storage, self.settings, self.pending = storage, settings, pending

    def takes(self, touched: Touched) -> bool:
        return True

    def refresh(self, touched: Touched, bundle: Bundle) -> Cut:
        recorded, behind = touched.recorded, None if touched.behind is None else touched.behind.rows
        return commits.settled(self._refreshed(recorded, behind, bundle))

    def _refreshed(self, recorded: Recorded, behind: DataFrame | None, bundle: Bundle) -> DataFrame:
        storage, pending = self.storage, self.pending()
        events = storage.read(EVENTS).limit(0) if recorded.accepted is None else recorded.accepted.rows
        touched = events.select("user_id")
        if behind is not None:
            touched = touched.unionByName(behind)
        refold = None
        if recorded.refold is not None:
            refold, again = F.broadcast(recorded.refold.users.rows), recorded.refold.history.rows
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
        return refresh(known, events, users, overflow, refresher(self.settings, bundle))
