"""The streaming query itself: a real checkpoint, restarts, a deleted checkpoint, one writer at a time."""

from __future__ import annotations

import logging
import random
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime

import pytest
import world
from nightstream.errors import TableError, WriterBusyError
from nightstream.ingest.ledger import check
from nightstream.runtime.settings import validate
from nightstream.serving import commits, stream_state
from nightstream.steps import apply, ingest, serve
from nightstream.store import lease
from nightstream.store.storage import Storage
from nightstream.store.tables import METRICS, RAW_EVENTS, RECOMMENDATIONS, REFRESHES, USER_VECTORS
from pyspark.sql import functions as F


def arriving(number: int, seed: int = 7) -> list[dict]:
    rng = random.Random(seed)
    return [
        {
            "event_id": f"live{n}",
            "user_id": f"u{rng.randrange(48):03}",
            "item_id": f"i{rng.randrange(world.ITEMS):02}",
            "event_time": world.START + 10**6 + n,
        }
        for n in range(number)
    ]


def windows(storage):
    rows = storage.read(USER_VECTORS).collect()
    return {r.user_id: ([e.event_id for e in r.window], [round(x, 4) for x in r.vector]) for r in rows}


def assert_measured(storage, report, told, records):
    """What one micro-batch leaves in `metrics`, in the log and in what `run` returns."""
    measured = {r.name: r.value for r in storage.read(METRICS).where("name LIKE 'stream%'").collect()}
    assert (measured["stream_batches"], measured["stream_events"], measured["stream_input_rows"]) == (1, 20, 20)
    assert measured["stream_users_refreshed"] == report.users
    assert (measured["stream_quarantined_share"], measured["stream_conflicts_retried"]) == (0, 0)
    assert measured["stream_backlog_files"] == 0
    assert measured["stream_visible_p50_s"] == told["stream_visible_p50_s"] == report.visible_seconds
    assert measured["stream_merge_p50_s"] > 0
    assert measured["stream_merged_commits"] == 1
    ours = sum(measured[f"stream_phase_{name}_p50_s"] for name in ("record", "refresh", "write", "commit", "queue"))
    assert 0 < ours < measured["stream_phase_add_batch_p50_s"] < measured["stream_phase_trigger_execution_p50_s"]
    assert measured["stream_newest_event_delay_p50_s"] == pytest.approx(
        measured["stream_oldest_event_delay_p50_s"] - 19
    )
    (arrived,) = {r.arrival_time for r in storage.read(RAW_EVENTS).where("payload LIKE '%live%'").collect()}
    (begun,) = {r.refreshed_at for r in storage.read(REFRESHES).where("writer LIKE 'stream%'").collect()}
    # Visible is what is committed: the delay counts the commit itself.
    assert report.delay_seconds > (begun - arrived).total_seconds() + 0.99 * report.phases["commit"]
    (line,) = [r for r in records if r.message == "micro-batch"]
    assert (line.batch_id, line.events, line.users_refreshed) == (0, 20, report.users)
    assert line.phase_wal_commit_s > 0
    assert [r.stream_events for r in records if r.message == "stream measured"] == [20]


def test_a_restart_goes_on_and_a_deleted_checkpoint_changes_nothing(spark, night, monkeypatch, caplog):
    storage, settings = night("serve")
    caplog.set_level(logging.INFO, "nightstream.monitoring.monitor")
    before = check(storage)["events"]
    rows = arriving(40)
    world.drop(settings.stream.path, "a", rows[:20])
    reports = []
    told = serve.run(spark, settings, until_idle=True, on_batch=reports.append)
    assert (told["events"], told["batches"]) == (20, 1)
    assert reports[0].delay_seconds > 0
    assert_measured(storage, reports[0], told, caplog.records)
    world.drop(settings.stream.path, "b", [*rows[20:], "garbage"])
    append = Storage.append

    def refused(self, spec, rows):
        if spec is METRICS:
            raise OSError("no space left for metrics")
        append(self, spec, rows)

    with monkeypatch.context() as patched:
        patched.setattr(Storage, "append", refused)
        assert serve.run(spark, settings, until_idle=True)["events"] == 20
    complaints = [
        r for r in caplog.records if r.name == "nightstream.monitoring.monitor" and r.levelno == logging.WARNING
    ]
    assert [r.failed for r in complaints] == ["writing to metrics"]
    counts = check(storage)
    assert counts == {"raw_events": before + 41, "events": before + 40, "quarantine": 1, "duplicates": 0}
    after = windows(storage)
    newest = {r["user_id"]: r["event_id"] for r in rows}
    assert {user: after[user][0][-1] for user in newest} == newest
    shutil.rmtree(settings.stream.checkpoint)
    serve.run(spark, settings, until_idle=True)
    assert check(storage) == counts
    assert windows(storage) == after
    writers = {r.writer for r in storage.read(REFRESHES).where("writer LIKE 'stream%'").collect()}
    assert len(writers) == 2


