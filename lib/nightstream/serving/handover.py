"""The hand-over: whose list is behind the model and the catalogue that serve."""

from __future__ import annotations

from collections.abc import Sequence

from pyspark.sql import functions as F

from nightstream.models.bundle import Bundle
from nightstream.serving import commits
from nightstream.store.materialize import Cut, cut
from nightstream.store.storage import Storage
from nightstream.store.tables import USER_VECTORS


def some_behind(storage: Storage, bundle: Bundle, pending: Sequence[Cut], most: int) -> Cut | None:
    """Some user_id whose newest row is under another model than the bundle's, or whose newest list holds a withdrawn
    item; None when there is nobody.

    Args:
        storage: the tables.
        bundle: the model that serves, with its catalogue.
        pending: commits that the serving tables may lack, in the order of their commits.
        most: how many users at most.

    Returns:
        The rows, total `users`.
    """
    columns = ("user_id", "revision", "model_version")
    table = storage.read(USER_VECTORS)
    known = table
    if pending:
        newer = commits.newest_committed(storage, pending).rows
        known = commits.newest([table.select(*columns), newer.select(*columns)])
    behind = known.where(F.col("model_version") != bundle.model_version).select("user_id")
    withdrawn = bundle.load().withdrawn()
    if withdrawn.num_rows:
        items = storage.spark.createDataFrame(withdrawn)
        behind = behind.unionByName(commits.holders(storage, pending, items)).distinct()
    some = cut(behind.limit(most), {"users": F.count("user_id")})
    return some if some.totals["users"] else None
