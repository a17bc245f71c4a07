from __future__ import annotations

import hashlib
import json
import time
import zlib
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nightstream.ingest import parse
from nightstream.runtime.settings import EventSettings
from nightstream.store.tables import EVENTS, RAW_EVENTS
from pyspark.sql import functions as F

RULES = EventSettings(
    types=("view", "buy"),
    window_types=("view",),
    default_type="view",
    retraction_type="retract",
    max_id_length=10,
    max_payload_bytes=1_200_000,
    max_future_seconds=60,
    min_value=-5.0,
    max_value=5.0,
)
COLUMNS = {c: c for c in ("event_id", "user_id", "item_id", "event_type", "event_time", "value", "retracts")}
ARRIVAL = datetime(2026, 1, 1, tzinfo=UTC)
BINARY_PAYLOADS = "payload binary, source string, position string, arrival_time timestamp"
OK = {"user_id": "u", "item_id": "i", "event_time": 1_700_000_000}


def payloads(spark, lines, position="file"):
    rows = [(line, "test", position, ARRIVAL) for line in lines]
    return spark.createDataFrame(rows, "payload string, source string, position string, arrival_time timestamp")


def parsed(spark, lines, columns=COLUMNS, time_unit="auto", rules=RULES):
    """The parsed rows in the order of the lines (which must differ)."""
    rows = parse.raw_rows(parse.parse(payloads(spark, lines), columns, time_unit, rules, "*"))
    rows = rows.withColumn("micros", F.unix_micros("event_time")).drop("event_time", "arrival_time")
    found = {r.payload: r for r in rows.collect()}
    assert len(found) == len(lines)
    return [found[line] for line in lines]


def changed(**values) -> str:
    return json.dumps({k: v for k, v in {**OK, **values}.items() if v is not ...})


REJECTED = [
    ("", "not_json", "payload"),
    ("null", "not_json", "payload"),
    ("12", "not_json", "payload"),
    ('"text"', "not_json", "payload"),
    ("{", "not_json", "payload"),
    (changed()[:-1], "not_json", "payload"),
    (f"[{changed(value=1)}]", "not_json", "payload"),
    (changed(value=2) + " garbage", "not_json", "payload"),
    (changed(value=3) + changed(value=3), "not_json", "payload"),
    (changed(value=4) + "," + changed(value=4), "not_json", "payload"),
    (changed().replace('"', "'"), "not_json", "payload"),
    ('{"user_id":' + "[" * 3000 + "]" * 3000 + "}", "not_json", "payload"),
    ('{"user_id":"a","user_id":"b","item_id":"i","event_time":1}', "repeated_key", "payload"),
    ('\ufeff {"user_id":"u","item_id":"i","event_time":1,"k":1,"\\u006b":1}', "repeated_key", "payload"),
    (changed(user_id=...), "missing", "user_id"),
    (changed(user_id=None), "missing", "user_id"),
    (changed(user_id=" \t\u00a0"), "missing", "user_id"),
    (changed(item_id=""), "missing", "item_id"),
    (changed(event_time=...), "missing", "event_time"),
    (changed(event_time=" "), "missing", "event_time"),
    (changed(user_id="u" * 11), "too_long", "user_id"),
    (changed(item_id="ü" * 11), "too_long", "item_id"),
    (changed(event_id="e" * 11), "too_long", "event_id"),
    (changed(user_id=1.5), "unreadable", "user_id"),
    (changed(item_id=1e22), "unreadable", "item_id"),
    (changed(event_id=2.0**53), "unreadable", "event_id"),
    *[(changed(event_time=t), "unreadable", "event_time") for t in (201411, 20141118, 201411181230, "20141118")],
    (changed(event_time=20141118093000), "in_future", "event_time"),
    (changed(event_time="1" * 1101), "too_long", "event_time"),
    (changed(event_time="2025-01-01" + " " * 1100 + "UTC"), "too_long", "event_time"),
    (changed(value="1" * 1101), "too_long", "value"),
    (changed(value="1" * 1100), "out_of_range", "value"),
    (changed(note="n" * 1_200_000), "too_long", "payload"),
    ("x" * 1_200_001, "too_long", "payload"),
    (changed(user_id="*"), "reserved", "user_id"),
    (changed(user_id=" * "), "reserved", "user_id"),
    (changed(user_id={"a": 1}), "unreadable", "user_id"),
    (changed(item_id=[1]), "unreadable", "item_id"),
    (changed(event_id=[]), "unreadable", "event_id"),
    ('{"user_id":1e400,"item_id":"i","event_time":1}', "unreadable", "user_id"),
    ('{"user_id":"\\ud800","item_id":"i","event_time":1}', "unreadable", "user_id"),
    ('{"user_id":"u","item_id":"\\udc00x","event_time":1}', "unreadable", "item_id"),
    (changed(user_id="a\x00b"), "unreadable", "user_id"),
    (changed(user_id="a\ufffdb"), "unreadable", "user_id"),
    (changed(event_type="VIEW"), "unknown", "event_type"),
    (changed(event_type={"view": 1}), "unknown", "event_type"),
    (changed(event_type="retract"), "missing", "retracts"),
    (changed(event_type="retract", retracts=""), "missing", "retracts"),
    *[
        (changed(event_time=t), "unreadable", "event_time")
        for t in ("soon", "now", "10:00", "2025-13-01", "2025-02-30", "2025-01-01T25:00:00Z", "12025-01-01", True, [1])
    ],
    ('{"user_id":"u","item_id":"i","event_time":1e400}', "unreadable", "event_time"),
    (changed(event_time=int("9" * 60)), "unreadable", "event_time"),
    (changed(event_time=-1), "out_of_range", "event_time"),
    (changed(event_time="1969-12-31T23:59:59Z"), "out_of_range", "event_time"),
    (changed(event_time=9 * 10**18), "in_future", "event_time"),
    (changed(event_time="2026-01-01T00:01:00.000001Z"), "in_future", "event_time"),
    (changed(event_time="9999-12-31"), "in_future", "event_time"),
    (changed(value=float("nan")), "out_of_range", "value"),
    (changed(value="NaN"), "out_of_range", "value"),
    (changed(value=float("inf")), "out_of_range", "value"),
    (changed(value="-Infinity"), "out_of_range", "value"),
    ('{"user_id":"u","item_id":"i","event_time":1,"value":1e400}', "out_of_range", "value"),
    (changed(value=int("9" * 400)), "out_of_range", "value"),
    (changed(value=5.0001), "out_of_range", "value"),
    (changed(value=-6), "out_of_range", "value"),
    *[(changed(value=v), "unreadable", "value") for v in ("much", "1,5", "1d", "0x1", True, {"a": 1}, [3])],
]


