"""One writer at a time, by a lease that a dead process cannot keep."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pytest
from nightstream.errors import WriterBusyError
from nightstream.runtime.settings import validate
from nightstream.store import lease
from nightstream.store.storage import Storage

NOW = datetime(2024, 5, 1, tzinfo=UTC)


def test_a_lease_is_refused_while_held_and_taken_over_when_it_ran_out(storage):
    assert lease.take(storage, "a", "stream", NOW, 60, 1) is None
    assert lease.take(storage, "b", "nightly", NOW + timedelta(seconds=30), 60, 1) == "stream (a)"
    assert lease.take(storage, "a", "stream", NOW + timedelta(seconds=40), 60, 1) is None
    assert lease.take(storage, "b", "nightly", NOW + timedelta(seconds=90), 60, 1) == "stream (a)"
    assert lease.take(storage, "b", "nightly", NOW + timedelta(seconds=101), 60, 1) is None
    assert lease.take(storage, "a", "stream", NOW + timedelta(seconds=102), 60, 1) == "nightly (b)"


def test_it_is_given_back_at_the_end_and_busy_in_between(storage):
    other = lease.Lease(storage, "b", "nightly", 60, 3, wait=False)
    with (
        lease.Lease(storage, "a", "stream", 60, 3, wait=False),
        pytest.raises(WriterBusyError, match=r"written by stream \(a\)"),
    ):
        other.__enter__()
    with other:
        pass


def test_the_next_process_of_a_holder_has_it_at_once_and_the_one_before_loses_it(storage):
    first = lease.Lease(storage, "a", "stream", 60, 3, wait=False)
    second = lease.Lease(storage, "a", "stream", 60, 3, wait=False)
    assert (first._take(), second._take()) == (None, None)
    assert first._take(renew=True) == "stream (a)"
    assert second._take(renew=True) is None


def test_one_that_ran_out_is_not_written_under(storage):
    with lease.Lease(storage, "a", "stream", 60, 3, wait=False) as held:
        held.check()
        held._until -= timedelta(seconds=61)
        # A renewal that comes too late does not mend it.
        assert held._take(renew=True) is None
        with pytest.raises(WriterBusyError, match="ran out while this process stood still"):
            held.check()


def test_a_holder_that_lost_it_may_not_write_on(storage):
    held = lease.Lease(storage, "a", "stream", 5, 3, wait=False).__enter__()
    held.check()
    held.confirm()
    later = datetime.now(UTC) + timedelta(seconds=30)
    assert lease.take(storage, "b", "nightly", later, 60, 3) is None
    deadline = time.monotonic() + 20
    while held.lost_to is None and time.monotonic() < deadline:
        time.sleep(0.2)
    for refused in (held.check, held.confirm, lambda: held.__exit__(None, None, None)):
        with pytest.raises(WriterBusyError, match=r"taken over by nightly \(b\)"):
            refused()
    # What went wrong before is what is told.
    held.__exit__(RuntimeError, None, None)


@pytest.mark.parametrize("by_spark", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_its_renewal_does_not_wait_for_the_tasks_of_a_night(spark, settings, by_spark, monkeypatch):
    """A hundred tasks that sleep on two slots hold up everything behind them for longer than the lease lasts."""
    document = settings.model_dump(mode="json")
    if by_spark:
        spark.sql("CREATE DATABASE night_catalog")
        document["storage"] |= {"kind": "catalog", "root": "night_catalog"}
    storage = Storage(spark, validate(document).storage)
    taken, ended, real = [], [], lease.Lease._take

    def noted(self: lease.Lease, renew: bool = False) -> str | None:
        other = real(self, renew)
        taken.append(time.monotonic())
        return other

    # Not a function of this module, which Spark's workers cannot import.
    def slept(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        time.sleep(0.5 if by_spark else 0.25)
        yield from batches

    def night() -> None:
        assert spark.range(0, 100, 1, 100).mapInArrow(slept, "id long").count() == 100
        ended.append(time.monotonic())

    monkeypatch.setattr(lease.Lease, "_take", noted)
    try:
        with lease.Lease(storage, "a", "nightly", 5, 3, wait=False) as held:
            tasks = threading.Thread(target=night)
            tasks.start()
            tasks.join()
            # By Spark a renewal is a MERGE, which on a slow machine takes longer than such a short lease.
            if not by_spark:
                held.check()
    finally:
        if by_spark:
            spark.sql("DROP DATABASE night_catalog CASCADE")
    renewals = [moment for moment in taken[1:] if moment < ended[0]]
    assert len(renewals) >= (1 if by_spark else 3)
