"""The refresh: fold a user's new events in, encode the window, retrieve, rank, explain.

One function for the batch layer (all users, whole history), the speed layer (the users of a micro-batch), evaluation
and replay. It is pure: no clock, no table, no randomness; equal inputs give equal rows (vectors and scores up to the
processor's rounding), whatever batch they come in.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from nightstream.models.arrays import Windows
from nightstream.models.arrow import combined, names, rows_of
from nightstream.models.bundle import Bundle, Loaded
from nightstream.models.features import transform_users
from nightstream.models.ranking.strategies import STRATEGIES, reason_text
from nightstream.serving.user_state import STATES, FoldRules, fold
from nightstream.store.cogroup import by_user
from nightstream.store.tables import EVENTS, LIST_ENTRY, REFRESHED, SEEN, WINDOW, WINDOW_EVENT, arrow_schema

STATE_COLUMNS = tuple(STATES.names)
EVENT_COLUMNS = ("user_id", *WINDOW_EVENT.names)
USER_COLUMNS = ("user_id", "categories", "numbers")
OVERFLOW_COLUMNS = ("user_id", "item_id")
NOBODY = arrow_schema(REFRESHED).empty_table()
NO_EVENTS = arrow_schema(EVENTS.schema).empty_table()


@dataclass(frozen=True)
class Refresher:
    """The refresh under one model and one set of rules.

    rules: of the fold. top_k: length of a list. threads: cores that it may use; 1 where Spark shares them out.
    """

    bundle: Bundle
    rules: FoldRules
    top_k: int
    threads: int = 1

    def __call__(self, states: pa.Table, events: pa.Table, users: pa.Table, overflow: pa.Table | None) -> pa.Table:
        """States and events -> one refreshed row per user of either side, in the shape of REFRESHED, by user_id.

        states: user_id, revision, window, seen, seen_overflowed; no vector is needed, it is computed anew.
        events: EVENTS rows as events.foldable gives them.
        users: USERS rows; a user that is missing there has no attributes, one that is on neither side is left out.
        overflow: SEEN_OVERFLOW rows, or None where no user has overflowed before.
        The revision of each row is that of the state plus one; `overflow` in a row is what must go to the side table
        before the row is committed; `as_of` is the newest event time in the window, null for an empty one.
        """
        folded = fold(states, events, self.rules)
        if not folded.num_rows:
            return NOBODY
        for name in ("categories", "numbers"):
            folded = folded.append_column(name, _attribute(folded["user_id"], users, name))
        folded = folded.append_column("older_seen", _older(folded, overflow))
        return _scored(folded, self.bundle, self.top_k, self.threads)


def refresh(
    states: DataFrame, events: DataFrame, users: DataFrame, overflow: DataFrame | None, refresher: Refresher
) -> DataFrame:
    """The refresher over frames of any size, on the executors; frames as its tables."""
    frames = {
        "states": states.select(*STATE_COLUMNS),
        "events": events.select(*EVENT_COLUMNS),
        "users": users.select(*USER_COLUMNS),
    }
    if overflow is not None:
        # Every night over the whole history appends the same rows again.
        frames["overflow"] = overflow.select(*OVERFLOW_COLUMNS).distinct()

    def whole_users(tables: dict[str, pa.Table]) -> pa.Table:
        return refresher(tables["states"], tables["events"], tables["users"], tables.get("overflow"))

    return by_user(frames, whole_users, REFRESHED)


def unfolded(states: DataFrame) -> DataFrame:
    """States (user_id, revision) with an empty past: what a fold over a whole history starts from."""
    return states.select(
        "user_id",
        "revision",
        F.array().cast(WINDOW).alias("window"),
        F.array().cast(SEEN).alias("seen"),
        F.lit(False).alias("seen_overflowed"),
    )


def unfolded_rows(states: pa.Table) -> pa.Table:
    """`unfolded` of states on the driver; a test compares the two."""
    count = states.num_rows
    nothing = pa.array([[]] * count)
    columns = {"window": nothing, "seen": nothing, "seen_overflowed": pa.repeat(pa.scalar(False), count)}
    columns |= {name: states[name] for name in ("user_id", "revision")}
    return pa.table([columns[name] for name in STATES.names], STATES.names).cast(STATES)


def _attribute(user_ids: pa.ChunkedArray, users: pa.Table, name: str) -> pa.ChunkedArray:
    return users[name].take(pc.index_in(user_ids, value_set=combined(users["user_id"])))


def _older(folded: pa.Table, overflow: pa.Table | None) -> pa.ListArray:
    """list<string>, one entry per folded row: the consumed items that are not in its seen, those that this very fold
    pushes out included. Only the side table's rows of users that have overflowed count."""
    fresh = combined(folded["overflow"])
    owners = [pa.array(np.repeat(np.arange(len(fresh)), np.asarray(pc.list_value_length(fresh))))]
    items = [fresh.flatten().field("item_id")]
    if overflow is not None:
        owner = pc.index_in(overflow["user_id"], value_set=combined(folded["user_id"])).cast(pa.int64())
        counts = pc.fill_null(folded["seen_overflowed"].take(owner), False)
        owners += owner.filter(counts).chunks
        items += overflow["item_id"].filter(counts).chunks
    rows = pa.table({"owner": pa.chunked_array(owners), "item_id": pa.chunked_array(items)}).sort_by("owner")
    sizes = np.bincount(np.asarray(rows["owner"], np.int64), minlength=len(fresh))
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), combined(rows["item_id"]))