def test_what_is_rejected_and_why(spark):
    lines = [line for line, _, _ in REJECTED]
    found = [(r.payload, r.reason, r.field) for r in parsed(spark, lines)]
    assert found == REJECTED


LONG = ("1" * 60_000 + "x", "1" * 60_000 + "e1234", "2025-01-01" + " " * 60_000 + "x", "[" * 60_000, "?" * 60_000)


def test_nothing_in_a_payload_takes_out_of_all_proportion(spark):
    """Against as many characters that nobody looks into."""

    def seconds(lines: list[str]) -> float:
        begun = time.monotonic()
        parsed(spark, lines)
        return time.monotonic() - begun

    hostile = [changed(**{name: text}) for name in COLUMNS for text in LONG]
    harmless = [changed(user_id=f"u{n}", note="n" * 60_000) for n in range(len(hostile))]
    seconds(harmless)
    assert seconds(hostile) < 10 * seconds(harmless)


def test_a_rejected_row_has_no_event(spark):
    (row,) = parsed(spark, [changed(value="much")])
    assert [row[n] for n in EVENTS.schema.names if n not in (*RAW_EVENTS.schema.names, "event_time")] == [None] * 7


ACCEPTED: list[tuple[str, dict[str, Any]]] = [
    (changed(user_id=196), {"user_id": "196", "event_type": "view", "value": None}),
    (changed(user_id=int("1" * 10)), {"user_id": "1" * 10}),
    (changed(user_id=197.0, item_id=-2.50e1), {"user_id": "197", "item_id": "-25"}),
    (changed(user_id="1.0", item_id="1e3"), {"user_id": "1.0", "item_id": "1e3"}),
    (
        changed(user_id=" u ", item_id="\ti\n", event_type=" buy "),
        {"user_id": "u", "item_id": "i", "event_type": "buy"},
    ),
    (changed(item_id="Hä 漢🎬"), {"item_id": "Hä 漢🎬"}),
    (changed(item_id="[deleted]"), {"item_id": "[deleted]"}),
    ('{"user_id":"\\ud83c\\udfac?","item_id":"i","event_time":1}', {"user_id": "🎬?"}),
    (changed(extra={"user_id": "x"}, more=[{"a": 1}, {"a": 2}]), {"user_id": "u"}),
    ('\ufeff  {"user_id":"u","item_id":"bom","event_time":1}', {"item_id": "bom"}),
    (changed(value="1.5", extra={"user_id": "x", "deep": [[[{}]]]}), {"user_id": "u", "value": 1.5}),
    (changed(value=1e-320), {"value": 1e-320}),
    (changed(value=-0.0, event_type=""), {"value": 0.0, "event_type": "view"}),
    (changed(value=""), {"value": None}),
    (changed(pad="x" * 300_000), {"user_id": "u"}),
    (changed(retracts="e1", event_id="e2"), {"retracts": None, "event_id": "e2"}),
    (
        changed(event_type="retract", retracts="e1", item_id=..., event_id=7),
        {"retracts": "e1", "item_id": None, "event_type": "retract", "event_id": "7"},
    ),
]


