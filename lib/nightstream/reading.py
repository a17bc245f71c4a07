"""The freshest lists, read without Spark: `recommendations`, with what `refreshes` has beyond it laid over.

`serving/recommendations_now.py` says the same in SQL, for catalogs.
"""

from __future__ import annotations

import os
import zlib
from datetime import datetime, timedelta

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable, QueryBuilder
from deltalake.exceptions import TableNotFoundError

from nightstream.errors import TableError

# The MERGEs follow `refreshes` in order, so `recommendations` has all that is older than its newest row, but for the
# skew of the writers' clocks.
CLOCK_SKEW = timedelta(hours=1)
# Statistics of times may be cut off to it.
_TICK = timedelta(milliseconds=1)


def recommendations(root: str | os.PathLike[str], user_id: str | None = None) -> pa.Table:
    """The newest committed list of everyone, or of one user, merged or not. root: the folder or URI of the tables.

    Columns as in the table `recommendations`, without `bucket`; ordered by user_id and rank. A user whose newest list
    is empty has no rows. An unknown user has none either: the list for strangers is that of the user `*`, the
    `serving.default_user`.
    Raises TableError where a table is missing.
    """
    # `refreshes` first: a commit that is merged in between is then in both, and in one at least even if merged rows
    # leave `refreshes` some day.
    refreshes, serving = _table(root, "refreshes"), _table(root, "recommendations")
    files = pa.table(serving.get_add_actions(flatten=True))
    schema = pa.schema([field for field in pa.schema(serving.schema().to_arrow()) if field.name != "bucket"])

    of_user = [] if user_id is None else [f"user_id = {_text(user_id)}"]
    lists = _select(serving, schema, [*of_user, *_in_bucket(user_id, files)])

    columns = [field for field in pa.schema(refreshes.schema().to_arrow()) if field.name in (*schema.names, "items")]
    reached = _reached(files)
    recent = [*of_user] if reached is None else [*of_user, f"refreshed_at >= '{reached - CLOCK_SKEW}'"]
    tail = _select(refreshes, pa.schema(columns), [*recent, *_behind(refreshes, reached)])
    if not pc.all(pc.is_in(tail["user_id"], value_set=lists["user_id"]), min_count=0).as_py():
        # Who has no list may have a merged commit whose list is empty.
        tail = _select(refreshes, pa.schema(columns), recent)
    return _laid_over(lists, tail).sort_by([("user_id", "ascending"), ("rank", "ascending")])


def _table(root: str | os.PathLike[str], name: str) -> DeltaTable:
    """The table as it is now."""
    place = f"{os.fspath(root).rstrip('/')}/{name}"
    try:
        return DeltaTable(place)
    except TableNotFoundError as error:
        raise TableError.missing(name, place, "root") from error


def _select(table: DeltaTable, schema: pa.Schema, conditions: list[str]) -> pa.Table:
    columns = ", ".join(f'"{name}"' for name in schema.names)
    return _query(table, columns, conditions).cast(schema)


def _query(table: DeltaTable, columns: str, conditions: list[str]) -> pa.Table:
    """The rows that meet all conditions, which leave out files where statistics tell."""
    where = f" WHERE {' AND '.join(conditions)}" if conditions else ""
    return pa.table(QueryBuilder().register("t", table).execute(f"SELECT {columns} FROM t{where}"))


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def _in_bucket(user_id: str | None, files: pa.Table) -> list[str]:
    """The condition that leaves out the files of other users; store/buckets.py spreads them."""
    if user_id is None or not files.num_rows or "partition.bucket" not in files.column_names:
        return []
    buckets = 1 << (files["partition.bucket"][0].as_py().bit_length() - 1)
    return [f"bucket = {buckets + zlib.crc32(user_id.encode()) % buckets}"]


def _reached(files: pa.Table) -> datetime | None:
    """The newest refreshed_at of the table, in whole milliseconds; None where no statistics tell."""
    if "max.refreshed_at" not in files.column_names:
        return None
    newest: datetime | None = pc.max(files["max.refreshed_at"]).as_py()
    return newest and newest.replace(microsecond=newest.microsecond // 1000 * 1000)


def _behind(refreshes: DeltaTable, reached: datetime | None) -> list[str]:
    """The condition that leaves out merged commits: of a stream's last hour all but the last few.

    One writer's commits are merged in the order of their numbers, so those up to the newest merged one are merged.
    """
    files = pa.table(refreshes.get_add_actions(flatten=True))
    if reached is None or not {"min.writer", "min.batch_id", "min.refreshed_at"} <= {*files.column_names}:
        return []
    reaches = pc.field("max.refreshed_at") >= pa.scalar(reached)
    last = files.filter(reaches & (pc.field("min.refreshed_at") < pa.scalar(reached + _TICK)))
    # Where a name is too long for statistics, its shortest and longest form differ.
    writers = {*last["min.writer"].to_pylist(), *last["max.writer"].to_pylist()}
    batch_id = pc.min(last["min.batch_id"]).as_py()
    if len(writers) != 1 or None in writers or batch_id is None:
        return []
    return [f"(writer <> {_text(writers.pop())} OR batch_id > {batch_id})"]


def _laid_over(lists: pa.Table, tail: pa.Table) -> pa.Table:
    """Each user's list of the highest revision.

    Args:
        lists: one row per user and rank, each user's of one revision.
        tail: one row per committed list, with the entries in `items`; any number per user.

    Returns:
        Rows as in lists, in no order.
    """
    newest = _newest(tail)
    first = lists.filter(pc.equal(lists["rank"], 1))
    merged = first["revision"].take(pc.index_in(newest["user_id"], value_set=first["user_id"]))
    newer = newest.filter(pc.fill_null(pc.greater(newest["revision"], merged), True))
    if not newer.num_rows:
        return lists
    items = newer["items"].combine_chunks()
    entries, whose = pc.list_flatten(items), pc.list_parent_indices(items)
    in_entry = [field.name for field in items.type.value_type]
    columns = {
        name: pc.struct_field(entries, name) if name in in_entry else newer[name].take(whose)
        for name in lists.column_names
    }
    others = lists.filter(pc.invert(pc.is_in(lists["user_id"], value_set=newer["user_id"])))
    return pa.concat_tables([others, pa.table(columns).cast(lists.schema)])


def _newest(tail: pa.Table) -> pa.Table:
    """Each user's row of the highest revision; of equal ones the first, as it is with MERGEs."""
    rows = tail.sort_by([("user_id", "ascending"), ("revision", "descending"), ("refreshed_at", "ascending")])
    users = rows["user_id"].combine_chunks()
    begins = pc.not_equal(users[1:], users[:-1])
    return rows.filter(pa.concat_arrays([pa.array([True][: len(users)], pa.bool_()), begins]))
