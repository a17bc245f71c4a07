"""Users spread over buckets, the partitions of the large serving tables: a MERGE leaves the files of all other users
alone. As a MERGE copies whole files, it would else cost what the whole table costs, however few users it is about."""

from __future__ import annotations

import logging
import zlib

import pyarrow as pa
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from nightstream.store.storage import Storage
from nightstream.store.tables import TableSpec

log = logging.getLogger(__name__)

# A file more costs about as much as copying so many users.
USERS_PER_BUCKET = 128
# Smaller tables stay whole: copying all of one takes hardly longer than opening and closing a file for each of some
# hundred users, and what is about many users touches all buckets. Spark is slower at opening files than delta-rs.
FEWEST_BUCKETS, FEWEST_BUCKETS_OF_SPARK, MOST_BUCKETS = 256, 2048, 8192


def wanted(storage: Storage, users: int) -> int:
    """Buckets for a table of so many users: a power of two, or 1 for a small one."""
    fewest = FEWEST_BUCKETS_OF_SPARK if storage.writer is None else FEWEST_BUCKETS
    whole = 1 << max(0, (users // USERS_PER_BUCKET).bit_length() - 1)
    return 1 if whole < fewest else min(whole, MOST_BUCKETS)


def present(storage: Storage, spec: TableSpec) -> int:
    """Buckets of a table, told by any row of it; 1 for one that is empty or not there."""
    if not storage.exists(spec):
        return 1
    rows = storage.query(f"SELECT bucket FROM {{{spec.name}}} LIMIT 1", spec)["bucket"].to_pylist()
    return 1 << (rows[0].bit_length() - 1) if rows else 1


def bucket_of(user_id: str, buckets: int) -> int:
    """From `buckets`, a power of two, to less than twice as much: each row tells how many there are, so no crash can
    part the one from the other."""
    return buckets + zlib.crc32(user_id.encode()) % buckets


def bucket(user_id: Column, buckets: int) -> Column:
    """`bucket_of` as a column."""
    return (F.lit(buckets) + F.crc32(user_id.cast("binary")) % F.lit(buckets)).cast("int")


def touched(buckets: int, users: pa.ChunkedArray | None) -> list[int] | None:
    """The buckets that some users are in, for Storage.replace: None where the table has one, empty for users that are
    not on the driver."""
    if buckets == 1:
        return None
    return [] if users is None else sorted({bucket_of(user, buckets) for user in users.to_pylist()})


def spread(storage: Storage, spec: TableSpec, users: int) -> None:
    """Lay a table out anew, in one commit, where so many users need at least twice the buckets or at most half of them;
    for the one process that may write it."""
    now, then = present(storage, spec), wanted(storage, users)
    if now != then:
        lay_out(storage, spec, storage.read(spec), then)
        log.info("spread over buckets", extra={"table": spec.name, "buckets": then, "before": now})


def lay_out(storage: Storage, spec: TableSpec, rows: DataFrame, buckets: int) -> None:
    """Replace the table by these rows in so many buckets, in one commit; `rows` may come from it."""
    rows = rows.withColumn("bucket", bucket(F.col("user_id"), buckets))
    if buckets == 1:
        storage.lay_out(spec, rows, None)
    else:
        storage.lay_out(spec, rows.repartition("bucket"), "bucket")
