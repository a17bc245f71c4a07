"""What the local files say of users is what the tables say."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest
from nightstream.serving import state_cache
from nightstream.serving.commits import commit, settled_table
from nightstream.serving.state_cache import StateCache
from nightstream.store.materialize import Cut
from nightstream.store.row_store import RowStore
from nightstream.store.storage import Storage
from nightstream.store.tables import REFRESHED, REFRESHES, USER_VECTORS, USERS, arrow_schema
from pyspark.sql import functions as F

ROWS = pa.schema({"user_id": pa.string(), "revision": pa.int64(), "items": pa.list_(pa.string())})
SOME = pa.array(["u000", "u001", "idle-left", "nobody"])


def rows(*entries: tuple) -> pa.Table:
    return pa.table(list(zip(*entries, strict=True)), schema=ROWS)


def test_the_higher_revision_stays_whatever_the_order(tmp_path: Path) -> None:
    known = RowStore(tmp_path / "rows", ROWS)
    known.put(rows(("a", 2, ["x", "y"]), ("b", 1, [])))
    known.put(rows(("a", 1, ["old"]), ("b", 2, ["z"]), ("c", 1, None)))
    found = known.get(["c", "b", "a", "unknown"]).sort_by("user_id")
    assert found.equals(rows(("a", 2, ["x", "y"]), ("b", 2, ["z"]), ("c", 1, None)))


def test_more_users_than_one_statement_takes(tmp_path: Path) -> None:
    known = RowStore(tmp_path / "rows", ROWS)
    many = [(f"u{n:05}", 1, [str(n)]) for n in range(5_000)]
    known.put(rows(*many))
    assert known.get([name for name, *_ in many]).sort_by("user_id").equals(rows(*many))


def asked_and_known(storage: Storage, scratch: Path) -> tuple[StateCache, list[pa.Table]]:
    known = StateCache(storage, scratch)
    asked = known.of(SOME, [], 100)
    known.start().result()
    assert known._states.is_complete
    assert known._attributes.is_complete
    return known, [t.sort_by("user_id") for t in asked[:2]]


def test_files_and_tables_say_the_same(spark, night, tmp_path: Path) -> None:
    storage, _ = night("known")
    left = tmp_path / "scratch" / "by a process that was killed"
    left.mkdir(parents=True)
    known, asked = asked_and_known(storage, left.parent)
    assert not list(left.parent.glob("*"))
    states, described, older = known.of(SOME, [], 100)
    assert states.sort_by("user_id").equals(asked[0].combine_chunks())
    assert set(states["user_id"].to_pylist()) == {"u000", "u001", "idle-left"}
    assert described.sort_by("user_id").to_pylist() == asked[1].to_pylist()
    assert len(described) == 3
    assert older is None
    known.close()


def test_a_commit_counts_before_it_is_merged_and_changed_attributes_do(spark, night, tmp_path: Path) -> None:
    storage, _ = night("known")
    known, _ = asked_and_known(storage, tmp_path / "scratch")
    state = storage.read(USER_VECTORS).where("user_id = 'u000'")
    newer = state.withColumns(
        {"revision": F.col("revision") + 1, "items": F.array().cast(REFRESHES.schema["items"].dataType)}
    ).withColumn("overflow", F.col("seen").cast(REFRESHED["overflow"].dataType))
    table = newer.select(*REFRESHED.names).toArrow().cast(arrow_schema(REFRESHED))
    before = state.first().revision

    def revision() -> list[int]:
        states = known.of(SOME, [], 100)[0]
        return states.filter(pa.compute.equal(states["user_id"], "u000"))["revision"].to_pylist()

    committed = commit(storage, settled_table(spark, table), "test", 0, datetime.now(UTC))
    known.committed(committed)
    assert revision() == [before + 1]
    # As a commit of many users is: not on the driver.
    later = committed.rows.withColumn("revision", F.col("revision") + 1)
    known.committed(Cut(later, {}))
    assert revision() == [before + 2]

    changed = storage.read(USERS).where("user_id <> 'u000'")
    storage.overwrite(USERS, changed)
    known.look_again()
    known._pool.submit(lambda: None).result()
    assert set(known.of(SOME, [], 100)[1]["user_id"].to_pylist()) == {"u001", "idle-left"}
    known.close()


def test_a_driver_that_does_not_see_the_executors_files_asks_the_tables(
    spark, night, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, _ = night("known")
    monkeypatch.setattr(storage, "local", None)
    glob = Path.glob
    monkeypatch.setattr(Path, "glob", lambda self, name: iter(()) if name.startswith("part-") else glob(self, name))
    known = StateCache(storage, tmp_path / "scratch")
    known.start().result()
    assert not known._states.is_complete
    assert set(known.of(SOME, [], 100)[0]["user_id"].to_pylist()) == {"u000", "u001", "idle-left"}
    known.close()


def test_of_too_many_users_the_tables_are_asked(spark, night, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, _ = night("known")
    monkeypatch.setattr(state_cache, "MOST_USERS", 3)
    known = StateCache(storage, tmp_path / "scratch")
    known.start().result()
    assert not known._states.is_complete
    assert len(known.of(SOME, [], 100)[0]) == 3
    known.close()
