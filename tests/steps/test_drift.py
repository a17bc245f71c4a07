"""A source whose columns change while it is streamed: added ones are kept, removed and retyped ones are rejected."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest
import world
from nightstream.ingest.ledger import check
from nightstream.runtime.settings import validate
from nightstream.runtime.spark_errors import sentence_for
from nightstream.steps import serve
from nightstream.store.tables import EVENTS, QUARANTINE, RAW_EVENTS

COLUMNS = "event_id string, user_id string, item_id string, event_time long"


def event(number: int) -> dict:
    return {"event_id": f"d{number}", "user_id": "u000", "item_id": "i01", "event_time": world.START + 10**6 + number}


def streaming(settings, **values):
    document = settings.model_dump(mode="json")
    document["stream"] |= values
    return validate(document)


def since(storage, before: dict[str, int]) -> dict[str, int]:
    return {name: rows - before[name] for name, rows in check(storage).items()}


def rejected(storage) -> Counter:
    return Counter((r.reason, r.field) for r in storage.read(QUARANTINE).collect())


def payload_of(storage, text: str) -> dict:
    (row,) = storage.read(RAW_EVENTS).where(f"payload LIKE '%{text}%'").collect()
    return json.loads(row.payload)


@pytest.mark.slow
def test_keys_of_json_lines_come_go_and_change_their_type(spark, night):
    storage, settings = night("lines")
    before = check(storage)
    rows = [event(0), {**event(1), "extra": {"a": 1}}, {**event(2), "item_id": ...}, {**event(3), "event_time": [1]}]
    for number, row in enumerate(rows):
        kept = {k: v for k, v in row.items() if v is not ...}
        world.write_lines(Path(settings.stream.path) / f"{number}.jsonl", [kept])
    serve.run(spark, settings, until_idle=True)
    assert since(storage, before) == {"raw_events": 4, "events": 2, "quarantine": 2, "duplicates": 0}
    assert rejected(storage) == {("missing", "item_id"): 1, ("unreadable", "event_time"): 1}
    assert payload_of(storage, '"d1"')["extra"] == {"a": 1}


@pytest.mark.slow
def test_a_running_stream_takes_up_columns_that_a_delta_table_gains_and_loses(spark, night, tmp_path):
    storage, settings = night("table")
    before, table = check(storage), str(tmp_path / "source")

    def append(rows: list[dict], columns: str, **options: str) -> None:
        frame = spark.createDataFrame(rows, columns)
        frame.write.format("delta").options(**options).mode("append").save(table)

    append([event(0)], COLUMNS, **{"delta.columnMapping.mode": "name"})
    settings = streaming(settings, format="delta", path=table)
    changes = [
        lambda: append([{**event(1), "extra": "kept"}], f"{COLUMNS}, extra string", mergeSchema="true"),
        lambda: spark.sql(f"ALTER TABLE delta.`{table}` DROP COLUMN item_id"),
    ]
    finished = []

    def change(report) -> None:
        if report.events and changes:
            changes.pop(0)()
            if not changes:
                append([event(2)], "event_id string, user_id string, event_time long")
        finished.extend([True] * report.quarantined)

    deadline = time.monotonic() + 300
    serve.run(spark, settings, on_batch=change, stop=lambda: bool(finished) or time.monotonic() > deadline)
    assert since(storage, before) == {"raw_events": 3, "events": 2, "quarantine": 1, "duplicates": 0}
    assert rejected(storage) == {("missing", "item_id"): 1}
    assert payload_of(storage, '"d1"')["extra"] == "kept"


@pytest.mark.faults
def test_a_column_that_a_delta_table_drops_and_adds_again_with_another_type_is_validated_like_any_other(
    spark, night, tmp_path
):
    storage, settings = night("retyped")
    before, table = check(storage), str(tmp_path / "source")
    settings = streaming(settings, format="delta", path=table)

    def append(rows: list[dict], columns: str) -> None:
        frame = spark.createDataFrame(rows, columns)
        frame.write.format("delta").option("delta.columnMapping.mode", "name").mode("append").save(table)

    append([event(0)], COLUMNS)
    serve.run(spark, settings, until_idle=True)
    for change in ("DROP COLUMN event_time", "ADD COLUMN event_time string"):
        spark.sql(f"ALTER TABLE delta.`{table}` {change}")
    texts = [{**event(1), "event_time": str(event(1)["event_time"])}, {**event(2), "event_time": "soon"}]
    append(texts, COLUMNS.replace("long", "string"))
    serve.run(spark, settings, until_idle=True)
    assert since(storage, before) == {"raw_events": 3, "events": 2, "quarantine": 1, "duplicates": 0}
    assert rejected(storage) == {("unreadable", "event_time"): 1}
    assert payload_of(storage, '"d2"')["event_time"] == "soon"


@pytest.mark.faults
def test_a_delta_table_that_was_rewritten_with_another_type_needs_a_new_checkpoint(spark, night, tmp_path):
    storage, settings = night("rewritten")
    before, table = check(storage), str(tmp_path / "source")
    settings = streaming(settings, format="delta", path=table)
    spark.createDataFrame([event(0)], COLUMNS).write.format("delta").save(table)
    serve.run(spark, settings, until_idle=True)
    texts = [{**event(0), "event_time": str(event(0)["event_time"])}, {**event(1), "event_time": "soon"}]
    frame = spark.createDataFrame(texts, COLUMNS.replace("long", "string"))
    frame.write.format("delta").mode("overwrite").option("overwriteSchema", "true").save(table)
    with pytest.raises(Exception, match="DELTA") as raised:
        serve.run(spark, settings, until_idle=True)
    assert "delete the folder stream.checkpoint and start the stream again" in sentence_for(raised.value)
    shutil.rmtree(settings.stream.checkpoint)
    serve.run(spark, settings, until_idle=True)
    # The event that was there before is known by its id.
    assert since(storage, before) == {"raw_events": 3, "events": 1, "quarantine": 1, "duplicates": 1}
    assert rejected(storage) == {("unreadable", "event_time"): 1}
    assert storage.read(EVENTS).where("event_id = 'd0'").count() == 1