def test_what_is_accepted_and_how_it_is_read(spark):
    rows = parsed(spark, [line for line, _ in ACCEPTED])
    for row, (line, expected) in zip(rows, ACCEPTED, strict=True):
        assert (row.reason, {k: row[k] for k in expected}) == (None, expected), line[:200]


TIMES = [
    (0, 0),
    (1_700_000_000, 1_700_000_000_000_000),
    ("1700000000", 1_700_000_000_000_000),
    (1_700_000_000.123456, 1_700_000_000_123_456),
    ("1.7e9", 1_700_000_000_000_000),
    ("1700000000.1234569", 1_700_000_000_123_456),
    (1_700_000_000_123, 1_700_000_000_123_000),
    ("1700000000123.5", 1_700_000_000_123_500),
    (1_700_000_000_123_456, 1_700_000_000_123_456),
    (10**11, None),  # the year 5138 in seconds
    (10**11 + 1, 100_000_000_001_000),
    (10**14 + 1, 100_000_000_000_001),
    ("2023-11-14", 1_699_920_000_000_000),
    ("2023-11-14T22:13:20Z", 1_700_000_000_000_000),
    ("2023-11-14t22:13:20z", 1_700_000_000_000_000),
    ("2023-11-14 22:13:20", 1_700_000_000_000_000),
    ("2023-11-14T22:13", 1_699_999_980_000_000),
    ("2023-11-14T22:13:20.1234567 UTC", 1_700_000_000_123_456),
    ("2023-11-14T23:13:20.5+01:00", 1_700_000_000_500_000),
    ("2023-11-14T17:13:20-0500", 1_700_000_000_000_000),
    ("2023-11-14T17:13-05", 1_699_999_980_000_000),
    (1_700_000_000_123_456_789, 1_700_000_000_123_456),
]


def test_times_to_the_microsecond(spark):
    rows = parsed(spark, [changed(event_time=t) for t, _ in TIMES])
    assert [(t, r.micros) for (t, _), r in zip(TIMES, rows, strict=True)] == TIMES


@pytest.mark.parametrize(
    ("unit", "number", "micros", "reads_iso"),
    [
        ("seconds", 200_000_000, 200_000_000_000_000, False),
        ("milliseconds", 2_000_000_000, 2_000_000_000_000, False),
        ("microseconds", 5, 5, False),
        ("nanoseconds", 5_999, 5, False),
        ("seconds", 20141118, 20_141_118_000_000, False),
        ("iso", 5, None, True),
    ],
)
def test_a_fixed_time_unit_guesses_nothing(spark, unit, number, micros, reads_iso):
    rows = parsed(spark, [changed(event_time=number), changed(event_time="2023-11-14")], time_unit=unit)
    assert rows[0].micros == micros
    assert (rows[1].micros is not None) == reads_iso


@pytest.mark.parametrize(
    ("zone", "hours"), [("UTC", (0, 0)), ("Asia/Shanghai", (8, 8)), ("+08:00", (8, 8)), ("Europe/Berlin", (1, 2))]
)
def test_times_without_a_zone_are_those_of_the_source(spark, zone, hours):
    texts = ["2023-11-14 22:13:20", "2023-07-14", "2023-11-14T22:13:20Z", "2023-11-14T22:13:20+01:00"]
    rows = parse.parse(payloads(spark, [changed(event_time=t) for t in texts]), COLUMNS, "auto", RULES, "*", zone)
    found = [r.event_time.replace(tzinfo=UTC) for r in rows.collect()]
    winter, summer = (timedelta(hours=h) for h in hours)
    moment = datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)
    expected = [moment - winter, datetime(2023, 7, 14, tzinfo=UTC) - summer, moment, moment - timedelta(hours=1)]
    assert sorted(found) == sorted(expected)


