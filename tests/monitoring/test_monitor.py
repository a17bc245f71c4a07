"""The monitor, with a fake clock and made-up progress; test_serve.py has it beside a real stream."""

from __future__ import annotations

import logging
import types
import uuid
from datetime import UTC, datetime, timedelta

import pytest
from nightstream.monitoring import measurements, monitor
from nightstream.monitoring.batch_report import BatchReport
from nightstream.monitoring.measurements import Interval
from nightstream.monitoring.monitor import Monitor
from pyspark.sql.streaming.listener import StreamingQueryProgress

BEGUN = datetime(2026, 1, 1, tzinfo=UTC)
RUN = uuid.uuid4()


def report(number: int, **more) -> BatchReport:
    told = {
        "batch_id": number,
        "events": 8,
        "quarantined": 2,
        "duplicates": 0,
        "users": 5,
        "visible_seconds": 1.0 + number,
        "delay_seconds": 2.0 + number,
        "oldest_event_seconds": 90.0,
        "newest_event_seconds": 30.0,
        "last_arrival": BEGUN,
        "phases": {"record": 0.4, "refresh": 0.3, "commit": 0.2},
        "unmerged": number + 1,
        "model_version": "m1",
    }
    return BatchReport(**{**told, **more})


def progress(
    number: int, rows: int = 10, run: uuid.UUID = RUN, behind: int = 0, name: str = "q"
) -> StreamingQueryProgress:
    source = {
        "description": "KafkaV2[Subscribe[clicks]]",
        "startOffset": {"clicks": {"0": 0}},
        "endOffset": {"clicks": {"0": 100}},
        "latestOffset": {"clicks": {"0": 100 + behind}},
        "numInputRows": rows,
        "inputRowsPerSecond": 5.0,
        "processedRowsPerSecond": 8.0,
    }
    document = {
        "id": str(uuid.uuid4()),
        "runId": str(run),
        "name": name,
        "timestamp": "2026-01-01T00:00:00.000Z",
        "batchId": number,
        "batchDuration": 2000,
        "durationMs": {"addBatch": 1500, "walCommit": 100, "triggerExecution": 2000},
        "stateOperators": [],
        "sources": [source],
        "sink": {"description": "ForeachBatchSink", "numOutputRows": -1},
    }
    return StreamingQueryProgress.fromJson(document)


class Streams:
    """In place of Spark's: hands out progress to the listeners that were added."""

    def __init__(self) -> None:
        self.listeners: list = []

    def addListener(self, listener) -> None:
        self.listeners.append(listener)

    def removeListener(self, listener) -> None:
        self.listeners.remove(listener)

    def started(self, name="q", run=RUN) -> None:
        for each in self.listeners:
            each.onQueryStarted(types.SimpleNamespace(name=name, runId=run))

    def progressed(self, of) -> None:
        for each in self.listeners:
            each.onQueryProgress(types.SimpleNamespace(progress=of))

    def terminated(self, run=RUN) -> None:
        for each in self.listeners:
            each.onQueryTerminated(types.SimpleNamespace(runId=run))


@pytest.fixture
def watched(settings, monkeypatch, caplog):
    """A monitor and what it wrote: (values, model version, time, labels) per append; `now` is its clock."""
    caplog.set_level(logging.INFO, "nightstream.monitoring.monitor")
    made = types.SimpleNamespace(now=BEGUN, written=[], streams=Streams(), fails=0)
    storage = types.SimpleNamespace(conflicts=3, spark=types.SimpleNamespace(streams=made.streams))

    def write(_storage, *row):
        if made.fails:
            made.fails -= 1
            raise OSError("no space left")
        made.written.append(row)

    monkeypatch.setattr(measurements, "write", write)
    stream = settings.stream.model_copy(update={"format": "kafka", "path": "clicks"})
    made.storage, made.monitor = storage, Monitor(storage, stream, "q", lambda: made.now)
    made.lines = lambda message="micro-batch": [r for r in caplog.records if r.message == message]
    return made