@pytest.mark.slow
def test_nobody_writes_beside_another(spark, night):
    """A stream does not start while the night writes, and beside a stream the night leaves recording to it."""
    storage, settings = night("busy")
    document = settings.model_dump(mode="json")
    document["serving"]["lease_seconds"] = 5
    quick = validate(document)
    before = check(storage)
    with lease.Lease(storage, "somebody", "stream", 60, 3, wait=False):
        with pytest.raises(WriterBusyError, match=r"being written by stream \(somebody\)"):
            serve.run(spark, quick, until_idle=True)
        with pytest.raises(WriterBusyError, match=r"being written by stream \(somebody\)"):
            ingest.run(spark, quick)
        assert "stream (somebody)" in ingest.run(spark, quick, beside_stream=True)["left_to"]
        assert apply.run(spark, quick, datetime(2024, 1, 2, tzinfo=UTC))["users"] == 0
    assert check(storage) == before
    assert ingest.run(spark, quick)["events"] == before


def test_without_a_model_it_says_what_to_run(spark, settings):
    with pytest.raises(TableError, match="no model has been published yet; run the nightly job first"):
        serve.run(spark, settings, until_idle=True)


@pytest.mark.slow
def test_the_clock_of_a_commit_is_the_wall_clock(spark, night):
    storage, settings = night("clock")
    begun = datetime.now(UTC)
    world.drop(settings.stream.path, "a", arriving(3))
    serve.run(spark, settings, until_idle=True)
    mine = storage.read(REFRESHES).where("writer LIKE 'stream%'").collect()
    assert mine
    assert all(begun <= r.refreshed_at.replace(tzinfo=UTC) <= datetime.now(UTC) for r in mine)


def test_storage_is_found_by_a_relative_path(spark, settings, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    relative = Storage(spark, settings.storage.model_copy(update={"root": "tables"}))
    relative.create(RECOMMENDATIONS)
    assert (tmp_path / "tables" / "recommendations" / "_delta_log").is_dir()


@contextmanager
def running(spark, settings) -> Iterator[Future]:
    """The query without an end; stopped on leaving."""
    started, stop = threading.Event(), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        query = pool.submit(serve.run, spark, settings, on_start=started.set, stop=stop.is_set)
        try:
            assert started.wait(60) or query.result()
            yield query
        finally:
            stop.set()


@pytest.mark.slow
def test_without_events_too_withdrawn_items_leave_every_list(spark, night, tmp_path, monkeypatch):
    storage, settings = night("quiet")
    monkeypatch.setattr(stream_state, "QUIET_SECONDS", 0.5)
    document = settings.model_dump(mode="json")
    document["sources"]["items"] |= {"path": str(tmp_path / "items.jsonl"), "available": "stock"}
    document["stream"] |= {"snapshot_seconds": 1.0, "handover_slice": 10}
    before = windows(storage)
    kept = {f"i{n:02}" for n in range(10, 20)}

    def holders() -> int:
        rows = storage.read(RECOMMENDATIONS).where(~F.col("item_id").isin(kept))
        return rows.select("user_id").distinct().count()

    world.write_lines(
        tmp_path / "items.jsonl", [{**i, "stock": "yes" if i["item_id"] in kept else "no"} for i in world.items()]
    )
    assert holders() > 10
    with running(spark, validate(document)) as query:
        deadline = time.monotonic() + 90
        while holders() and time.monotonic() < deadline and not query.done():
            time.sleep(1)
    assert query.result()["batches"] == 0
    assert holders() == 0
    assert windows(storage) == before
    commits = storage.read(REFRESHES).where("writer LIKE '%between micro-batches'")
    assert commits.select("batch_id").distinct().count() > 1
    assert commits.groupBy("user_id").count().where("count > 1").isEmpty()


@pytest.mark.slow
def test_what_cannot_be_merged_ends_the_stream_also_when_no_event_follows(spark, night, monkeypatch):
    storage, settings = night("unmerged")
    merge = commits.merge

    def full(*args) -> None:
        raise OSError("no space left for the serving tables")

    with running(spark, settings) as query:
        monkeypatch.setattr(commits, "merge", full)
        world.drop(settings.stream.path, "a", arriving(3))
        with pytest.raises(OSError, match="no space left"):
            query.result(timeout=90)
    monkeypatch.setattr(commits, "merge", merge)
    serve.run(spark, settings, until_idle=True)
    newest = {r["user_id"]: r["event_id"] for r in arriving(3)}
    found = windows(storage)
    assert {user: found[user][0][-1] for user in newest} == newest
