"""The refresh: fold a user's new events in, encode the window, retrieve, rank, explain.

One function for the batch layer (all users, whole history), the speed layer (the users of a micro-batch), evaluation
and replay. It is pure: no clock, no table, no randomness; equal inputs give equal rows, whatever batch they come in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from nightstream.blocks import Windows
from nightstream.explain import STRATEGIES, reason_text
from nightstream.features import transform_users
from nightstream.payload import Loaded, Payload, combined, names, rows_of
from nightstream.tables import LIST_ENTRY, REFRESHED
from nightstream.window import fold


def refresh(
    states: DataFrame,
    events: DataFrame,
    users: DataFrame,
    overflow: DataFrame | None,
    payload: Payload,
    *,
    length: int,
    seen_limit: int,
    window_types: Sequence[str],
    top_k: int,
    chunks: int = 1,
) -> DataFrame:
    """States and live events -> one refreshed row per user of either side, in the shape of REFRESHED.

    states: user_id, revision, window, seen, seen_overflowed; no vector is needed, it is computed anew.
    events: EVENTS rows, retractions taken out (see events.live).
    users: USERS rows; a user that is missing there has no attributes.
    overflow: SEEN_OVERFLOW rows, or None where no state has overflowed.
    The revision of each row is that of the state plus one; `overflow` in a row is what must go to the side table
    before the row is committed; `as_of` is the newest event time in the window, null for an empty one.
    """
    folded = fold(states, events, length, seen_limit, window_types, chunks)
    joined = folded.join(users.select("user_id", "categories", "numbers"), "user_id", "left")
    if overflow is not None:
        older = overflow.groupBy("user_id").agg(F.collect_set("item_id").alias("older_seen"))
        joined = joined.join(older, "user_id", "left")
    else:
        joined = joined.withColumn("older_seen", F.lit(None).cast("array<string>"))
    return joined.mapInArrow(_scorer(payload, top_k), REFRESHED)


def _scorer(payload: Payload, top_k: int) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def score(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        loaded: Loaded | None = None
        for batch in batches:
            if batch.num_rows:
                loaded = loaded or payload.load()
                yield _score_batch(pa.Table.from_batches([batch]), payload, loaded, top_k)

    return score


def _score_batch(table: pa.Table, payload: Payload, loaded: Loaded, top_k: int) -> pa.RecordBatch:
    table = table.combine_chunks()
    lists = loaded.model.recommend(windows_of(table, loaded), loaded.catalogue, top_k)
    count = table.num_rows
    empty = np.asarray(pc.list_value_length(table["window"])) == 0
    window_times = _flat(table["window"], "event_time")
    ends = np.cumsum(np.asarray(pc.list_value_length(table["window"])))
    newest = pc.take(window_times, pa.array(np.where(empty, 0, ends - 1), mask=empty)) if len(window_times) else None
    vectors = lists.vectors.astype(np.float32)
    flat_vectors = pa.array(vectors.reshape(-1))
    offsets = pa.array(np.arange(count + 1, dtype=np.int32) * vectors.shape[1])
    columns = {
        "user_id": table["user_id"],
        "revision": pc.add(table["revision"], 1),
        "window": table["window"],
        "seen": table["seen"],
        "seen_overflowed": table["seen_overflowed"],
        "vector": pa.ListArray.from_arrays(offsets, flat_vectors),
        "model_version": pa.array([payload.model_version] * count),
        "catalogue_version": pa.array([payload.catalogue_version] * count),
        "as_of": newest if newest is not None else pa.nulls(count, pa.timestamp("us", tz="UTC")),
        "overflow": table["overflow"],
        "items": _entries(lists, loaded),
    }
    return pa.table([columns[f.name] for f in REFRESHED], names=REFRESHED.names).combine_chunks().to_batches()[0]


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
    catalogue = loaded.catalogue
    because = lists.because[held]
    strategies = [STRATEGIES[s] for s in lists.strategies[held].tolist()]
    titles = names(catalogue.titles, because)
    entry = pa.StructArray.from_arrays(
        [
            pa.array(ranks[held], pa.int32()),
            pa.array(names(catalogue.item_ids, lists.rows[held]), pa.string()),
            pa.array(lists.scores[held].astype(np.float64)),
            pa.array(strategies, pa.string()),
            pa.array([reason_text(s, t) for s, t in zip(strategies, titles, strict=True)], pa.string()),
            pa.array(names(catalogue.item_ids, because), pa.string()),
        ],
        names=LIST_ENTRY.names,
    )
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), entry)


def _flat(column: pa.ChunkedArray, field: str) -> pa.Array:
    return combined(column).flatten().field(field)
