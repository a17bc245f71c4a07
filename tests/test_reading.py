"""The freshest lists are the newest committed ones, whole, however far the MERGEs are and whoever reads them."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import duckdb_ext
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from nightstream import reading
from nightstream.errors import TableError
from nightstream.reading import recommendations
from nightstream.runtime.settings import validate
from nightstream.serving import commits, recommendations_now
from nightstream.serving.commits import Layout
from nightstream.store.buckets import bucket_of
from nightstream.store.storage import Storage
from nightstream.store.tables import RECOMMENDATIONS, REFRESHED, REFRESHES, TableSpec, arrow_schema

AT = datetime(2024, 5, 1, 12, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
PAGE = Path(__file__).parent.parent / "docs" / "operations.md"
COLUMNS = [name for name in RECOMMENDATIONS.schema.names if name != "bucket"]


@dataclass(frozen=True)
class Row:
    """One committed list."""

    user: str
    revision: int
    items: tuple[str, ...]
    at: datetime = AT
    model: str = "m1"
    writer: str = "stream"
    batch: int = 0

    def of_user(self) -> dict[str, Any]:
        return {
            "user_id": self.user,
            "revision": self.revision,
            "model_version": self.model,
            "catalogue_version": f"c{self.batch}",
            "as_of": self.at - MINUTE,
            "refreshed_at": self.at,
        }

    def entries(self) -> list[dict[str, Any]]:
        return [
            {
                "rank": rank,
                "item_id": item,
                "score": 1 / rank,
                "strategy": "sequence",
                "reason": f"Goes with “{item}”",
                "because_item_id": None if rank % 2 else "b",
            }
            for rank, item in enumerate(self.items, 1)
        ]

    def state(self) -> dict[str, Any]:
        """What stands in `refreshes` beside, and what a refresh has before it is committed."""
        return {"window": [], "seen": [], "seen_overflowed": False, "vector": [0.0]} | self.of_user()

    def listed(self) -> list[dict[str, Any]]:
        """The rows that a reader is to see."""
        return [self.of_user() | entry for entry in self.entries()]


def write(root: Path, spec: TableSpec, rows: list[dict[str, Any]], **how: Any) -> None:
    table = pa.Table.from_pylist(rows, arrow_schema(spec.schema))
    write_deltalake(root / spec.name, table, configuration=spec.properties, **how)


def commit(root: Path, *rows: Row) -> None:
    made = [r.state() | {"items": r.entries(), "writer": r.writer, "batch_id": r.batch} for r in rows]
    write(root, REFRESHES, made, mode="append")


def merged(root: Path, rows: Iterable[Row], buckets: int = 1) -> None:
    """`recommendations` as it is once these commits are merged."""
    made = [entry | {"bucket": bucket_of(row.user, buckets)} for row in newest(rows).values() for entry in row.listed()]
    random.Random(1).shuffle(made)
    partition = {} if buckets == 1 else {"partition_by": ["bucket"]}
    write(root, RECOMMENDATIONS, made, mode="overwrite", schema_mode="overwrite", **partition)


def newest(rows: Iterable[Row]) -> dict[str, Row]:
    found: dict[str, Row] = {}
    for row in rows:
        if row.user not in found or found[row.user].revision < row.revision:
            found[row.user] = row
    return found


def expected(rows: Iterable[Row]) -> list[dict[str, Any]]:
    listed = [entry for row in newest(rows).values() for entry in row.listed()]
    in_order = sorted(listed, key=lambda entry: (entry["user_id"], entry["rank"]))
    return [{name: entry[name] for name in COLUMNS} for entry in in_order]


def read(root: Path, user: str | None = None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = recommendations(root, user).to_pylist()
    return rows


def of(rows: list[dict[str, Any]], user: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["user_id"] == user]


# Committed and merged, over two models; then committed, with what is special about it.
BEFORE = [
    Row("shorter", 1, ("a", "b", "c")),
    Row("emptied", 1, ("a", "b")),
    Row("empty", 1, ("a", "b"), AT - 2 * MINUTE, writer="night"),
    Row("empty", 2, (), AT - MINUTE),
    Row("o'brien", 7, ("d", "e")),
    Row("late", 5, ("d", "e", "f")),
    Row("taken over", 3, ("x", "y"), AT, "m2"),
    Row("same", 4, ("g",), AT - 61 * MINUTE, "m2"),
    Row("*", 1, ("a",)),
]
AFTER = [
    Row("shorter", 2, ("d",), AT + MINUTE, "m2", batch=1),
    Row("emptied", 2, (), AT + MINUTE, "m2", batch=1),
    Row("new", 1, ("a", "c"), AT + MINUTE, "m2", batch=1),
    Row("late", 4, ("old",), AT + MINUTE, writer="a late clock", batch=1),
    Row("same", 4, ("second",), AT + MINUTE, writer="another", batch=1),
    Row("o'brien", 8, ("f", "g"), AT + 2 * MINUTE, "m2", batch=2),
    Row("o'brien", 9, ("h", "i", "j"), AT + 3 * MINUTE, "m2", batch=3),
]
USERS = sorted({row.user for row in [*BEFORE, *AFTER]})


def installed(root: Path, buckets: int = 1) -> Path:
    for row in [*BEFORE, *AFTER]:
        commit(root, row)
    merged(root, BEFORE, buckets)
    return root


@pytest.fixture(scope="module", params=[1, 8], ids=["whole", "buckets"])
def root(request, tmp_path_factory) -> Path:
    return installed(tmp_path_factory.mktemp("reading") / "tables", request.param)


def test_what_is_committed_is_read_before_it_is_merged(root):
    found = read(root)
    assert found == expected([*BEFORE, *AFTER])
    lists = {user: [row["item_id"] for row in of(found, user)] for user in USERS}
    assert lists == {
        "*": ["a"],
        "emptied": [],
        "empty": [],
        "late": ["d", "e", "f"],
        "new": ["a", "c"],
        "o'brien": ["h", "i", "j"],
        "same": ["g"],
        "shorter": ["d"],
        "taken over": ["x", "y"],
    }


@pytest.mark.parametrize("user", [*USERS, "nobody"])
def test_one_user_is_read_as_everyone_is(root, user):
    assert read(root, user) == of(read(root), user)


def test_the_columns_are_those_of_the_table(root):
    schema = pa.schema([field for field in arrow_schema(RECOMMENDATIONS.schema) if field.name != "bucket"])
    for found in (recommendations(root), recommendations(root, "new"), recommendations(str(root), "nobody")):
        assert found.schema.equals(schema)


def test_nothing_changes_when_the_merge_is_done(tmp_path):
    installed(tmp_path)
    before = read(tmp_path)
    merged(tmp_path, [*BEFORE, *AFTER])
    assert read(tmp_path) == before


def test_of_two_commits_of_one_revision_the_first_counts(tmp_path):
    commit(tmp_path, Row("u", 1, ("a",)))
    merged(tmp_path, [Row("u", 1, ("a",))])
    commit(tmp_path, Row("u", 2, ("second",), AT + 2 * MINUTE, batch=2))
    commit(tmp_path, Row("u", 2, ("first",), AT + MINUTE, batch=1))
    assert [row["item_id"] for row in read(tmp_path)] == ["first"]
    merged(tmp_path, [Row("u", 2, ("first",), AT + MINUTE, batch=1)])
    assert [row["item_id"] for row in read(tmp_path)] == ["first"]


@pytest.mark.parametrize("writers", [("night", "stream"), ("stream", "night")])
def test_of_two_commits_of_one_moment_one_is_merged(tmp_path, writers):
    rows = [Row("u", revision, (writer,), writer=writer) for revision, writer in enumerate(writers)]
    commit(tmp_path, rows[0])
    merged(tmp_path, rows[:1])
    commit(tmp_path, rows[1])
    assert read(tmp_path, "u") == expected(rows)


@pytest.mark.parametrize("buckets", [1, 8])
def test_nothing_is_merged_yet(tmp_path, buckets):
    commit(tmp_path, *BEFORE)
    merged(tmp_path, [], buckets)
    assert read(tmp_path) == expected(BEFORE)
    assert read(tmp_path, "shorter") == of(expected(BEFORE), "shorter")


# Clocks that differ, and lists that are empty: a merged empty list leaves nothing that could tell its revision.
@pytest.mark.parametrize(("skew", "shortest"), [(timedelta(minutes=50), 1), (timedelta(0), 0)])
@pytest.mark.parametrize("seed", range(3))
def test_however_far_the_merges_are(tmp_path, seed, skew, shortest):
    rng = random.Random(seed)
    done: list[list[Row]] = []
    truth: dict[str, Row] = {}
    now, until, numbers = AT, 0, {"stream": 0, "night": 0}
    for _ in range(10):
        now += rng.choice([timedelta(seconds=1), 10 * MINUTE, 90 * MINUTE])
        writer = rng.choice(sorted(numbers))
        numbers[writer] += 1
        at = now + (skew if writer == "night" else timedelta(0))
        rows = [
            Row(
                user,
                truth[user].revision + 1 if user in truth else 1,
                tuple(rng.sample("abcdef", rng.randint(shortest, 3))),
                at,
                f"m{numbers['night']}",
                writer,
                numbers[writer],
            )
            for user in rng.sample("rstuv", rng.randint(1, 3))
        ]
        commit(tmp_path, *rows)
        done.append(rows)
        truth |= {row.user: row for row in rows}
        if until == 0 or rng.random() < 0.4:
            until = rng.randint(max(until, 1), len(done))
            merged(tmp_path, [row for each in done[:until] for row in each], rng.choice([1, 4]))
        wanted = expected(truth.values())
        assert read(tmp_path) == wanted
        for user in rng.sample("rstuv", 2):
            assert read(tmp_path, user) == of(wanted, user)


def test_a_merge_that_ends_between_the_two_snapshots_hides_nothing(tmp_path, monkeypatch):
    installed(tmp_path)
    opened, table = [], reading._table

    def merging(root, name):
        opened.append(name)
        if len(opened) == 2:
            merged(tmp_path, [*BEFORE, *AFTER, Row("new", 2, ("z",), AT + 9 * MINUTE, batch=9)])
            DeltaTable(tmp_path / "refreshes").delete()
        return table(root, name)

    monkeypatch.setattr(reading, "_table", merging)
    assert read(tmp_path) == expected([*BEFORE, *AFTER, Row("new", 2, ("z",), AT + 9 * MINUTE, batch=9)])


def test_one_user_needs_no_file_of_other_users_and_of_what_is_merged(tmp_path):
    commit(tmp_path, Row("taken over", 1, ("p",), AT - 61 * MINUTE, writer="night"))
    commit(tmp_path, Row("taken over", 2, ("q",), AT - MINUTE, batch=-1))
    installed(tmp_path, 8)
    own = f"bucket={bucket_of('taken over', 8)}"
    needless = [path for path in (tmp_path / "recommendations").glob("*/*.parquet") if path.parent.name != own]
    assert len(needless) > 2
    for action in pa.table(DeltaTable(tmp_path / "refreshes").get_add_actions(flatten=True)).to_pylist():
        is_old = action["max.refreshed_at"] == AT - 61 * MINUTE
        if is_old or (action["max.writer"] == "stream" and action["max.batch_id"] <= 0):
            needless.append(tmp_path / "refreshes" / action["path"])
    for path in needless:
        path.unlink()
    assert [row["item_id"] for row in read(tmp_path, "taken over")] == ["x", "y"]


@pytest.mark.parametrize("spec", [REFRESHES, RECOMMENDATIONS], ids=lambda spec: spec.name)
@pytest.mark.parametrize("place", ["as a path", "as text"])
def test_a_missing_table_is_named_with_the_remedy(tmp_path, spec, place):
    other = RECOMMENDATIONS if spec is REFRESHES else REFRESHES
    write(tmp_path, other, [])
    root = tmp_path if place == "as a path" else f"{tmp_path}/"
    with pytest.raises(TableError, match=f"table {spec.name} is missing at {tmp_path}/{spec.name}; run the nightly"):
        recommendations(root)


def test_it_needs_no_spark(root):
    code = (
        "import sys; from nightstream.reading import recommendations as r; print(r(sys.argv[1], 'new').num_rows);"
        "print({name.partition('.')[0] for name in sys.modules} & {'pyspark', 'py4j', 'delta'})"
    )
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", code, str(root)], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths}
    )
    assert done.stdout.split("\n")[:2] == ["2", "set()"], done.stderr


def test_it_trusts_the_clocks_as_far_as_the_commits_do():
    assert reading.CLOCK_SKEW == commits.CLOCK_SKEW


def blocks(language: str) -> list[str]:
    section = PAGE.read_text(encoding="utf-8").partition("\n## Read the freshest lists\n")[2].partition("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


def in_duckdb(sql: str, root: Path) -> list[dict[str, Any]]:
    with duckdb.connect() as connection:
        connection.execute("SET extension_directory = ?", [f"{next(iter(duckdb_ext.__path__))}/extensions"])
        connection.execute("SET TimeZone = 'UTC'")
        rows = connection.sql(sql.replace("out/tables", str(root))).to_arrow_table().select(COLUMNS)
    return rows.sort_by([("user_id", "ascending"), ("rank", "ascending")]).to_pylist()


def test_the_documented_query_of_duckdb_gives_the_same(root):
    (sql,) = blocks("sql")
    assert in_duckdb(sql, root) == expected([*BEFORE, *AFTER])
    assert sql.count("-- ") == sql.count("'196'") == 2
    for user in ("o'brien", "new", "emptied"):
        one = sql.replace("-- ", "").replace("'196'", "'" + user.replace("'", "''") + "'")
        assert in_duckdb(one, root) == of(expected([*BEFORE, *AFTER]), user)


def test_the_documented_query_of_duckdb_reads_what_is_not_merged_at_all(tmp_path):
    commit(tmp_path, *BEFORE)
    merged(tmp_path, [])
    (sql,) = blocks("sql")
    assert in_duckdb(sql, tmp_path) == expected(BEFORE)


def test_the_documented_python_runs(tmp_path, monkeypatch):
    rows = [Row("196", 2, ("a", "b"))]
    commit(tmp_path / "out" / "tables", *rows)
    merged(tmp_path / "out" / "tables", [])
    monkeypatch.chdir(tmp_path)
    given: list[pa.Table] = []
    polars = type(sys)("polars")
    polars.from_arrow = given.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "polars", polars)
    names: dict[str, Any] = {}
    for block in blocks("python"):
        exec(compile(block, str(PAGE), "exec", dont_inherit=True), names)
    assert names["one"].to_pylist() == names["everyone"].to_pylist() == expected(rows)
    assert given == [names["everyone"]]


def from_spark(frame) -> list[dict[str, Any]]:
    """As the function gives them."""
    rows = frame.toArrow()
    assert rows.column_names == COLUMNS
    kinds = [field.with_nullable(True) for field in arrow_schema(RECOMMENDATIONS.schema) if field.name != "bucket"]
    return rows.cast(pa.schema(kinds)).sort_by([("user_id", "ascending"), ("rank", "ascending")]).to_pylist()


def test_the_query_for_catalogs_gives_the_same(storage, spark, settings):
    root = Path(settings.storage.root)
    installed(root, 8)
    frame = spark.sql(recommendations_now.query(storage))
    assert from_spark(frame) == expected([*BEFORE, *AFTER])
    assert from_spark(frame.where("user_id = 'new'")) == of(expected(AFTER), "new")


def refreshed(spark, *rows: Row):
    made = [row.state() | {"items": row.entries(), "overflow": []} for row in rows]
    return commits.settled_table(spark, pa.Table.from_pylist(made, arrow_schema(REFRESHED)))


def test_a_catalog_has_it_as_a_view_and_the_merge_changes_nothing(spark, settings, monkeypatch, caplog):
    document = settings.model_dump(mode="json")
    document["storage"] |= {"kind": "catalog", "root": "now_catalog"}
    named = validate(document)
    recommendations_now.make_view(Storage(spark, settings.storage), settings)
    assert not Path(settings.storage.root).exists()
    spark.sql("CREATE DATABASE now_catalog")
    try:
        storage = Storage(spark, named.storage)
        with monkeypatch.context() as patched:
            patched.setattr(recommendations_now, "query", lambda storage: "SELECT nonsense")
            recommendations_now.make_view(storage, named)
        assert "the view recommendations_now could not be made" in caplog.text
        recommendations_now.make_view(storage, named)
        view = "SELECT * FROM now_catalog.recommendations_now"
        old, new = [Row("u", 1, ("a", "b")), Row("v", 1, ("c",))], [Row("u", 2, ("d",)), Row("w", 1, ("e", "f"))]
        committed = commits.commit(storage, refreshed(spark, *old), "stream", 0, AT)
        assert from_spark(spark.sql(view)) == expected(old)
        commits.merge(storage, committed, Layout(2), 1)
        committed = commits.commit(storage, refreshed(spark, *new), "stream", 0, AT)
        before = from_spark(spark.sql(view))
        assert before == expected([*old, *new])
        commits.merge(storage, committed, Layout(2), 1)
        assert from_spark(spark.sql(view)) == before
        table = storage.read(RECOMMENDATIONS).drop("bucket").orderBy("user_id", "rank")
        assert from_spark(table) == before
    finally:
        spark.sql("DROP DATABASE now_catalog CASCADE")