def test_an_interval_becomes_one_row_per_measurement(watched):
    with watched.monitor as monitor:
        watched.streams.started()
        for number in range(3):
            monitor.on_batch(report(number))
            watched.streams.progressed(progress(number, behind=20 * number))
        monitor.on_merge(4.0, 3)
        watched.storage.conflicts += 2
        watched.now += timedelta(seconds=60)
        monitor.write()
        watched.streams.terminated()
    ((values, version, at, labels),) = watched.written
    assert (version, at, labels) == ("m1", BEGUN + timedelta(seconds=60), {"interval_s": "60"})
    expected = {
        "batches": 3,
        "input_rows": 30,
        "events": 24,
        "quarantined": 6,
        "duplicates": 0,
        "quarantined_share": 0.2,
        "users_refreshed": 15,
        "conflicts_retried": 2,
        "merges": 1,
        "merged_commits": 3,
        "busy_s": 6,
        "input_rows_per_s": 0.5,
        "processed_rows_per_s": 5,
        "unmerged_commits": 3,
        "backlog_offsets": 40,
    }
    distributions = {
        "visible": (2, 3, 3),
        "delay": (3, 4, 4),
        "oldest_event_delay": (90, 90, 90),
        "newest_event_delay": (30, 30, 30),
        "merge": (4, 4, 4),
        "phase_record": (0.4, 0.4, 0.4),
        "phase_refresh": (0.3, 0.3, 0.3),
        "phase_commit": (0.2, 0.2, 0.2),
        "phase_add_batch": (1.5, 1.5, 1.5),
        "phase_wal_commit": (0.1, 0.1, 0.1),
        "phase_trigger_execution": (2, 2, 2),
    }
    for name, three in distributions.items():
        expected |= {f"{name}_p{share}_s": value for share, value in zip((50, 95, 99), three, strict=True)}
    assert values == pytest.approx({f"stream_{name}": value for name, value in expected.items()})
    assert monitor.summary() == {n: v for n, v in values.items() if n.startswith(("stream_visible", "stream_delay"))}
    first = watched.lines()[0]
    assert (first.batch_id, first.input_rows, first.input_rows_per_second, first.phase_add_batch_s) == (0, 10, 5, 1.5)
    assert (first.users_refreshed, first.visible_s, first.backlog_offsets, first.model_version) == (5, 1, 0, "m1")
    assert len(watched.lines()) == 3


def test_nothing_is_written_while_the_stream_waits_and_the_rest_at_the_end(watched):
    with watched.monitor as monitor:
        watched.streams.started()
        watched.streams.progressed(progress(0, rows=0))
        monitor.write()
        assert watched.written == []
        monitor.on_batch(report(1))
        watched.streams.terminated()
    assert watched.streams.listeners == []
    # Spark's progress of the last micro-batch did not come any more.
    ((values, *_),) = watched.written
    assert (values["stream_batches"], values["stream_events"]) == (1, 8)
    assert "stream_input_rows" not in values
    assert len(watched.lines()) == 1


def test_a_stream_that_stands_still_is_behind(watched, settings, tmp_path):
    watched.monitor.stream = settings.stream
    folder = tmp_path / "stream"
    folder.mkdir()
    with watched.monitor as monitor:
        monitor.on_batch(report(0))
        of_folder = progress(0)
        of_folder.sources[0].update(endOffset='{"logOffset":0}', latestOffset="null")
        monitor.on_progress(of_folder)
        monitor.write()
        (folder / "arrived.jsonl").write_text("{}")
        monitor.write()
        (folder / "arrived.jsonl").unlink()
        monitor.write()
    assert [row[0]["stream_backlog_files"] for row in watched.written] == [0, 1]
    assert "stream_batches" not in watched.written[1][0]


def test_other_queries_of_the_session_do_not_count(watched):
    with watched.monitor:
        watched.streams.started()
        other = uuid.uuid4()
        watched.streams.started("another", other)
        watched.streams.progressed(progress(0, run=other, name="another"))
        watched.streams.terminated(other)
        assert not watched.monitor.listener.ended.is_set()
        watched.streams.terminated()
    assert watched.written == []


def test_a_monitor_that_comes_after_the_start_takes_progress_in(watched):
    with watched.monitor as monitor:
        monitor.on_batch(report(0))
        watched.streams.progressed(progress(0))
        assert [line.batch_id for line in watched.lines()] == [0]
        watched.streams.terminated()
    assert [row[0]["stream_batches"] for row in watched.written] == [1]


def test_a_failed_append_is_told_once_and_made_up_for(watched, caplog):
    watched.fails = 2
    with watched.monitor as monitor:
        for number in range(3):
            monitor.on_batch(report(number))
            monitor.on_progress(progress(number))
            watched.now += timedelta(seconds=60)
            monitor.write()
    assert [row[0]["stream_batches"] for row in watched.written] == [1, 1, 1]
    assert [row[2] for row in watched.written] == [BEGUN + timedelta(minutes=n) for n in (1, 2, 3)]
    assert [r.failed for r in caplog.records if r.levelno == logging.WARNING] == ["writing to metrics"]


def test_whatever_breaks_in_it_stays_in_it(watched, caplog):
    with watched.monitor as monitor:
        watched.streams.started()
        monitor.on_batch(None)
        monitor.on_batch(None)
        watched.streams.progressed(types.SimpleNamespace(runId=RUN, name="q"))
        watched.streams.terminated()
    failed = [r.failed for r in caplog.records if r.levelno == logging.WARNING]
    assert failed == ["taking in a micro-batch", "taking in Spark's progress"]
    assert all(r.exc_info for r in caplog.records if r.levelno == logging.WARNING)


def test_memory_is_bounded(watched, monkeypatch):
    monkeypatch.setattr(monitor, "MOST_WAITING", 2)
    for number in range(5):
        watched.monitor.on_batch(report(number))
    assert [line.batch_id for line in watched.lines()] == [0, 1, 2]
    interval = Interval(BEGUN)
    for number in range(measurements.MOST_VALUES + 10):
        interval.add(seconds={"visible": float(number)})
    assert len(interval.seconds["visible"]) == measurements.MOST_VALUES
    assert min(interval.seconds["visible"]) == 10
