from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
import world
from nightstream.errors import SourceError, TableError
from nightstream.runtime.settings import load
from nightstream.steps import ingest, train
from nightstream.store.storage import Storage
from nightstream.store.tables import EVENTS, ITEMS, RAW_EVENTS

CONF = Path(__file__).parents[2] / "conf"
ITEM = "item_id:token\tname:token_seq\n{}\n"


def test_ingest_twice_grown_and_with_changed_items(spark, tmp_path, caplog):
    events, items = tmp_path / "x.inter", tmp_path / "x.item"
    rows = ["user_id:token\titem_id:token\ttimestamp:float", "1\t2\t3", "1\t3\t4", "1\t3\t4", "\t3\t4"]
    events.write_text("\n".join(rows) + "\n")
    items.write_text(ITEM.format("2\ttwo\n3\tthree"))
    settings = load(
        [CONF / "recbole.yaml"],
        [f"sources.events.path={events}", f"sources.items.path={items}", f"storage.root={tmp_path / 'tables'}"],
    )
    result = ingest.run(spark, settings)
    assert result["events"] == {"raw_events": 4, "events": 2, "quarantine": 1, "duplicates": 1}
    assert result["added"] == result["events"]
    assert (
        "1 of 4 new payloads were rejected; in all, 1 payloads are in quarantine, most of them for user_id missing (1)"
        in caplog.text
    )
    caplog.clear()
    assert result["items"] == {"rows": 2, "left_out": {"without a usable id": 0, "repeated": 0}}
    assert result["users"]["rows"] == 0

    # 3 left the source and stays, 2 is renamed, 4 is new.
    items.write_text(ITEM.format("2\tTWO\n4\tfour"))
    events.write_text("\n".join([*rows, "2\t2\t5"]) + "\n")
    again = ingest.run(spark, settings)
    assert again["added"] == {"raw_events": 1, "events": 1, "quarantine": 0, "duplicates": 0}
    assert "rejected" not in caplog.text
    storage = Storage(spark, settings.storage)
    assert {r.item_id: r.title for r in storage.read(ITEMS).collect()} == {"2": "TWO", "3": "three", "4": "four"}


def test_a_night_without_a_valid_event_says_what_was_rejected_and_why(spark, settings, tmp_path):
    rows = [{"user_id": n, "item_id": 1, "event_time": n + 1, "event_type": "purchase"} for n in range(3)]
    rows += [
        {"user_id": 9, "item_id": 1, "event_time": "soon"},
        {"user_id": 9, "item_id": 1},
        {"user_id": 8, "item_id": 1},
    ]
    world.write_lines(tmp_path / "events.jsonl", [*rows, "x" * 1000])
    document = settings.model_dump()
    document["sources"]["events"]["path"] = str(tmp_path / "events.jsonl")
    settings = type(settings).model_validate(document)
    Storage(spark, settings.storage).create(EVENTS)
    with pytest.raises(TableError, match="ingest some"):
        train.run(spark, settings, datetime(2024, 1, 1, tzinfo=UTC))
    ingest.run(spark, settings)
    with pytest.raises(TableError) as raised:
        train.run(spark, settings, datetime(2024, 1, 1, tzinfo=UTC))
    reasons = "7 payloads are in quarantine, most of them for event_type unknown (3), event_time missing (2); such as {"
    assert reasons in str(raised.value)
    assert '"purchase"' in str(raised.value)


def test_a_bad_source_leaves_no_table_half_written(spark, settings, tmp_path):
    events = tmp_path / "e.jsonl"
    events.write_text(json.dumps({"user_id": 1, "item_id": 2, "event_time": 3}))
    document = settings.model_dump()
    document["sources"]["events"]["path"] = str(events)
    document["sources"]["items"] = {"path": str(tmp_path / "none.csv"), "format": "csv"}
    with pytest.raises(SourceError, match=r"none\.csv does not exist"):
        ingest.run(spark, type(settings).model_validate(document))
    storage = Storage(spark, settings.storage)
    assert not any(storage.exists(t) for t in (RAW_EVENTS, EVENTS, ITEMS))
