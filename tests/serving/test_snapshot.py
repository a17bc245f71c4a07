"""Items that come, change and go while the stream runs."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import world
from nightstream.errors import SourceError
from nightstream.ingest import formats
from nightstream.ingest.ledger import parsed
from nightstream.runtime import clock
from nightstream.runtime.settings import validate
from nightstream.serving import speed_layer
from nightstream.serving.snapshot import Snapshots
from nightstream.steps import apply
from nightstream.store.storage import Storage
from nightstream.store.tables import ITEM_EMBEDDINGS, RECOMMENDATIONS
from pyspark.sql import functions as F

ARRIVAL = datetime(2024, 1, 2, tzinfo=UTC)
STAYING = {"i20", "i21", "i22", "i23"}
NEW, UPDATED = "i-new", "i20"


def with_items(settings, folder: Path):
    """The settings with an items source of their own that can withdraw, looked at in each micro-batch."""
    document = settings.model_dump(mode="json")
    document["sources"]["items"] |= {"path": str(folder / "items.jsonl"), "available": "stock"}
    document["stream"]["snapshot_seconds"] = 0.0
    return validate(document)


def changed_items() -> list[dict]:
    """All items but STAYING withdrawn, one of those under another group and title, and a new one."""
    rows = [{**item, "stock": "yes" if item["item_id"] in STAYING else "no"} for item in world.items()]
    rows = [{**r, "title": "Item 1", "group": "left"} if r["item_id"] == UPDATED else r for r in rows]
    return [*rows, {"item_id": NEW, "title": "Item 22", "group": "right", "size": 22.0, "stock": "yes"}]


def feed(spark, layer, settings, number: int, user: str) -> None:
    """One micro-batch with one event of the user, merged."""
    line = f'{{"event_id":"n{number}","user_id":"{user}","item_id":"i00","event_time":{world.START + 10**6 + number}}}'
    shape = "payload string, source string, position string, arrival_time timestamp"
    layer(parsed(spark.createDataFrame([(line, "test", f"p{number}", ARRIVAL)], shape), settings), number)
    layer.settle()


def vectors(storage) -> dict[str, list[float]]:
    rows = storage.read(ITEM_EMBEDDINGS).collect()
    assert len({(r.model_version, r.item_id) for r in rows}) == len(rows)
    return {r.item_id: r.vector for r in rows}


def lists(storage) -> dict[str, set[str]]:
    rows = storage.read(RECOMMENDATIONS).groupBy("user_id").agg(F.collect_set("item_id").alias("items")).collect()
    return {r.user_id: set(r["items"]) for r in rows}


@pytest.mark.slow
def test_a_new_item_is_listed_an_updated_one_encoded_anew_a_withdrawn_one_in_no_list(spark, night, tmp_path):
    storage, settings = night("items")
    settings = with_items(settings, tmp_path)
    layer = speed_layer.SpeedLayer(storage, settings, lambda: "stream", clock.utc_now)
    layer.start()
    before, users = vectors(storage), set(lists(storage))
    # No source at all, as while it is written anew, does not stop the events.
    feed(spark, layer, settings, 0, "u000")
    assert lists(storage)["u000"] - STAYING
    world.write_lines(tmp_path / "items.jsonl", changed_items())
    feed(spark, layer, settings, 1, "u000")
    after, found = vectors(storage), lists(storage)
    assert NEW in found["u000"]
    # Everybody's list, not only that of the user who did something.
    assert set().union(*found.values()) <= {*STAYING, NEW}
    assert set(found) == users
    assert {i for i in before if after[i] != before[i]} == {UPDATED}
    assert after[NEW] != after["i22"]
    assert NEW in layer.bundle.load().catalogue.item_ids


@pytest.mark.slow
def test_the_stream_moves_the_holders_of_withdrawn_items_by_slices_and_the_night_moves_the_rest(spark, night, tmp_path):
    storage, settings = night("holders")
    document = with_items(settings, tmp_path).model_dump(mode="json")
    document["stream"]["handover_slice"] = 10
    settings = validate(document)
    layer = speed_layer.SpeedLayer(storage, settings, lambda: "stream", clock.utc_now)
    layer.start()
    world.write_lines(tmp_path / "items.jsonl", changed_items())
    holding = []
    for number in range(2):
        feed(spark, layer, settings, number, "u000")
        holding.append(sum(bool(items - {*STAYING, NEW}) for items in lists(storage).values()))
    assert 0 < holding[1] <= holding[0] - 10
    apply.run(spark, settings, ARRIVAL)
    assert set().union(*lists(storage).values()) <= {*STAYING, NEW}


def test_a_look_delays_no_micro_batch_and_its_outcome_is_for_the_bundle_that_it_began_with(settings, monkeypatch):
    stream = settings.stream.model_copy(update={"snapshot_seconds": 1e-9})
    snapshots = Snapshots(Storage(None, settings.storage), settings.model_copy(update={"stream": stream}))
    first, second, other = (MagicMock() for _ in range(3))
    going_on, outcomes = threading.Event(), iter([second, second, None, SourceError("gone")])

    def newer(bundle):
        going_on.wait()
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(snapshots, "newer", newer)

    def taken(bundle):
        while not (outcome := snapshots.take(bundle))[0]:
            time.sleep(0.001)
        return outcome[1]

    assert snapshots.take(first) == snapshots.take(first) == (False, None)
    going_on.set()
    assert taken(first) is second
    second.load.assert_called_once()
    going_on.clear()
    assert snapshots.take(first) == (False, None)
    going_on.set()
    # A start has taken up another one meanwhile: what the look found may be older.
    assert taken(other) is None
    assert taken(other) is None
    with pytest.raises(SourceError):
        taken(other)
    snapshots.close()


def test_a_source_has_another_fingerprint_when_it_has_changed(spark, tmp_path):
    table, folder = str(tmp_path / "table"), tmp_path / "folder"
    found = set()
    for number in range(2):
        spark.range(3).write.format("delta").mode("append").save(table)
        world.write_lines(folder / f"{number}.jsonl", [{}])
        for kind, path in (("delta", table), ("jsonl", str(folder))):
            found.add(formats.fingerprint(spark, kind, path))
            assert formats.fingerprint(spark, kind, path) in found
    assert len(found) == 4
    with pytest.raises(SourceError, match="none does not exist"):
        formats.fingerprint(spark, "jsonl", str(tmp_path / "none"))
