"""The batch layer: everyone's list, refreshed over the whole history under one model."""

from __future__ import annotations

from datetime import datetime

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from nightstream.ingest.history import foldable
from nightstream.models.bundle import Bundle
from nightstream.runtime.settings import Settings
from nightstream.serving import commits
from nightstream.serving.refresh import Refresher, refresh, unfolded
from nightstream.serving.user_state import FoldRules
from nightstream.store.storage import Storage
from nightstream.store.tables import EVENTS, USER_VECTORS, USERS


def refresher(settings: Settings, bundle: Bundle, threads: int = 1) -> Refresher:
    """The refresh under this installation's settings."""
    window = settings.window
    rules = FoldRules(window.length, window.seen_limit, tuple(settings.events.window_types))
    return Refresher(bundle, rules, settings.serving.top_k, threads)


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


def apply_all(
    storage: Storage,
    settings: Settings,
    bundle: Bundle,
    writer: str,
    batch_id: int,
    now: datetime,
    only: DataFrame | None = None,
) -> int:
    """Refresh every known user over the whole history under one model and merge; returns the number of users.

    only: user_id of those to refresh, distinct; None for everyone.
    """
    events = foldable(storage.read(EVENTS), settings.events.retraction_type)
    states, users = everyone(storage, settings), storage.read_or_empty(USERS)
    if only is not None:
        # Users that are in `events` alone have no state yet: the fold makes one.
        states, events, users = (rows.join(only, "user_id", "left_semi") for rows in (states, events, users))
    # No SEEN_OVERFLOW: the history has all that overflows, and only what has not been taken back.
    refreshed = commits.settled(refresh(states, events, users, None, refresher(settings, bundle)), limit=0)
    # Never a repetition: run again, it refreshes from newer states, and what is merged must stand in `refreshes`.
    refolded = refreshed.select("user_id")
    attempts = settings.serving.merge_attempts
    commit = commits.commit(storage, refreshed, writer, batch_id, now, refolded=refolded, attempts=attempts)
    count: int = refreshed.totals["users"] or 0
    commits.merge(storage, commit, commits.Layout.of(storage, settings.serving.top_k), attempts)
    if only is None:
        commits.spread(storage, count, attempts)
    return count
