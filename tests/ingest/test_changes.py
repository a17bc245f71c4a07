"""Whose history a batch ingest has changed since the windows were last written."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from nightstream.ingest import changes
from nightstream.store.tables import EVENTS

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def event(event_id, user, kind="view", retracts=None, raw_id=None):
    return (event_id, user, "i", kind, NOW, None, retracts, "c", raw_id or f"raw {event_id}", NOW)


def test_touched_are_users_of_events_that_came_or_went_and_owners_of_what_was_taken_back(storage, spark):
    def events(*rows):
        return spark.createDataFrame(list(rows), EVENTS.schema).coalesce(1)

    kept = [event("b", "taken from"), event("c", "left alone")]
    storage.append(EVENTS, events(event("a", "superseded"), *kept))
    assert not changes.is_marked(storage)
    changes.mark(storage, "a source", NOW)
    superseding = event("a", "superseding", raw_id="another")
    storage.overwrite(EVENTS, events(superseding, *kept))
    changes.mark(storage, "the next night's", NOW + timedelta(days=1))
    storage.append(EVENTS, events(event("d", "new"), event("r", "who takes back", "retract", "b")))
    found = changes.touched_users(storage, "retract", NOW + timedelta(days=4))
    assert sorted(r.user_id for r in found.collect()) == ["new", "superseded", "superseding", "taken from"]
    # The version of the table before the first mark may be gone.
    assert changes.touched_users(storage, "retract", NOW + timedelta(days=6)) is None
    changes.unmark(storage)
    assert not changes.is_marked(storage)
