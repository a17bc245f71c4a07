from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from nightstream.ingest import id_filter
from nightstream.ingest.id_filter import IdFilter, hashes
from nightstream.store.tables import EVENTS

SCHEMA = "event_id string, retracts string"


def of(*ids):
    return hashes(pa.array(ids))


def booked(storage, *rows):
    storage.append_values(EVENTS, [(i, "u", "i", "view", None, None, of_, "h", i, None) for i, of_ in rows])


@pytest.mark.parametrize("elsewhere", [False, True])
def test_ids_and_targets_of_retractions_are_known_and_others_are_not(storage, monkeypatch, elsewhere):
    booked(storage, ("a", None), ("r", "late"))
    if elsewhere:
        monkeypatch.setattr(storage, "local", None)
    known = IdFilter.of(storage)
    for name in ("a", "r", "late"):
        assert known.may_hold(of("x", name))
    assert not known.may_hold(of("x", "y"))


def test_what_is_added_is_known_also_after_it_was_sorted_in(monkeypatch):
    monkeypatch.setattr(id_filter, "_MOST_RECENT", 2)
    known = IdFilter(np.array([], np.int64))
    for name in "abcd":
        assert not known.may_hold(of(name))
        known.add(of(name))
    known.add_ids(pa.table({"event_id": ["e", "f"], "retracts": [None, "late"]}))
    assert all(known.may_hold(of(name)) for name in ("a", "b", "c", "d", "e", "f", "late"))
    assert not known.may_hold(of("x"))


def test_too_many_ids_are_left_to_the_table(spark, storage, monkeypatch):
    monkeypatch.setattr(id_filter, "MOST_IDS", 1)
    booked(storage, ("a", None), ("b", None))
    assert IdFilter.of(storage).may_hold(of("never seen"))
    known = IdFilter(np.array([], np.int64))
    known.add(of("a", "b"))
    known.add_rows(spark.createDataFrame([("a", None), ("b", None)], SCHEMA), 2)
    assert known.may_hold(of("never seen"))


def test_rows_of_a_large_batch_are_known(spark):
    known = IdFilter(np.array([], np.int64))
    known.add(of("before"))
    known.add_rows(spark.createDataFrame([("a", None), ("r", "late")], SCHEMA), 2)
    assert all(known.may_hold(of(name)) for name in ("before", "a", "r", "late"))
    assert not known.may_hold(of("x"))
