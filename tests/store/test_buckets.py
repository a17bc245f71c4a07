"""A table spread over buckets holds the same rows, and a MERGE leaves the files of other users alone."""

from __future__ import annotations

from datetime import UTC, datetime

import pyarrow as pa
import pytest
from deltalake import DeltaTable
from nightstream.serving import commits
from nightstream.serving.commits import Layout
from nightstream.store import buckets
from nightstream.store.storage import Storage
from nightstream.store.tables import RECOMMENDATIONS, REFRESHED, USER_VECTORS
from pyspark.sql import functions as F

AT = datetime(2024, 5, 1, tzinfo=UTC)
TABLES = (USER_VECTORS, RECOMMENDATIONS)
USERS = [f"u{n}" for n in range(64)]
# In the bucket of u1, of four.
NEW = "new0"


def merged(storage, number, lists, layout, on_driver=True):
    """Commit and MERGE the lists (user -> revision, items)."""
    rows = []
    for user, (revision, items) in lists.items():
        entries = [(n + 1, item, 1.0, "sequence", "why", None) for n, item in enumerate(items)]
        rows.append((user, revision, [], [], False, [float(revision)], "m1", "c1", AT, entries, []))
    frame = storage.spark.createDataFrame(rows, REFRESHED)
    settled = commits.settled(frame, limit=100 if on_driver else 0)
    commits.merge(storage, commits.commit(storage, settled, "test", number, AT), layout, 1)


def held(storage):
    rows = storage.read(RECOMMENDATIONS).orderBy("user_id", "rank").collect()
    states = {(r.user_id, r.revision) for r in storage.read(USER_VECTORS).collect()}
    assert {(r.user_id, r.revision) for r in rows} == states
    return [(r.user_id, r.rank, r.item_id, r.revision) for r in rows]


def files(storage, spec):
    """File -> its users."""
    rows = storage.read(spec).select(F.col("_metadata.file_name").alias("file"), "user_id").distinct().collect()
    found: dict[str, set[str]] = {}
    for row in rows:
        found.setdefault(row.file, set()).add(row.user_id)
    return found


@pytest.fixture
def few_users(monkeypatch):
    """Tables of a few dozen users are spread, too."""
    monkeypatch.setattr(buckets, "USERS_PER_BUCKET", 16)
    monkeypatch.setattr(buckets, "FEWEST_BUCKETS", 2)


@pytest.mark.parametrize(
    ("engine", "counts"),
    [
        ("auto", {0: 1, 943: 1, 32_767: 1, 32_768: 256, 65_535: 256, 10**5: 512, 10**6: 4096, 10**9: 8192}),
        ("spark", {943: 1, 262_143: 1, 262_144: 2048, 524_287: 2048, 10**6: 4096, 10**9: 8192}),
    ],
)
def test_buckets_follow_the_users_and_the_engine(settings, engine, counts):
    storage = Storage(None, settings.storage.model_copy(update={"engine": engine}))
    assert {users: buckets.wanted(storage, users) for users in counts} == counts


def test_spark_and_python_agree_on_the_bucket(spark):
    users = ["", "u1", "Jürgen", "名前", "🙂", "x" * 500]
    rows = spark.createDataFrame(pa.table({"user_id": users})).select(
        "user_id", buckets.bucket(F.col("user_id"), 97).alias("bucket")
    )
    assert {r.user_id: r.bucket for r in rows.collect()} == {u: buckets.bucket_of(u, 97) for u in users}


@pytest.mark.slow
@pytest.mark.parametrize("on_driver", [True, False])
def test_a_merge_into_buckets_leaves_other_files_alone_and_loses_nothing(storage, few_users, on_driver):
    assert buckets.bucket_of(NEW, 4) == buckets.bucket_of("u1", 4)
    merged(storage, 0, {user: (1, ["a", "b"]) for user in USERS}, Layout(2))
    before = held(storage)
    commits.spread(storage, len(USERS), 1)
    layout = Layout.of(storage, 2)
    assert layout == Layout(2, 4, 4)
    assert held(storage) == before
    laid = {spec.name: files(storage, spec) for spec in TABLES}
    assert all(len(found) > 1 for found in laid.values())
    # Nothing changes, nothing is written.
    versions = [storage.version(spec) for spec in TABLES]
    commits.spread(storage, len(USERS), 1)
    assert [storage.version(spec) for spec in TABLES] == versions

    merged(storage, 1, {"u1": (2, ["c"]), NEW: (1, ["d", "e"])}, layout, on_driver)
    kept = [row for row in before if row[0] != "u1"]
    assert held(storage) == sorted([*kept, ("u1", 1, "c", 2), (NEW, 1, "d", 1), (NEW, 2, "e", 1)])
    for spec in TABLES:
        after = files(storage, spec)
        for file, users in laid[spec.name].items():
            assert (file in after) == ("u1" not in users)
        # The same for readers without Spark.
        rows = DeltaTable(storage.location(spec)).to_pyarrow_table(columns=["user_id", "bucket"])
        assert {(u, b) for u, b in zip(*rows.to_pydict().values(), strict=True)} == {
            (u, buckets.bucket_of(u, 4)) for u in (*USERS, NEW)
        }
    # A smaller table goes back into one piece.
    now = held(storage)
    commits.spread(storage, 2, 1)
    assert Layout.of(storage, 2) == Layout(2)
    assert held(storage) == now
    merged(storage, 3, {"u2": (2, ["z"])}, Layout.of(storage, 2), on_driver)
    assert ("u2", 1, "z", 2) in held(storage)
    assert ("u2", 2) not in {(user, rank) for user, rank, *_ in held(storage)}
