"""Whatever arrives gets a verdict: malformed payloads go to quarantine, each with its reason, and stop nothing."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import poison
import pytest
from nightstream.ingest.ledger import check, parsed
from nightstream.runtime.settings import validate
from nightstream.steps import serve
from nightstream.store.tables import EVENTS, QUARANTINE, RAW_EVENTS
from pyspark.sql import functions as F

ARRIVAL = datetime(2024, 6, 1, tzinfo=UTC)
SHAPE = "number int, payload binary, source string, position string, arrival_time timestamp"


def test_each_malformed_payload_gets_its_reason(spark, settings):
    made = poison.payloads(300, seed=1, huge=30_000)
    rows = [(n, bytearray(p.payload), "test", f"{n}", ARRIVAL) for n, p in enumerate(made)]
    arrived = spark.createDataFrame(rows, SHAPE).withColumn("payload", F.col("payload").cast("string"))
    found = {r.number: r.reason for r in parsed(arrived, settings).select("number", "reason").collect()}
    wrong = {n: (p.payload[:120], p.reason, found[n]) for n, p in enumerate(made) if found[n] != p.reason}
    assert not wrong
    assert len({p.reason for p in made}) == 11


def rejections(name: str, lines: list[poison.Poison]) -> list[tuple[str, str]]:
    """Where each malformed line of the file stands, as events.raw_rows tells its position, and its reason."""
    copies: Counter[str] = Counter()
    places = []
    for line in lines:
        digest = hashlib.sha256(line.payload).hexdigest()[:16]
        copies[digest] += 1
        if line.reason:
            places.append((f"{name}#{digest}-{copies[digest]}", line.reason))
    return places


@pytest.mark.slow
def test_ten_thousand_malformed_payloads_end_in_quarantine_and_never_stop_the_stream(spark, night):
    storage, settings = night("poison")
    document = settings.model_dump(mode="json")
    document["sources"]["events"]["time_unit"] = "auto"
    settings = validate(document)
    before = check(storage)
    made = poison.payloads(10_000, seed=2)
    reasons = Counter(p.reason for p in made)
    valid = reasons.pop(None)
    folder = Path(settings.stream.path)
    folder.mkdir(parents=True)
    files = [made[start : start + 500] for start in range(0, len(made), 500)]
    for number, file in enumerate(files):
        lines = [p.payload for p in file]
        (folder / f".{number}").write_bytes(b"\n".join(lines) + b"\n")
        os.replace(folder / f".{number}", folder / f"{number:02}.jsonl")
    told = serve.run(spark, settings, until_idle=True)
    assert told["batches"] >= 3
    after = check(storage)
    added = {name: after[name] - before[name] for name in after}
    assert added == {"raw_events": len(made), "events": valid, "quarantine": 10_000, "duplicates": 0}
    raw = storage.read(RAW_EVENTS).where("source LIKE '%stream'")
    rejected = storage.read(QUARANTINE).select("raw_id", "reason").join(raw.select("raw_id", "position"), "raw_id")
    found = Counter((Path(r.position).name, r.reason) for r in rejected.collect())
    expected = Counter(place for number, file in enumerate(files) for place in rejections(f"{number:02}.jsonl", file))
    assert expected.total() == 10_000
    wrong = (expected - found) + (found - expected)
    assert not wrong, wrong.most_common(5)
    # As they came: the broken ones byte for byte, the others as text.
    sizes = raw.select(F.coalesce(F.length("payload_bytes"), F.octet_length("payload")).alias("bytes"), "payload_bytes")
    assert sizes.where("payload_bytes IS NOT NULL").count() == reasons["not_utf8"]
    assert sizes.agg(F.sum("bytes")).first()[0] == sum(len(p.payload) for p in made)
    assert {r.event_id for r in storage.read(EVENTS).where("event_id LIKE 'p%'").collect()} == {
        f"p{n}" for n, p in enumerate(made) if p.reason is None
    }
