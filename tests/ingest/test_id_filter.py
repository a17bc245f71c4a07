from __future__ import annotations

import numpy as np
from nightstream.ingest import id_filter
from nightstream.ingest.id_filter import HASHES, IdFilter, with_hashes


def hashes_of(spark, *ids):
    rows = spark.createDataFrame([(i, None) for i in ids], "event_id string, retracts string")
    return np.array([r.id_hash for r in with_hashes(rows).collect()])


def test_ids_and_targets_of_retractions_are_known_and_others_are_not(spark):
    rows = spark.createDataFrame([("a", None), ("r", "late")], "event_id string, retracts string")
    known = IdFilter.of(rows)
    for name in ("a", "r", "late"):
        assert known.may_hold(hashes_of(spark, "x", name))
    assert not known.may_hold(hashes_of(spark, "x", "y"))
    assert list(HASHES) == ["id_hash", "retracts_hash"]


def test_what_is_added_is_known_also_after_it_was_sorted_in(spark, monkeypatch):
    monkeypatch.setattr(id_filter, "_MOST_RECENT", 2)
    known = IdFilter(np.array([], np.int64))
    for name in "abcd":
        assert not known.may_hold(hashes_of(spark, name))
        known.add(hashes_of(spark, name))
    assert all(known.may_hold(hashes_of(spark, name)) for name in "abcd")


def test_too_many_ids_are_left_to_the_table(spark, monkeypatch):
    monkeypatch.setattr(id_filter, "MOST_IDS", 1)
    rows = spark.createDataFrame([("a", None), ("b", None)], "event_id string, retracts string")
    assert IdFilter.of(rows).may_hold(hashes_of(spark, "never seen"))
    known = IdFilter(np.array([], np.int64))
    known.add(hashes_of(spark, "a", "b"))
    known.add_rows(with_hashes(rows), 2)
    assert known.may_hold(hashes_of(spark, "never seen"))


def test_rows_of_a_large_batch_are_known(spark):
    known = IdFilter(np.array([], np.int64))
    known.add(hashes_of(spark, "before"))
    rows = spark.createDataFrame([("a", None), ("r", "late")], "event_id string, retracts string")
    known.add_rows(with_hashes(rows), 2)
    assert all(known.may_hold(hashes_of(spark, name)) for name in ("before", "a", "r", "late"))
    assert not known.may_hold(hashes_of(spark, "x"))
