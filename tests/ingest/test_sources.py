from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path

import pytest
from chispa.dataframe_comparer import assert_df_equality
from nightstream.errors import SourceError
from nightstream.ingest import dimensions, formats, parse, sources
from nightstream.runtime.settings import EventSource, ItemSource, UserSource, load
from nightstream.store.tables import ITEMS, USERS
from pyspark.sql import functions as F

CONF = Path(__file__).parents[2] / "conf"
MODIFIED = 1_750_000_000
COLUMNS = {"user_id": "user", "item_id": "item", "event_time": "at"}


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    os.utime(path, (MODIFIED, MODIFIED))
    return str(path)


def events(spark, kind, path, columns=COLUMNS):
    return sources.read_events(spark, EventSource(format=kind, path=path, columns=columns, time_unit="auto"))


def test_json_lines_stay_as_they_are_with_file_and_its_time(spark, tmp_path):
    lines = ['{"user": 1,  "item":"ä"}', "not json", '{"torn":']
    path = write(tmp_path / "a.jsonl", "\n\n".join(lines) + "\n  \n")
    rows = events(spark, "jsonl", path).withColumn("arrival_time", F.unix_seconds("arrival_time")).collect()
    assert [r.payload for r in rows] == lines
    assert {(r.source, r.position, r.arrival_time) for r in rows} == {(f"jsonl:{path}", f"file:{path}", MODIFIED)}


def test_csv_cells_stay_text_and_broken_rows_stay_lines(spark, tmp_path):
    path = write(tmp_path / "a.csv", 'user,item,at\n007,"a ""b"", c",1.50\n1,2\n1,2,3,4\n8,,9\n')
    rows = [r.payload for r in events(spark, "csv", path).collect()]
    assert [json.loads(rows[n]) for n in (0, 3)] == [
        {"user": "007", "item": 'a "b", c', "at": "1.50"},
        {"user": "8", "at": "9"},
    ]
    assert rows[1:3] == ["1,2", "1,2,3,4"]


def test_recbole_headers_lose_their_types_and_quotes_mean_nothing(spark, tmp_path):
    path = write(tmp_path / "x.inter", 'user:token\titem:token\tat:float\n1\t"2\t3.0\n')
    (row,) = events(spark, "recbole", path).collect()
    assert json.loads(row.payload) == {"user": "1", "item": '"2', "at": "3.0"}


def test_parquet_and_delta_keep_microseconds(spark, tmp_path):
    moment = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
    frame = spark.createDataFrame([("u", 7, moment, None)], "user string, item long, at timestamp, value double")
    for kind in ("parquet", "delta"):
        path = str(tmp_path / kind)
        frame.write.format(kind).save(path)
        (row,) = events(spark, kind, path).collect()
        assert json.loads(row.payload) == {"user": "u", "item": 7, "at": "2026-01-02T03:04:05.678901Z"}
        assert row.arrival_time is not None
        assert row.position == path if kind == "delta" else row.position.endswith(".parquet")


def test_an_id_is_the_same_whatever_type_carries_it(spark, tmp_path):
    kinds = ("string", "binary", "byte", "short", "int", "long", "float", "double", "decimal(12,2)", "decimal(5,0)")
    columns = [F.lit("107").cast(kind).alias(f"as {kind}") for kind in kinds]
    columns += [F.lit("107.5").cast("double").alias("loses"), F.unhex(F.lit("FF00")).alias("no text")]
    path = str(tmp_path / "ids")
    spark.range(1).select(*columns, F.lit(1_700_000_000).alias("at")).write.parquet(path)
    opened = formats.open_batch(spark, "parquet", path)
    names = formats.own_columns(opened)[:-1]
    payloads = events(spark, "parquet", path, {"user_id": "as string", "item_id": "as string", "event_time": "at"})
    rules = load([CONF / "base.yaml"]).events
    told = {}
    for name in names:
        mapped = {"user_id": name, "item_id": "as string", "event_time": "at"}
        (row,) = parse.parse(payloads, mapped, "auto", rules, "*").select("user_id", "reason", "field").collect()
        told[name] = row.user_id or (row.reason, row.field)
    (described,) = opened.select(*(dimensions._identity(opened, n, "parquet").alias(n) for n in names)).collect()
    assert told == {**{f"as {kind}": "107" for kind in kinds}, "loses": ("unreadable", "user_id"), "no text": "/wA="}
    assert described.asDict() == {**told, "loses": None}


def test_ids_of_json_items_are_those_of_json_events(spark, tmp_path):
    lines = ['{"item_id": 107.0}', '{"item_id": "108.0"}', '{"item_id": 109.5}', '{"item_id": 110}']
    found = dimensions.items(spark, ItemSource(path=write(tmp_path / "i.jsonl", "\n".join(lines))), 20)
    assert {r.item_id for r in found.rows.collect()} == {"107", "108.0", "110"}


def test_bad_sources_are_named(spark, tmp_path):
    table = write(tmp_path / "a.csv", "user,item,when\n1,2,3\n")
    with pytest.raises(SourceError, match=r"a\.csv lacks the column\(s\) at \(present: user, item, when\)"):
        events(spark, "csv", table)
    for kind in ("jsonl", "csv", "parquet", "delta", "recbole"):
        with pytest.raises(SourceError, match=f"the source {tmp_path}/none does not exist"):
            events(spark, kind, f"{tmp_path}/none")
    with pytest.raises(SourceError, match="holds no rows"):
        events(spark, "csv", write(tmp_path / "b.csv", "user,item,at\n"))
    with pytest.raises(SourceError, match="holds no rows"):
        events(spark, "jsonl", write(tmp_path / "c.jsonl", "\n \n"))
    with pytest.raises(SourceError, match="cannot be read as parquet"):
        events(spark, "parquet", write(tmp_path / "d.parquet", "no parquet"))


