"""The key-value copy: records, the revision guard, on a target in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pytest
import refreshes
from fake_target import Fake
from hypothesis import given
from hypothesis import strategies as st
from nightstream.errors import MachineError
from nightstream.serving import key_value
from nightstream.serving.key_value import Patient, Record, Stopped, Tally, Unreachable, Written

NOW = datetime(2024, 1, 2, tzinfo=UTC)


def batch(*revisions: tuple[str, int], **options) -> pa.RecordBatch:
    table = refreshes.rows(revisions, **options).select(key_value.COLUMNS)
    return table.combine_chunks().to_batches()[0]


def test_a_record_has_the_items_by_rank_with_all_their_fields():
    made = batch(("a", 7), ("b", 2))
    first, second = key_value.records(made)
    assert (first.user_id, first.revision, first.model_version) == ("a", 7, "v7")
    assert (first.as_of, first.refreshed_at) == (refreshes.START + timedelta(seconds=7), refreshes.START)
    items = json.loads(first.items)
    assert items == sorted(made["items"][0].as_py(), key=lambda entry: entry["rank"])
    assert items != made["items"][0].as_py()
    assert list(items[0]) == ["rank", "item_id", "score", "strategy", "reason", "because_item_id"]
    assert [entry["item_id"] for entry in json.loads(second.items)] == ["i2-1", "i2-2", "i2-3"]


def test_lists_keep_to_their_rows_in_a_part_of_a_batch_and_where_some_are_empty():
    made = pa.concat_tables([refreshes.rows([("a", 1)]), refreshes.rows([("b", 2)], length=0)])
    made = pa.concat_tables([made, refreshes.rows([("c", 3), ("d", 4)])]).combine_chunks()
    missing = pa.array([None if user == "c" else items for user, items in zip(*_lists(made), strict=True)])
    made = made.set_column(made.schema.get_field_index("items"), "items", missing.cast(made["items"].type))
    part = made.select(key_value.COLUMNS).to_batches()[0].slice(1, 3)
    shown = {r.user_id: [entry["item_id"] for entry in json.loads(r.items)] for r in key_value.records(part)}
    assert shown == {"b": [], "c": [], "d": ["i4-1", "i4-2", "i4-3"]}


def _lists(made: pa.Table) -> tuple[list, list]:
    return made["user_id"].to_pylist(), made["items"].to_pylist()


def test_what_json_does_not_know_is_null():
    made = refreshes.rows([("a", 1)])
    items = [[{**entry, "score": math.nan if entry["rank"] == 1 else math.inf} for entry in made["items"][0].as_py()]]
    made = made.set_column(made.schema.get_field_index("items"), "items", pa.array(items, made["items"].type))
    (record,) = key_value.records(made.select(key_value.COLUMNS).to_batches()[0])
    assert "NaN" not in record.items
    assert [entry["score"] for entry in json.loads(record.items)] == [None] * 3


@pytest.mark.parametrize("kind", [pa.timestamp("ns"), pa.timestamp("us"), pa.timestamp("ms", tz="UTC")])
def test_times_are_in_utc_however_they_were_written(kind):
    made = batch(("a", 1))
    place = made.schema.get_field_index("as_of")
    moment = pa.array([datetime(2024, 5, 6, 7)], pa.timestamp("us")).cast(pa.timestamp(kind.unit))
    moment = moment.cast(kind) if kind.tz is None else moment.cast(pa.int64()).cast(kind)
    (record,) = key_value.records(made.set_column(place, "as_of", moment))
    assert record.as_of.isoformat() == "2024-05-06T07:00:00+00:00"


def written(target: Fake, batches: Sequence[pa.RecordBatch], at_once: int = 100) -> Tally:
    return key_value.write(batches, target, at_once, refreshes.START, lambda: NOW)


@given(
    revisions=st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 5)), min_size=1, max_size=30),
    cuts=st.integers(1, 7),
    at_once=st.integers(1, 5),
    known=st.sampled_from([0, 2, 100]),
)
def test_any_order_any_cut_and_any_repetition_end_in_the_newest(revisions, cuts, at_once, known):
    target, before = Fake(), key_value.MOST_KNOWN
    key_value.MOST_KNOWN = known
    try:
        parts = [revisions[start : start + cuts] for start in range(0, len(revisions), cuts)]
        tally = written(target, [batch(*part, length=1) for part in parts], at_once)
        again = written(target, [batch(*part, length=1) for part in reversed(parts)], at_once)
    finally:
        key_value.MOST_KNOWN = before
    assert target.revisions() == {user: max(r for u, r in revisions if u == user) for user, _ in revisions}
    assert (tally.rows, again.rows, again.written) == (len(revisions), len(revisions), 0)
    assert max(map(len, target.sent)) <= 2 * at_once


def test_of_a_user_who_comes_newest_first_one_row_is_sent():
    target = Fake()
    tally = written(target, [batch(("a", 3), ("b", 1)), batch(("a", 2), ("b", 1)), batch(("a", 1), ("c", 1))], 1)
    assert sorted(user for users in target.sent for user in users) == ["a", "b", "c"]
    assert (tally.rows, tally.written) == (6, 3)


def test_delays_are_of_what_was_written_and_refreshed_since_the_start():
    target = Fake()
    written(target, [batch(("old", 5))])
    ages = {"a": 2, "b": 2, "c": 6, "old": 60}
    parts = [refreshes.rows([(user, 1)], NOW - timedelta(seconds=age)) for user, age in ages.items()]
    parts.append(refreshes.rows([("history", 1)], refreshes.START - timedelta(days=9)))
    tally = written(target, [part.select(key_value.COLUMNS).to_batches()[0] for part in parts])
    assert tally.summary() == {"rows": 5, "written": 4, "refused": 0, "delay_p50_s": 2.0, "delay_max_s": 6.0}
    assert Tally(NOW).summary()["delay_p50_s"] is None


class Flaky(Fake):
    """Does not answer the first so many times after each connection number in `away`."""

    def __init__(self, failures: int) -> None:
        super().__init__()
        self.failures = failures

    def write(self, records: Sequence[Record]) -> Written:
        if self.failures:
            self.failures -= 1
            raise Unreachable("the fake does not answer")
        return super().write(records)


def test_a_server_that_goes_away_is_connected_anew_and_asked_again(caplog):
    flaky = Flaky(2)
    with caplog.at_level("WARNING"):
        tally = written(Patient(flaky, 60), [batch(("a", 1))])
    assert (tally.written, flaky.connections) == (1, 3)
    assert [record.again_in_s for record in caplog.records] == [0.1, 0.2]


def test_a_server_that_stays_away_is_named_with_the_remedy():
    with pytest.raises(MachineError, match=r"the fake does not answer, 0 s long .*retry_seconds: 0\.2.* goes on where"):
        written(Patient(Flaky(1000), 0.2), [batch(("a", 1))])
    with pytest.raises(Stopped):
        written(Patient(Flaky(1000), 60, stop=lambda: True), [batch(("a", 1))])


def test_a_server_that_is_not_there_at_the_start_is_not_waited_for():
    class Absent(Fake):
        def connect(self) -> None:
            raise Unreachable("the fake does not answer")

    with pytest.raises(MachineError, match=r"the fake does not answer; start the server or check sync\.url"):
        Patient(Absent(), 60).connect()
