"""The two engines that write: the same calls give the same tables, each reads what the other wrote."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from chispa import assert_df_equality
from deltalake import DeltaTable, write_deltalake
from nightstream.errors import SettingsError, TableError
from nightstream.runtime.settings import load
from nightstream.store import buckets, delta_rs
from nightstream.store import storage as storage_module
from nightstream.store.materialize import Cut
from nightstream.store.merge import Replacement
from nightstream.store.storage import Storage
from nightstream.store.tables import (
    EVENTS,
    METRICS,
    RECOMMENDATIONS,
    REFRESHES,
    USER_VECTORS,
    TableSpec,
    arrow_schema,
)

AT = datetime(2024, 5, 1, 12, 0, 0, 123456, tzinfo=UTC)
BASE = Path(__file__).parents[2] / "conf" / "base.yaml"
ENGINES = ("spark", "delta-rs")
STATES, LISTS = Replacement(("user_id",)), Replacement(("user_id", "rank"), absent="item_id")


def rows(spark, spec: TableSpec, *values: dict) -> Cut:
    """Rows on the driver; columns that are not given are null."""
    kinds = arrow_schema(spec.schema)
    columns = [pa.array([value.get(field.name) for value in values], field.type) for field in kinds]
    return Cut.of(spark, pa.table(columns, kinds), spec.schema)


def ranked(spark, user: str, revision: int, *items: str | None) -> Cut:
    entries = [
        {"user_id": user, "rank": n + 1, "item_id": item, "revision": revision, "score": n / 3, "refreshed_at": AT}
        for n, item in enumerate(items)
    ]
    return rows(spark, RECOMMENDATIONS, *entries)


def refreshed(spark, user: str, revision: int) -> Cut:
    event = dict.fromkeys(("event_id", "content_hash", "item_id", "event_type"), user) | {
        "event_time": AT,
        "value": 0.1,
    }
    entry = {"rank": 1, "item_id": "i", "score": 0.5, "strategy": "s", "reason": "ü'\\", "because_item_id": None}
    state = {"user_id": user, "revision": revision, "window": [event], "seen": [], "vector": [0.1, 0.2]}
    return rows(spark, REFRESHES, state | {"items": [entry], "refreshed_at": AT, "batch_id": revision})


@pytest.fixture
def storages(spark, settings, tmp_path) -> dict[str, Storage]:
    """By engine, each with tables of its own."""
    made = {}
    for engine in ENGINES:
        changes = {"engine": engine, "root": str(tmp_path / engine)}
        made[engine] = Storage(spark, settings.storage.model_copy(update=changes))
    return made


def writers(storage: Storage, spec: TableSpec) -> set[str]:
    """Which engines wrote the commits of a table."""
    infos = (entry.get("engineInfo", "") for entry in DeltaTable(storage.location(spec)).history())
    return {"delta-rs" if info.startswith("delta-rs") else "spark" for info in infos}


def test_the_same_calls_give_the_same_tables(storages, spark):
    for engine, storage in storages.items():
        storage.append(RECOMMENDATIONS, ranked(spark, "u", 1, "a", "b", "c"))
        storage.append(RECOMMENDATIONS, ranked(spark, "v", 3, "a"))
        for source in (
            ranked(spark, "u", 2, "d", None, "e", None),
            ranked(spark, "v", 2, "too old"),
            ranked(spark, "w", 1, "new", None),
            ranked(spark, "u", 2, "d", None, "e", None),
        ):
            storage.replace(RECOMMENDATIONS, source, LISTS, None)
        storage.append(REFRESHES, refreshed(spark, "u", 1))
        storage.append_values(METRICS, [("name", 1.5, None, {"a": "b"}, AT), ("other", 2.5, "m", {}, AT)])
        assert writers(storage, RECOMMENDATIONS) == writers(storage, REFRESHES) == {engine}
    by_spark, by_delta_rs = (storages[engine] for engine in ENGINES)
    found = {(r.user_id, r.rank, r.item_id, r.revision) for r in by_delta_rs.read(RECOMMENDATIONS).collect()}
    of_u = {("u", 1, "d", 2), ("u", 3, "e", 2)}
    assert found == of_u | {("v", 1, "a", 3), ("w", 1, "new", 1)}
    for spec in (RECOMMENDATIONS, REFRESHES):
        assert_df_equality(by_spark.read(spec), by_delta_rs.read(spec), ignore_row_order=True)
    # Maps have no order, and chispa sorts.
    labels = [storage.read(METRICS).select("name", "value", "labels", "at") for storage in storages.values()]
    assert sorted(map(str, labels[0].collect())) == sorted(map(str, labels[1].collect()))


def bucketed(spark, spec: TableSpec, made: Cut) -> Cut:
    table = made.table
    numbers = pa.array([buckets.bucket_of(user, 4) for user in table["user_id"].to_pylist()], pa.int32())
    place = table.schema.get_field_index("bucket")
    return Cut.of(spark, table.set_column(place, "bucket", numbers), spec.schema)


def state(spark, user: str, revision: int) -> Cut:
    event = {"event_id": user, "content_hash": "c", "item_id": f"i{revision}", "event_type": "view", "event_time": AT}
    values = {"user_id": user, "revision": revision, "window": [event], "seen": [], "vector": [0.1, revision]}
    return rows(spark, USER_VECTORS, values | {"seen_overflowed": False, "refreshed_at": AT})


def together(spark, spec: TableSpec, *parts: Cut) -> Cut:
    return bucketed(spark, spec, Cut.of(spark, pa.concat_tables([part.table for part in parts]), spec.schema))


@pytest.mark.parametrize("at_a_time", [1, 512])
def test_newer_rows_replace_those_of_their_users_in_buckets_alike(storages, spark, monkeypatch, at_a_time):
    monkeypatch.setattr(delta_rs, "_BUCKETS_AT_A_TIME", at_a_time)
    users = [f"u{number}" for number in range(12)]
    for storage in storages.values():
        before = together(spark, RECOMMENDATIONS, *(ranked(spark, user, 2, "a", "b", "c") for user in users))
        buckets.lay_out(storage, RECOMMENDATIONS, before.rows, 4)
        before = together(spark, USER_VECTORS, *(state(spark, user, 2) for user in users))
        buckets.lay_out(storage, USER_VECTORS, before.rows, 4)
        lists = together(
            spark,
            RECOMMENDATIONS,
            ranked(spark, "u1", 3, "d", None, None),
            ranked(spark, "u2", 2, "same", "same", "same"),
            ranked(spark, "u3", 1, "too", "old", "now"),
            ranked(spark, "new", 1, "e", None, None),
        )
        states = together(spark, USER_VECTORS, *(state(spark, u, r) for u, r in (("u1", 3), ("u3", 1), ("new", 1))))
        for made, spec, how in ((lists, RECOMMENDATIONS, LISTS), (states, USER_VECTORS, STATES)):
            touched = buckets.touched(4, made.table["user_id"])
            assert 0 < len(touched) < 4
            others = {uri for uri in DeltaTable(storage.location(spec)).file_uris() if not in_any(uri, touched)}
            for _ in range(2):
                storage.replace(spec, made, how, touched)
            assert others <= set(DeltaTable(storage.location(spec)).file_uris())
    by_spark, by_delta_rs = (storages[engine] for engine in ENGINES)
    assert writers(by_delta_rs, USER_VECTORS) == {"spark", "delta-rs"}
    for spec in (RECOMMENDATIONS, USER_VECTORS):
        assert_df_equality(by_spark.read(spec), by_delta_rs.read(spec), ignore_row_order=True)
    found = {(r.user_id, r.revision, r.window[0].item_id) for r in by_delta_rs.read(USER_VECTORS).collect()}
    assert found == {(user, 2, "i2") for user in users if user != "u1"} | {("u1", 3, "i3"), ("new", 1, "i1")}
    of_some = by_delta_rs.read(RECOMMENDATIONS).where("user_id IN ('u1', 'u2', 'u3', 'new')").collect()
    kept = {(user, n + 1, item, 2) for user in ("u2", "u3") for n, item in enumerate("abc")}
    assert {(r.user_id, r.rank, r.item_id, r.revision) for r in of_some} == kept | {
        ("u1", 1, "d", 3),
        ("new", 1, "e", 1),
    }


@pytest.mark.parametrize("count", [1, 4])
def test_readers_of_arrow_can_filter_what_replaces(storages, spark, count):
    storage = storages["delta-rs"]
    before = together(spark, RECOMMENDATIONS, *(ranked(spark, user, 1, "a", "b") for user in "uvw"))
    buckets.lay_out(storage, RECOMMENDATIONS, before.rows, count)
    new = together(spark, RECOMMENDATIONS, *(ranked(spark, user, 2, "c", "d") for user in "uv"))
    storage.replace(RECOMMENDATIONS, new, LISTS, buckets.touched(count, new.table["user_id"]))
    lists = DeltaTable(storage.location(RECOMMENDATIONS)).to_pyarrow_dataset()
    assert lists.to_table(filter=pc.field("user_id") == "u")["item_id"].to_pylist() == ["c", "d"]
    assert duckdb.sql("SELECT item_id FROM lists WHERE user_id = 'w' ORDER BY rank").fetchall() == [("a",), ("b",)]


def test_a_large_table_without_buckets_is_merged(storages, spark, monkeypatch):
    monkeypatch.setattr(delta_rs, "_LARGEST_WHOLE", 0)
    for storage in storages.values():
        storage.replace(RECOMMENDATIONS, ranked(spark, "u", 1, "a", "b"), LISTS, None)
        storage.replace(RECOMMENDATIONS, ranked(spark, "u", 2, "c", None), LISTS, None)
        storage.replace(RECOMMENDATIONS, ranked(spark, "u", 1, "old"), LISTS, None)
    by_spark, by_delta_rs = (storages[engine].read(RECOMMENDATIONS) for engine in ENGINES)
    assert_df_equality(by_spark, by_delta_rs, ignore_row_order=True)
    assert [r.item_id for r in by_delta_rs.collect()] == ["c"]


@pytest.mark.parametrize("other", ["compaction", "another's rows"])
def test_rows_that_come_while_buckets_are_written_anew_are_not_lost(storages, spark, monkeypatch, other):
    storage = storages["delta-rs"]
    buckets.lay_out(storage, USER_VECTORS, together(spark, USER_VECTORS, state(spark, "u", 1)).rows, 4)
    path = storage.location(USER_VECTORS)
    for user in ("v", "w"):
        made = together(spark, USER_VECTORS, state(spark, user, 1))
        write_deltalake(path, made.table, mode="append")
    applied, calls = Replacement.applied, []

    def meanwhile(self, held, new):
        calls.append(held.num_rows)
        if len(calls) == 1:
            if other == "compaction":
                DeltaTable(path).optimize.compact()
            else:
                for user in ("x", "y", "z"):
                    write_deltalake(path, together(spark, USER_VECTORS, state(spark, user, 1)).table, mode="append")
        return applied(self, held, new)

    monkeypatch.setattr(Replacement, "applied", meanwhile)
    newer = together(spark, USER_VECTORS, *(state(spark, user, 2) for user in "uvw"))
    touched = buckets.touched(4, newer.table["user_id"])
    storage.with_retries(lambda: storage.replace(USER_VECTORS, newer, STATES, touched), 3, "user_vectors")
    found = sorted((r.user_id, r.revision) for r in storage.read(USER_VECTORS).collect())
    added = [] if other == "compaction" else [("x", 1), ("y", 1), ("z", 1)]
    assert found == [("u", 2), ("v", 2), ("w", 2), *added]


def in_any(uri: str, numbers: list[int]) -> bool:
    return any(f"/bucket={number}/" in uri for number in numbers)


def test_the_tables_are_described_the_same(storages, spark):
    described = []
    for storage in storages.values():
        storage.append(EVENTS, rows(spark, EVENTS, {"event_id": "secret id", "event_time": AT, "value": 1.5}))
        table = DeltaTable(storage.location(EVENTS))
        (added,) = table.get_add_actions(flatten=False).to_struct_array().to_pylist()
        assert "secret id" not in str(added)
        assert added["min"]["value"] == 1.5
        protocol = table.protocol()
        described.append(
            (
                table.metadata().configuration,
                table.metadata().description,
                table.schema().to_json(),
                (protocol.min_reader_version, protocol.min_writer_version, protocol.reader_features),
                set(added["min"]),
            )
        )
    assert described[0] == described[1]


@dataclass(frozen=True)
class OftenCheckpointed(TableSpec):
    @property
    def properties(self) -> dict[str, str]:
        return super().properties | {"delta.checkpointInterval": "3"}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_checkpoint_comes_at_the_interval_and_the_other_engine_goes_on_from_it(storages, spark, engine):
    spec = OftenCheckpointed("metrics", "test", METRICS.schema, METRICS.keys)
    storage = storages[engine]
    for number in range(4):
        storage.append_values(spec, [("name", float(number), None, {}, AT)])
    (other,) = set(ENGINES) - {engine}
    beside = Storage(spark, storage.settings.model_copy(update={"engine": other}))
    for number in range(4, 8):
        beside.append_values(spec, [("name", float(number), None, {}, AT)])
    storage.append_values(spec, [("name", 8.0, None, {}, AT)])
    assert writers(storage, spec) == {"spark", "delta-rs"}
    log = [path.name for path in (Path(storage.settings.root) / spec.name / "_delta_log").glob("*.checkpoint.parquet")]
    # Spark counts the versions from nought, delta-rs the commits from one.
    expected = {"spark": [3, 5, 8, 9], "delta-rs": [2, 6]}
    assert [int(name[:20]) for name in sorted(log)] == expected[engine]
    for each in (storage, beside):
        assert sorted(r.value for r in each.read(spec).collect()) == [float(n) for n in range(9)]
        counted = each.query("SELECT count(*) AS rows FROM {metrics}", spec)
        assert counted["rows"].to_pylist() == [9]


def test_what_lies_on_executors_is_written_by_spark(storages, spark):
    storage = storages["delta-rs"]
    storage.append(METRICS, rows(spark, METRICS, {"name": "a"}).rows)
    assert writers(storage, METRICS) == {"spark", "delta-rs"}  # delta-rs made the table


def test_values_in_a_query_are_read_as_they_are(storages, spark, monkeypatch):
    texts = ["it's", "back\\slash", "{brace}", ":colon", 'quo"te', "ü", "plain"]
    storage = storages["delta-rs"]
    storage.append(EVENTS, rows(spark, EVENTS, *({"event_id": t, "arrival_time": AT} for t in texts)))
    sql = "SELECT event_id FROM {events} WHERE event_id IN (:ids) AND arrival_time BETWEEN :at AND :at"

    def found(ids: list[str], at: datetime = AT) -> list[str]:
        return sorted(storage.query(sql, EVENTS, ids=ids, at=at)["event_id"].to_pylist())

    for by_spark in (False, True):
        if by_spark:
            monkeypatch.setattr(storage, "local", None)
        assert found(texts) == sorted(texts)
        assert [found([text]) for text in texts] == [[text] for text in texts]
        assert found([]) == found(texts, AT.replace(microsecond=0)) == []


def test_few_rows_come_to_the_driver_and_more_do_not(storages, spark, monkeypatch):
    monkeypatch.setattr(storage_module, "LOCAL_ROWS", 2)
    for storage in storages.values():
        storage.create(EVENTS)
        assert storage.few_rows(EVENTS, "event_id = :id", id="a").num_rows == 0
        storage.append(EVENTS, rows(spark, EVENTS, *({"event_id": text} for text in "abc")))
        few = storage.few_rows(EVENTS, "event_id IN (:ids)", ids=["a", "b"])
        assert few.schema == arrow_schema(EVENTS.schema)
        assert sorted(few["event_id"].to_pylist()) == ["a", "b"]
        assert storage.few_rows(EVENTS, "event_id IN (:ids)", ids=["a", "b", "c"]) is None


def test_delta_rs_is_refused_where_it_cannot_write():
    with pytest.raises(SettingsError, match=r"storage.*delta-rs writes tables in a local folder alone"):
        load([BASE], ["storage.engine=delta-rs", "storage.kind=catalog", "storage.root=main.night"])
    with pytest.raises(SettingsError, match="delta-rs"):
        load([BASE], ["storage.engine=delta-rs", "storage.root=s3://bucket/tables"])


def test_a_table_of_another_version_is_refused_by_either(storages):
    for storage in storages.values():
        storage.create(EVENTS)
        log = Path(storage.settings.root) / "events" / "_delta_log" / f"{0:020}.json"
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        for line in lines:
            if "metaData" in line:
                line["metaData"]["schemaString"] = line["metaData"]["schemaString"].replace("retracts", "revokes")
        log.write_text("\n".join(map(json.dumps, lines)))
        # What vouches for the text of before.
        for name in (f".{log.name}.crc", f"{log.stem}.crc"):
            (log.parent / name).unlink(missing_ok=True)
        with pytest.raises(TableError, match=r"lacks the column\(s\) retracts"):
            storage.query("SELECT * FROM {events}", EVENTS)
