"""The one commit of a micro-batch or a night, and the two MERGEs behind it.

An append to `refreshes` is the commit: that row is the truth. `user_vectors` and `recommendations` follow by MERGE, the
higher revision wins, so a MERGE that is repeated, or done after a crash, changes nothing that is right already.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from nightstream.models.arrow import combined
from nightstream.reading import CLOCK_SKEW
from nightstream.serving.user_state import last_of_runs
from nightstream.store import buckets
from nightstream.store.materialize import Cut, cut
from nightstream.store.merge import Merge, Replacement, When
from nightstream.store.storage import Storage
from nightstream.store.tables import (
    RECOMMENDATIONS,
    REFRESHED,
    REFRESHES,
    SEEN_OVERFLOW,
    USER_VECTORS,
    arrow_schema,
)

_STATES, _LISTS = Replacement(("user_id",)), Replacement(("user_id", "rank"), absent="item_id")
OF_THE_USER = ("user_id", "revision", "model_version", "catalogue_version", "as_of", "refreshed_at", "bucket")
_LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)
# Whose newest row one of the serving tables lacks. A user with an empty list is always among them.
_BEHIND = """
SELECT r.user_id
FROM (SELECT user_id, max(revision) AS revision FROM {refreshes} WHERE refreshed_at >= :since GROUP BY user_id) r
LEFT JOIN {user_vectors} v ON v.user_id = r.user_id
LEFT JOIN (SELECT user_id, revision FROM {recommendations} WHERE rank = 1) l ON l.user_id = r.user_id
WHERE v.revision IS NULL OR v.revision < r.revision OR l.revision IS NULL OR l.revision < r.revision
LIMIT :most
"""
# A refreshed user with a full window and 2,000 seen items takes some 100 kB, so at most 400 MB on the driver.
LOCAL_USERS = 4_000


def settled(refreshed: DataFrame, limit: int = LOCAL_USERS) -> Cut:
    """REFRESHED rows, computed now; totals: users, and overflowing: how many of them have overflowing seen entries.

    limit: of materialize.cut; 0 for all users of an installation.
    """
    totals = {"users": F.count("user_id"), "overflowing": F.count_if(F.size("overflow") > 0)}
    return cut(refreshed, totals, limit, cached=False)


def settled_table(spark: SparkSession, refreshed: pa.Table) -> Cut:
    """As `settled`, of REFRESHED rows that were computed on the driver."""
    overflowing = pc.sum(pc.greater(pc.list_value_length(refreshed["overflow"]), 0)).as_py() or 0
    return Cut.of(spark, refreshed, REFRESHED, {"users": refreshed.num_rows, "overflowing": overflowing})


def commit(
    storage: Storage,
    refreshed: Cut,
    writer: str,
    batch_id: int,
    refreshed_at: datetime,
    refolded: Cut | None = None,
    attempts: int = 1,
) -> Cut:
    """The rows as committed: one per refreshed user, appended to `refreshes`.

    It may be called once per (writer, batch_id): whether a batch that comes again is committed, `is_committed` tells.
    Overflowing seen entries go to their side table first: were the order the other way round, a crash between the two
    would lose them.

    Args:
        storage: holds REFRESHES and SEEN_OVERFLOW.
        refreshed: rows of the refresh, cut off by `settled`.
        writer: who commits, such as a stream by its checkpoint.
        batch_id: the number of the batch among those of the writer.
        refreshed_at: the wall clock, UTC.
        refolded: user_id of those whose states were folded from their whole history; what the side table had of them
            from before is no longer true where an event has been taken back.
        attempts: how often deleting that is tried where another writer is met.

    Returns:
        REFRESHES rows, on the driver where `refreshed` is.
    """
    _keep_overflow(storage, refreshed, refolded, attempts)
    constants = {"refreshed_at": refreshed_at, "writer": writer, "batch_id": batch_id}
    if refreshed.table is not None:
        count = refreshed.table.num_rows
        kinds = arrow_schema(REFRESHES.schema)
        columns = {name: pa.repeat(pa.scalar(constants[name], kinds.field(name).type), count) for name in constants}
        columns = {n: columns[n] if n in columns else refreshed.table[n] for n in REFRESHES.schema.names}
        committed = Cut.of(storage.spark, pa.table(columns), REFRESHES.schema, {})
    else:
        literals = {name: F.lit(value).cast(REFRESHES.schema[name].dataType) for name, value in constants.items()}
        committed = Cut(refreshed.rows.withColumns(literals).select(*REFRESHES.schema.names), {})
    storage.append(REFRESHES, committed)
    return committed


def _keep_overflow(storage: Storage, refreshed: Cut, refolded: Cut | None, attempts: int) -> None:
    """Repeated rows do no harm, so a batch that comes again appends them again: its users may be others."""
    if not refreshed.totals["overflowing"] and refolded is None:
        return
    entries = refreshed.mapped(_overflowing, SEEN_OVERFLOW.schema)
    if refreshed.totals["overflowing"]:
        storage.append(SEEN_OVERFLOW, entries)
    if refolded is None or not storage.exists(SEEN_OVERFLOW):
        return
    few = None
    if refolded.table is not None:
        users = refolded.table["user_id"].to_pylist()
        few = storage.few_rows(SEEN_OVERFLOW, "user_id IN (:users)", users=users)
    if few is None:
        before = storage.read(SEEN_OVERFLOW).join(refolded.rows, "user_id", "left_semi")
    elif few.num_rows:
        before = storage.spark.createDataFrame(few, SEEN_OVERFLOW.schema)
    else:
        return
    key = ["user_id", "item_id"]
    stale = before.select(*key).distinct().join(entries.rows.select(*key), key, "left_anti")
    if stale.isEmpty():
        return
    change = Merge("t.user_id = s.user_id AND t.item_id = s.item_id", (When("delete"),))
    storage.with_retries(lambda: storage.merge(SEEN_OVERFLOW, stale, change), attempts, SEEN_OVERFLOW.name)


def _overflowing(refreshed: pa.Table) -> pa.Table:
    """SEEN_OVERFLOW rows of REFRESHED rows."""
    lists = combined(refreshed["overflow"])
    owners, entries = pc.list_parent_indices(lists), pc.list_flatten(lists)
    columns = {"user_id": combined(refreshed["user_id"]).take(owners)}
    columns |= {name: entries.field(name) for name in ("item_id", "event_time")}
    return pa.table([columns[name] for name in SEEN_OVERFLOW.schema.names], SEEN_OVERFLOW.schema.names)


def is_committed(storage: Storage, writer: str, batch_id: int) -> bool:
    """Whether this writer has committed this batch already: true in the replay of a batch that died in its MERGEs."""
    if not storage.exists(REFRESHES):
        return False
    sql = "SELECT batch_id FROM {refreshes} WHERE writer = :writer AND batch_id = :batch LIMIT 1"
    return storage.query(sql, REFRESHES, writer=writer, batch=batch_id).num_rows > 0


@dataclass(frozen=True)
class Layout:
    """What a MERGE must know of the serving tables; it changes only under the lease, by a night.

    width: how many ranks it must write so that no longer list of an older setting keeps its end.
    vectors, lists: buckets of USER_VECTORS and RECOMMENDATIONS.
    """

    width: int
    vectors: int = 1
    lists: int = 1

    @classmethod
    def of(cls, storage: Storage, top_k: int) -> Layout:
        """As the tables are now; lists get top_k ranks."""
        vectors, lists = buckets.present(storage, USER_VECTORS), buckets.present(storage, RECOMMENDATIONS)
        if not storage.exists(RECOMMENDATIONS):
            return cls(top_k, vectors, lists)
        longest = storage.query("SELECT max(rank) AS longest FROM {recommendations}", RECOMMENDATIONS)["longest"][0]
        return cls(max(top_k, longest.as_py() or 0), vectors, lists)


def merge(storage: Storage, rows: Cut, layout: Layout, attempts: int) -> None:
    """MERGE committed rows into both serving tables, side by side.

    rows: one per user, its newest: of an older one, ranks that the user's list no longer has would be inserted again.
    """
    retry = storage.with_retries
    with ThreadPoolExecutor(2) as pool:
        vectors = pool.submit(retry, lambda: _merge_states(storage, rows, layout), attempts, USER_VECTORS.name)
        lists = pool.submit(retry, lambda: _merge_lists(storage, rows, layout), attempts, RECOMMENDATIONS.name)
        vectors.result()
        lists.result()


def spread(storage: Storage, users: int, attempts: int) -> None:
    """Give both serving tables as many buckets as so many users need, one table after the other."""
    for spec in (USER_VECTORS, RECOMMENDATIONS):
        storage.with_retries(partial(buckets.spread, storage, spec, users), attempts, spec.name)


def merge_tail(storage: Storage, layout: Layout, attempts: int) -> None:
    """Merge what was committed but not merged before a crash; doing it needlessly changes nothing.

    Both tables follow `refreshes` in order, so whatever one of them misses is not older than its newest row, but for
    the skew of the writers' clocks.
    """
    storage.create(REFRESHES, USER_VECTORS, RECOMMENDATIONS)
    reached = storage.query(
        "SELECT max(refreshed_at) AS at FROM {user_vectors} UNION ALL "
        "SELECT max(refreshed_at) AS at FROM {recommendations}",
        USER_VECTORS,
        RECOMMENDATIONS,
    )["at"].drop_null()
    since = min(reached.to_pylist()) - CLOCK_SKEW if len(reached) == 2 else _LONG_AGO
    most = LOCAL_USERS + 1
    users = storage.query(_BEHIND, REFRESHES, USER_VECTORS, RECOMMENDATIONS, since=since, most=most)["user_id"]
    if not len(users):
        return
    if len(users) <= LOCAL_USERS:
        sql = "SELECT * FROM {refreshes} WHERE refreshed_at >= :since AND user_id IN (:users)"
        rows = storage.query(sql, REFRESHES, since=since, users=users.to_pylist())
        tail = Cut.of(storage.spark, newest_rows([rows]), REFRESHES.schema)
    else:
        tail = Cut(newest([storage.read(REFRESHES).where(F.col("refreshed_at") >= F.lit(since))]), {})
    merge(storage, tail, layout, attempts)


def newest(frames: Sequence[DataFrame]) -> DataFrame:
    """The newest row of each user over all frames of rows with user_id and revision: that of the highest revision.

    Rows of one user and revision are equal, since a revision is committed once. `newest_rows` says the same for tables
    on the driver; a test compares the two.
    """
    first, *rest = frames
    for frame in rest:
        first = first.unionByName(frame)
    order = Window.partitionBy("user_id").orderBy(F.desc("revision"))
    return first.withColumn("_place", F.row_number().over(order)).where("_place = 1").drop("_place")


def newest_rows(tables: Sequence[pa.Table]) -> pa.Table:
    """`newest` of tables on the driver, ascending by user_id."""
    rows = pa.concat_tables(tables).sort_by([("user_id", "ascending"), ("revision", "ascending")])
    return rows.filter(pa.array(last_of_runs(rows, ["user_id"])))


def newest_committed(storage: Storage, commits: Sequence[Cut]) -> Cut:
    """`newest` over what `commit` returned, without a job where all of it is on the driver."""
    tables = [each.table for each in commits if each.table is not None]
    if len(tables) == len(commits):
        return Cut.of(storage.spark, newest_rows(tables), REFRESHES.schema, {})
    return Cut(newest([each.rows for each in commits]), {})


def state_rows(rows: pa.Table, count: int) -> pa.Table:
    """Committed rows -> USER_VECTORS rows. count: of the table's buckets."""
    return _with_bucket(rows, count).select(USER_VECTORS.schema.names)


