"""The fold: one user's window and seen items from any set of that user's events.

`fold(states, events)` is commutative, associative and idempotent. The window is the newest N of the union of events,
ordered by (event_time, event_id), no event_id twice; of two events with one id the greater (event_time, content_hash)
stays. `seen` is item -> newest time, merged by maximum, the newest M kept. Truncation loses nothing that a later fold
would want back: whatever was cut has N (or M) greater ones before it, in every order of arrival.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nightstream.models.arrow import combined, strings
from nightstream.store.tables import USER_VECTORS, arrow_schema

# What a fold needs of a row of USER_VECTORS, and the columns of its lists' entries, in Arrow's types.
_STATE_COLUMNS = ("user_id", "revision", "window", "seen", "seen_overflowed")
STATES = pa.schema([arrow_schema(USER_VECTORS.schema).field(name) for name in _STATE_COLUMNS])
EVENT_COLUMNS = {field.name: field.type for field in STATES.field("window").type.value_type}
SEEN_COLUMNS = {field.name: field.type for field in STATES.field("seen").type.value_type}
OWNER = "owner"


@dataclass(frozen=True)
class FoldRules:
    """length: newest events in a window. seen_limit: newest seen items in a state. window_types: the event types that
    enter a window; an event of another type makes its user known without having consumed anything."""

    length: int
    seen_limit: int
    window_types: Sequence[str]


def fold(states: pa.Table, events: pa.Table, rules: FoldRules) -> pa.Table:
    """Fold events into states.

    states: one row per user: user_id, revision, window, seen, seen_overflowed.
    events: EVENTS rows as events.foldable gives them, any number per user, any order, any repetition.
    Returns one row per user of either side, ascending by user_id: user_id, revision (of the state folded into, 0 for
    none), window, seen, seen_overflowed, overflow (the seen entries that no longer fit, oldest first).
    """
    named = pa.chunked_array([*strings(states["user_id"]).chunks, *strings(events["user_id"]).chunks], pa.string())
    users = pc.unique(named)
    users = users.take(pc.sort_indices(users))
    of_state, of_event = _places(states["user_id"], users), _places(events["user_id"], users)
    entering = np.flatnonzero(np.asarray(pc.is_in(strings(events["event_type"]), pa.array(rules.window_types))))
    arriving = {OWNER: pa.array(of_event[entering])}
    arriving |= {name: events[name].take(pa.array(entering)).cast(kind) for name, kind in EVENT_COLUMNS.items()}
    arrived = pa.table(arriving)
    window = _window(pa.concat_tables([_entries(states["window"], of_state, EVENT_COLUMNS), arrived]), rules.length)
    seen = _seen(
        pa.concat_tables(
            [_entries(states["seen"], of_state, SEEN_COLUMNS), arrived.select([OWNER, *SEEN_COLUMNS])],
        )
    )
    from_end = _places_from_end(seen)
    fits = from_end < rules.seen_limit
    revision = np.zeros(len(users), np.int64)
    np.maximum.at(revision, of_state, np.asarray(states["revision"], np.int64))
    overflowed = np.zeros(len(users), bool)
    overflowed[of_state[np.asarray(states["seen_overflowed"].to_numpy(), bool)]] = True
    overflowed[np.asarray(seen[OWNER])[~fits]] = True
    return pa.table(
        {
            "user_id": users,
            "revision": revision,
            "window": _lists(window, len(users), EVENT_COLUMNS),
            "seen": _lists(seen.filter(pa.array(fits)), len(users), SEEN_COLUMNS),
            "seen_overflowed": overflowed,
            "overflow": _lists(seen.filter(pa.array(~fits)), len(users), SEEN_COLUMNS),
        }
    )


def states_of(rows: pa.Table) -> pa.Table:
    """The columns of a state, in one and the same type wherever the rows come from."""
    return rows.select(STATES.names).cast(STATES)


def _window(rows: pa.Table, length: int) -> pa.Table:
    """Events of all users -> those in the windows, ascending by (owner, event_time, event_id)."""
    rows = _sorted(rows, OWNER, "event_id", "event_time", "content_hash")
    rows = _sorted(rows.filter(pa.array(last_of_runs(rows, [OWNER, "event_id"]))), OWNER, "event_time", "event_id")
    return rows.filter(pa.array(_places_from_end(rows) < length))


def _seen(rows: pa.Table) -> pa.Table:
    """Consumed items, repetitions included -> each item of a user once, ascending by (owner, event_time, item_id)."""
    rows = _sorted(rows, OWNER, "item_id", "event_time")
    return _sorted(rows.filter(pa.array(last_of_runs(rows, [OWNER, "item_id"]))), OWNER, "event_time", "item_id")


def _sorted(rows: pa.Table, *keys: str) -> pa.Table:
    return rows.take(pc.sort_indices(rows, [(key, "ascending") for key in keys])).combine_chunks()


def last_of_runs(rows: pa.Table, keys: Sequence[str]) -> np.ndarray:
    """bool [N]: whether a row is the last one of its run of equal keys."""
    last = np.ones(rows.num_rows, bool)
    if rows.num_rows > 1:
        differs = np.zeros(rows.num_rows - 1, bool)
        for key in keys:
            column = rows[key].combine_chunks()
            differs |= np.asarray(pc.not_equal(column[1:], column[:-1]))
        last[:-1] = differs
    return last


def _places_from_end(rows: pa.Table) -> np.ndarray:
    """int [N]: how many rows of the same owner follow; rows stand together by owner."""
    owner = np.asarray(rows[OWNER], np.int64)
    ends = np.searchsorted(owner, owner, side="right")
    return np.asarray(ends - 1 - np.arange(len(owner)))


def _places(values: pa.ChunkedArray, users: pa.Array) -> np.ndarray:
    """int64 [N]: places of user ids among the users."""
    return np.asarray(pc.index_in(strings(values), value_set=users), np.int64)


def _entries(lists: pa.ChunkedArray, owner: np.ndarray, columns: dict[str, pa.DataType]) -> pa.Table:
    """The entries of list columns as rows, with the owner of each."""
    parts: dict[str, list[pa.Array]] = {name: [] for name in columns}
    sizes = np.asarray(pc.fill_null(pc.list_value_length(lists), 0), np.int64)
    for chunk in lists.chunks:
        flat = chunk.flatten()
        for name in columns:
            parts[name].append(flat.field(name))
    table = {OWNER: pa.array(np.repeat(owner, sizes))}
    table |= {name: pa.chunked_array(parts[name], kind) for name, kind in columns.items()}
    return pa.table(table)


def _lists(rows: pa.Table, count: int, columns: dict[str, pa.DataType]) -> pa.ListArray:
    """Rows that stand together by owner -> one list per owner, count of them."""
    sizes = np.bincount(np.asarray(rows[OWNER], np.int64), minlength=count)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), _structs(rows, columns))


def _structs(rows: pa.Table, columns: dict[str, pa.DataType]) -> pa.StructArray:
    return pa.StructArray.from_arrays([combined(rows[name]) for name in columns], names=list(columns))
