"""Events that a batch ingest has recorded and that no window has yet: whoever writes the serving tables next folds them
in, the night by its apply, a stream when it starts."""

from __future__ import annotations

from datetime import datetime, timedelta

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from nightstream.ingest.history import changed_users
from nightstream.store.storage import Storage
from nightstream.store.tables import EVENTS, UNFOLDED

# Delta keeps the files of older versions for a week, unless told otherwise.
_OLDEST_MARK = timedelta(days=5)


def mark(storage: Storage, source: str, now: datetime) -> None:
    """Note, before they are recorded, that events of this source will be."""
    storage.create(EVENTS)
    storage.append_values(UNFOLDED, [(source, now, storage.version(EVENTS))])


def unmark(storage: Storage) -> None:
    """All recorded events are in the windows."""
    if is_marked(storage):
        storage.overwrite(UNFOLDED, storage.read(UNFOLDED).limit(0))


def is_marked(storage: Storage) -> bool:
    storage.create(UNFOLDED)
    return bool(storage.query("SELECT * FROM {unfolded} LIMIT 1", UNFOLDED).num_rows)


def touched_users(storage: Storage, retraction_type: str, now: datetime) -> DataFrame | None:
    """user_id, distinct, of those whose history has changed since the first mark (see `changed_users`): they have a new
    event, one that superseded another or was superseded, or one that was taken back or no longer is. None stands for
    everyone: the table as it was then may be gone.

    Args:
        storage: holds UNFOLDED and EVENTS.
        retraction_type: the event_type of a retraction.
        now: the wall clock, UTC; an older mark than some days is too old.
    """
    at, version = F.unix_seconds(F.min("at")).alias("at"), F.min("events_version").alias("version")
    first = storage.read(UNFOLDED).agg(at, version).first()
    if first is None or first.at < (now - _OLDEST_MARK).timestamp():
        return None
    events, before = storage.read(EVENTS), storage.read(EVENTS, first.version)
    # A row is what one raw payload said; another payload under the same event_id is another row.
    came, left = events.join(before, "raw_id", "left_anti"), before.join(events, "raw_id", "left_anti")
    return changed_users(came.unionByName(left), events, retraction_type)