def _scored(table: pa.Table, bundle: Bundle, top_k: int, threads: int) -> pa.Table:
    loaded = bundle.load()
    lists = loaded.model.recommend(windows_of(table, loaded), loaded.catalogue, top_k, threads)
    count = table.num_rows
    sizes = np.asarray(pc.list_value_length(combined(table["window"])), np.int64)
    times = combined(table["window"]).flatten().field("event_time")
    newest = times.take(pa.array(np.cumsum(sizes) - 1, mask=sizes == 0))
    vectors = lists.vectors.astype(np.float32)
    offsets = pa.array(np.arange(count + 1, dtype=np.int32) * vectors.shape[1])
    columns = {
        "user_id": table["user_id"],
        "revision": pc.add(table["revision"], 1),
        "window": table["window"],
        "seen": table["seen"],
        "seen_overflowed": table["seen_overflowed"],
        "vector": pa.ListArray.from_arrays(offsets, pa.array(vectors.reshape(-1))),
        "model_version": pa.array([bundle.model_version] * count),
        "catalogue_version": pa.array([bundle.catalogue_version] * count),
        "as_of": newest,
        "overflow": table["overflow"],
        "items": _entries(lists, loaded),
    }
    return pa.table([columns[f.name] for f in REFRESHED], names=REFRESHED.names)


def windows_of(table: pa.Table, loaded: Loaded) -> Windows:
    """Folded rows with user attributes -> the arrays that the model reads."""
    length, model = loaded.model.window_length, loaded.model
    window = combined(table["window"])
    sizes = np.asarray(pc.list_value_length(window), dtype=np.int64)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    starts = np.cumsum(sizes) - sizes
    place = np.arange(len(owner)) - starts[owner] - sizes[owner] + length
    inside = place >= 0
    owner, place = owner[inside], place[inside]

    def padded(values: np.ndarray, kind: type) -> np.ndarray:
        out: np.ndarray = np.zeros((len(sizes), length), dtype=kind)
        out[owner, place] = values[inside]
        return out

    events = window.flatten()
    items = rows_of(events.field("item_id"), loaded.item_ids)
    types = rows_of(events.field("event_type"), pa.array(model.event_types, pa.string()))
    times = np.asarray(events.field("event_time").cast(pa.timestamp("us")).cast(pa.int64()))
    values = loaded.statistics.scale_values(events.field("value"))
    seen, offsets = _seen(table, loaded)
    return Windows(
        padded(items, np.int32),
        padded(types, np.int32),
        padded(times, np.int64),
        padded(values, np.float32),
        transform_users(table.select(["categories", "numbers"]), loaded.statistics),
        seen,
        offsets,
    )


def _seen(table: pa.Table, loaded: Loaded) -> tuple[np.ndarray, np.ndarray]:
    seen, older = combined(table["seen"]), combined(table["older_seen"])
    kept = np.asarray(pc.list_value_length(seen), dtype=np.int64)
    more = np.asarray(pc.fill_null(pc.list_value_length(older), 0), dtype=np.int64)
    rows = np.concatenate(
        [rows_of(seen.flatten().field("item_id"), loaded.item_ids), rows_of(older.flatten(), loaded.item_ids)]
    )
    users = np.concatenate([np.repeat(np.arange(len(kept)), kept), np.repeat(np.arange(len(more)), more)])
    users, rows = users[rows > 0], rows[rows > 0]
    order = np.argsort(users, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(users, minlength=len(kept)))]).astype(np.int64)
    return rows[order].astype(np.int32), offsets


def _entries(lists, loaded: Loaded) -> pa.ListArray:
    held = lists.rows > 0
    sizes = held.sum(axis=1)
    ranks = (np.arange(lists.rows.shape[1], dtype=np.int32) + 1)[None, :].repeat(len(lists.rows), axis=0)
    because = lists.because[held]
    strategies = pa.array(list(STRATEGIES), pa.string()).take(pa.array(lists.strategies[held]))
    entry = pa.StructArray.from_arrays(
        [
            pa.array(ranks[held], pa.int32()),
            names(loaded.item_ids, lists.rows[held]),
            pa.array(lists.scores[held].astype(np.float64)),
            strategies,
            _reasons(lists.strategies[held], because, loaded),
            names(loaded.item_ids, because),
        ],
        names=LIST_ENTRY.names,
    )
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), entry)


def _reasons(strategies: np.ndarray, because: np.ndarray, loaded: Loaded) -> pa.Array:
    """string [N] of N entries: the sentence of each, made once for all entries that have the same."""
    many = len(loaded.catalogue) + 1
    pairs, entries = np.unique(strategies.astype(np.int64) * many + because, return_inverse=True)
    known, titles = list(STRATEGIES), names(loaded.titles, pairs % many).to_pylist()
    sentences = [reason_text(known[s], t) for s, t in zip((pairs // many).tolist(), titles, strict=True)]
    return pa.array(sentences, pa.string()).take(pa.array(entries))