def test_derived_ids_order_ties_by_crc32_of_user_and_item(spark):
    pairs = [(f"u{n}", f"i{n * 7 % 5}") for n in range(20)]
    rows = parsed(spark, [changed(user_id=u, item_id=i) for u, i in pairs])
    by_id = [(r.user_id, r.item_id) for r in sorted(rows, key=lambda r: r.event_id)]
    assert by_id == sorted(pairs, key=lambda p: zlib.crc32(f"{p[0]}/{p[1]}".encode()))
    assert all(r.event_id.endswith("-" + r.content_hash) and len(r.content_hash) == 16 for r in rows)


def test_content_hash_depends_on_the_content_alone(spark):
    base = changed(value=1, event_id="a")
    same = [changed(value="1.0", event_id="b"), changed(value=1, event_time="2023-11-14T22:13:20Z", extra=5)]
    others = [changed(value=2), changed(), changed(event_type="buy", value=1), changed(item_id="j", value=1)]
    others += [changed(event_time=1_700_000_001, value=1), changed(user_id="v", value=1)]
    hashes = [r.content_hash for r in parsed(spark, [base, *same, *others])]
    assert len(set(hashes[:3])) == 1
    assert len(set(hashes[2:])) == 7


def test_raw_ids_are_unique_and_come_back(spark):
    lines = ["a", "a", "b", "a"]
    once = {(r.payload, r.position): r.raw_id for r in parse.raw_rows(payloads(spark, lines)).collect()}
    again = {(r.payload, r.position): r.raw_id for r in parse.raw_rows(payloads(spark, lines[::-1])).collect()}
    assert once == again
    assert len(set(once.values())) == 4
    (source_and_position,) = {p for (line, p) in once if line == "b"}
    digest = hashlib.sha256(f"test\x01{source_and_position}".encode()).hexdigest()
    assert once["b", source_and_position] == digest[:32]


def test_broken_utf8_is_rejected_kept_readable_and_kept_as_it_came(spark):
    payload = b'{"user_id":"u","item_id":"i","event_time":1,"note":"%s"}'
    lines = [payload % b"\xff", payload % b"\xfe", payload % "ä".encode()]
    broken = spark.createDataFrame([(x, "test", "file", ARRIVAL) for x in map(bytearray, lines)], BINARY_PAYLOADS)
    once = parse.parse(broken.withColumn("payload", F.col("payload").cast("string")), COLUMNS, "auto", RULES, "*")
    rows = sorted(parse.raw_rows(once).collect(), key=lambda r: bytes(r.payload_bytes or b""), reverse=True)
    assert [r.reason for r in rows] == ["not_utf8", "not_utf8", None]
    assert [r.payload_bytes for r in rows] == [*lines[:2], None]
    assert [r.payload.count("\ufffd") for r in rows] == [1, 1, 0]
    assert len({r.position for r in rows}) == 3
    # Read again from raw_events it is still no event.
    again = parse.parse(
        once.select(*[f for f in RAW_EVENTS.schema.names if f != "raw_id"]), COLUMNS, "auto", RULES, "*"
    )
    assert sorted(str(r.reason) for r in again.collect()) == ["None", "not_utf8", "not_utf8"]


@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.one_of(
            st.text(max_size=30),
            st.dictionaries(
                st.sampled_from(sorted(COLUMNS)),
                st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers())),
            ).map(json.dumps),
        ),
        min_size=100,
        max_size=200,
        unique=True,
    )
)
def test_no_payload_breaks_the_job_and_each_gets_a_verdict(spark, lines):
    rows = parse.raw_rows(parse.parse(payloads(spark, lines), COLUMNS, "auto", RULES, "*")).drop(
        "event_time", "arrival_time"
    )
    found = rows.collect()
    assert len(found) == len(lines)
    for row in found:
        assert (row.reason in parse.REASONS and row.event_id is None) or (
            row.field is None and row.user_id and row.event_id
        )