def list_rows(rows: pa.Table, width: int, count: int) -> pa.Table:
    """The lists of committed rows, rank by rank.

    Args:
        rows: one per user.
        width: ranks per user.
        count: of the table's buckets.

    Returns:
        RECOMMENDATIONS rows, one per user and rank 1..width; a rank behind the end of the list has no item.
    """
    lists = combined(rows["items"])
    sizes, entries = np.asarray(pc.list_value_length(lists), np.int64), pc.list_flatten(lists)
    owners, ranks = np.repeat(np.arange(len(sizes)), width), np.tile(np.arange(1, width + 1), len(sizes))
    places = (np.cumsum(sizes) - sizes)[owners] + ranks - 1
    listed = entries.take(pa.array(places, mask=ranks > sizes[owners]))
    of_users = _with_bucket(rows, count).select([n for n in RECOMMENDATIONS.schema.names if n in OF_THE_USER])
    columns = {name: of_users[name].take(pa.array(owners)) for name in of_users.column_names}
    columns["rank"] = pa.array(ranks, pa.int32())
    columns |= {n: listed.field(n) for n in RECOMMENDATIONS.schema.names if n not in columns}
    return pa.table([columns[name] for name in RECOMMENDATIONS.schema.names], RECOMMENDATIONS.schema.names)


def _with_bucket(rows: pa.Table, count: int) -> pa.Table:
    numbers = pa.array([buckets.bucket_of(user, count) for user in rows["user_id"].to_pylist()], pa.int32())
    return rows.append_column("bucket", numbers)


def _merge_states(storage: Storage, rows: Cut, layout: Layout) -> None:
    source = rows.mapped(partial(state_rows, count=layout.vectors), USER_VECTORS.schema)
    storage.replace(USER_VECTORS, source, _STATES, buckets.touched(layout.vectors, _users(rows)))


def _merge_lists(storage: Storage, rows: Cut, layout: Layout) -> None:
    source = rows.mapped(partial(list_rows, width=layout.width, count=layout.lists), RECOMMENDATIONS.schema)
    storage.replace(RECOMMENDATIONS, source, _LISTS, buckets.touched(layout.lists, _users(rows)))


def _users(rows: Cut) -> pa.ChunkedArray | None:
    return None if rows.table is None else rows.table["user_id"]
