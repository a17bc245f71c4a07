"""Writes that meet a concurrent writer are tried again, and counted."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from delta.exceptions import ConcurrentAppendException
from nightstream.store import storage as module
from nightstream.store.tables import USERS
from pyspark.errors import PySparkException


def failing(times: int, error: Exception):
    """An action that raises `times` times, then returns how often it was called."""
    calls = []

    def action() -> int:
        calls.append(1)
        if len(calls) <= times:
            raise error
        return len(calls)

    return action


@pytest.fixture
def bare(settings, monkeypatch):
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    return module.Storage(None, settings.storage)


def test_a_conflict_is_tried_again_and_counted_from_any_thread(bare):
    def conflict(times):
        assert bare.with_retries(failing(times, ConcurrentAppendException("met another")), 5, "t") == times + 1

    threads = [threading.Thread(target=conflict, args=(times,)) for times in (0, 1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bare.conflicts == 3


def test_the_last_attempt_and_other_errors_are_raised(bare):
    with pytest.raises(ConcurrentAppendException):
        bare.with_retries(failing(3, ConcurrentAppendException("met another")), 3, "t")
    for other in (ZeroDivisionError(), PySparkException("not a ConcurrentAppendException, though it speaks of one")):
        with pytest.raises(type(other)):
            bare.with_retries(failing(1, other), 3, "t")
    assert bare.conflicts == 2


def users(spark, *names: str):
    return spark.createDataFrame([(name, None, None) for name in names], USERS.schema).coalesce(1)


def merged(storage, rows) -> None:
    both = storage.table(USERS).alias("old").merge(rows.alias("new"), "old.user_id = new.user_id")
    both.whenMatchedUpdateAll().whenNotMatchedInsertAll().execute()


def test_of_two_merges_at_a_time_the_later_one_is_tried_again(storage, spark, tmp_path):
    """What Delta raises is met as one of its own classes, from any thread."""
    storage.append(USERS, users(spark, "a"))
    begun, go = str(tmp_path / "begun"), str(tmp_path / "go")

    def held_back(batches):
        for batch in batches:
            Path(begun).touch()
            while not Path(go).exists():
                time.sleep(0.05)
            yield batch

    raised = []

    def merge() -> None:
        try:
            merged(storage, users(spark, "a", "b").mapInArrow(held_back, USERS.schema))
        except PySparkException as error:
            raised.append(error)
            raise

    with ThreadPoolExecutor(1) as pool:
        merging = pool.submit(storage.with_retries, merge, 2, USERS.name)
        try:
            while not Path(begun).exists() and not merging.done():
                time.sleep(0.05)
            merged(storage, users(spark, "a"))
        finally:
            Path(go).touch()
        merging.result()
    assert [isinstance(error, module.CONFLICTS) for error in raised] == [True]
    assert storage.conflicts == 1
    assert sorted(r.user_id for r in storage.read(USERS).collect()) == ["a", "b"]
