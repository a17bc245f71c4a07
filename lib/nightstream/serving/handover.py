"""The hand-over: whose list is behind the model and the catalogue that serve."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import types as T

from nightstream.models.arrow import combined
from nightstream.models.bundle import Bundle
from nightstream.serving.commits import newest_rows
from nightstream.store.materialize import Cut
from nightstream.store.storage import Storage
from nightstream.store.tables import RECOMMENDATIONS, USER_VECTORS

_USERS = T.StructType([T.StructField("user_id", T.StringType())])
_NOBODY = pa.array([], pa.string())
_ITEMS_PER_QUERY = 5_000
_READ = ["user_id", "revision", "model_version", "items"]


def some_behind(storage: Storage, bundle: Bundle, pending: Sequence[Cut], most: int) -> Cut | None:
    """Some user_id whose newest row is under another model than the bundle's, or whose newest list holds a withdrawn
    item; None when there is nobody.

    A commit of so many users that it is not on the driver is looked at when it is merged. Until then users that it is
    about may be given needlessly, and where there is nobody else, no rows are given instead of None.

    Args:
        storage: the tables.
        bundle: the model that serves, with its catalogue.
        pending: commits that the serving tables may lack, in the order of their commits; from before this is called.
        most: how many users at most.

    Returns:
        The rows, distinct.
    """
    tables = [each.table.select(_READ) for each in pending if each.table is not None]
    newer = newest_rows(tables) if tables else None
    # What the tables say of these is no longer true.
    outdated = _NOBODY if newer is None else combined(newer["user_id"])
    model, withdrawn = bundle.model_version, bundle.load().withdrawn()
    wanted = most + len(outdated)
    named = "SELECT user_id FROM {user_vectors} WHERE model_version <> :model LIMIT :wanted"
    parts = [storage.query(named, USER_VECTORS, model=model, wanted=wanted)["user_id"]]
    for start in range(0, len(withdrawn), _ITEMS_PER_QUERY):
        items = withdrawn.slice(start, _ITEMS_PER_QUERY).to_pylist()
        held = "SELECT DISTINCT user_id FROM {recommendations} WHERE item_id IN (:items) LIMIT :wanted"
        parts.append(storage.query(held, RECOMMENDATIONS, items=items, wanted=wanted)["user_id"])
    behind = combined(pa.chunked_array([chunk for part in parts for chunk in part.chunks], pa.string()))
    behind = behind.filter(pc.invert(pc.is_in(behind, value_set=outdated)))
    if newer is not None:
        behind = pa.concat_arrays([behind, _behind(newer, model, withdrawn)])
    users = pc.unique(behind).slice(0, most)
    if not len(users) and len(tables) == len(pending):
        return None
    return Cut.of(storage.spark, pa.table({"user_id": users}), _USERS)


def _behind(committed: pa.Table, model: str, withdrawn: pa.Array) -> pa.Array:
    """As `some_behind`, of committed rows, one per user."""
    users, lists = combined(committed["user_id"]), combined(committed["items"])
    others = users.filter(pc.not_equal(combined(committed["model_version"]), model))
    listed = pc.is_in(pc.list_flatten(lists).field("item_id"), value_set=withdrawn)
    return pa.concat_arrays([others, users.take(pc.list_parent_indices(lists).filter(listed))])