def stream(spark, settings, tmp_path, **values):
    """Run the stream over what is there; the payload rows of each micro-batch."""
    batches = []
    frame = sources.stream_events(spark, settings.stream.model_copy(update=values))

    def keep(rows, _):
        batches.append(rows.collect())

    writer = frame.writeStream.foreachBatch(keep).option("checkpointLocation", str(tmp_path / "checkpoint"))
    assert writer.trigger(availableNow=True).start().awaitTermination(60)
    return batches


def test_streaming_a_folder_reads_what_batch_reads_in_limited_batches(spark, settings, tmp_path):
    folder = tmp_path / "in"
    sources.stream_events(spark, settings.stream.model_copy(update={"path": str(folder)}))
    assert folder.is_dir()
    for n in range(3):
        write(folder / f"{n}.jsonl", f'{{"n":{n}}}\n\n')
    os.utime(folder / "1.jsonl", (0, 0))
    batches = stream(spark, settings, tmp_path, path=str(folder), max_per_trigger=2)
    assert [len(b) for b in batches] == [2, 1]
    assert sorted(r for b in batches for r in b) == sorted(events(spark, "jsonl", str(folder)).collect())


def test_streaming_a_delta_table_knows_files_and_their_times(spark, settings, tmp_path):
    path = str(tmp_path / "table")
    spark.createDataFrame([("u", 7)], "user string, item long").write.format("delta").save(path)
    ((row,),) = stream(spark, settings, tmp_path, format="delta", path=path)
    assert json.loads(row.payload) == {"user": "u", "item": 7}
    assert row.position.startswith(f"file:{path}/part-")
    with pytest.raises(SourceError, match=r"does not exist; check stream\.path"):
        sources.stream_events(
            spark, settings.stream.model_copy(update={"format": "delta", "path": str(tmp_path / "none")})
        )


def restated(spark, rows, spec):
    """In order and with the table's nullability, which chispa cannot overlook inside a map."""
    assert [f.dataType.simpleString() for f in rows.schema] == [f.dataType.simpleString() for f in spec.schema]
    return spark.createDataFrame(rows.orderBy(*spec.keys).collect(), spec.schema)


def test_items_of_a_csv(spark, tmp_path):
    path = write(
        tmp_path / "items.csv",
        "id,name,about,tags,brand,price,stock\n"
        "1,  Toy   Story ,A  toy,a| b||a,x,1.5,yes\n"
        "2,,,,,nan,0\n"
        "3,T,1e400,q,,1e400,\n"
        "4,,,,,,0.0\n"
        "5,,,,,,1.0\n"
        "6,,,,,,-3\n"
        "7,,,,,,NaN\n"
        "8,,,,,, FALSE \n"
        " 1 ,Z newer,,,,,\n"
        ",none,,,,1,1\n"
        "444444,too long,,,,1,1\n",
    )
    source = ItemSource(
        path=path,
        format="csv",
        id="id",
        title="name",
        text=("name", "about"),
        categories={"tags": "|", "brand": None},
        numbers=("price",),
        available="stock",
    )
    found = dimensions.items(spark, source, 5)
    expected = [
        ("1", "Toy Story", "Toy Story A toy", {"tags": ["a", "b"], "brand": ["x"]}, {"price": 1.5}, True),
        ("2", None, None, {}, {}, False),
        ("3", "T", "T 1e400", {"tags": ["q"]}, {}, True),
        *((number, None, None, {}, {}, number in "57") for number in "45678"),
    ]
    assert_df_equality(restated(spark, found.rows, ITEMS), spark.createDataFrame(expected, ITEMS.schema))
    assert found.left_out == {"without a usable id": 2, "repeated": 1}


def test_users_of_json_lines_with_lists(spark, tmp_path):
    lines = [{"user_id": 1, "likes": ["a", "b"], "age": "30"}, {"user_id": "*", "age": 1}, {"likes": "c"}]
    path = write(tmp_path / "users.jsonl", "\n".join([*map(json.dumps, lines), "broken"]))
    source = UserSource(path=path, categories={"likes": None}, numbers=("age",))
    found = dimensions.users(spark, source, 5, "*")
    expected = spark.createDataFrame([("1", {"likes": ["a", "b"]}, {"age": 30.0})], USERS.schema)
    assert_df_equality(restated(spark, found.rows, USERS), expected)
    assert found.left_out["without a usable id"] == 3


def test_any_recbole_data_set_by_three_settings(spark, tmp_path):
    inter = write(tmp_path / "x.inter", "user_id:token\titem_id:token\ttimestamp:float\n1\t2\t3.0\n")
    item = write(
        tmp_path / "x.item",
        "item_id:token\tname:token_seq\tkind:token\tgenre:token_seq\tprice:float\timdb_url:token\n"
        "2\tA b\tk\tg h\t5\thttp\n",
    )
    settings = load([CONF / "recbole.yaml"], [f"sources.events.path={inter}", f"sources.items.path={item}"])
    assert sources.read_events(spark, settings.sources.events).count() == 1
    (row,) = sources.read_items(spark, settings).collect()
    assert (row.title, row.text, row.categories, row.numbers) == ("A b", "A b g h", {"kind": ["k"]}, {"price": 5.0})
    assert sources.read_users(spark, settings).schema == USERS.schema
    assert formats.recbole_siblings(inter) == {"items": item}
    with pytest.raises(SourceError, match=r"the header\(s\) id lack a RecBole type"):
        formats.recbole_types(spark, write(tmp_path / "y.item", "id\tname:token\n1\tx\n"))
