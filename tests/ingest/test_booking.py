"""The order of the writes of a call, and who waits for them."""

from __future__ import annotations

import threading

import pytest
from nightstream.ingest import booking
from nightstream.ingest.booking import Append, Plan
from nightstream.store.materialize import Cut
from nightstream.store.tables import DUPLICATES, EVENTS, QUARANTINE, RAW_EVENTS


class Rows:
    """Rows that remember into how many files they go."""

    files = None

    def coalesce(self, files):
        self.files = files
        return self


class Tables:
    """Notes the writes in the order of their ends; those to `held` wait for `gate`, those to `broken` fail."""

    def __init__(self, held=None, broken=None):
        self.held, self.broken, self.gate, self.written = held, broken, threading.Event(), []

    def append(self, spec, rows):
        if spec is self.held:
            self.gate.wait(10)
        if spec is self.broken:
            raise OSError("no space left")
        self.written.append(spec.name)
        self.files = rows.rows.files


@pytest.fixture
def merges(monkeypatch):
    monkeypatch.setattr(booking, "supersede", lambda tables, rows, attempts: tables.written.append("MERGE"))


def appends(*specs, count=1):
    return [Append(spec, Cut(Rows(), {}), count) for spec in specs]


def test_a_batch_writes_raw_events_when_all_else_is_there(merges):
    tables = Tables()
    plan = Plan(appends(QUARANTINE, EVENTS, DUPLICATES), Rows(), appends(RAW_EVENTS), is_awaited=True)
    assert booking.execute(tables, plan, 1, few_files=True) == []
    assert set(tables.written[:3]) == {"quarantine", "events", "duplicates"}
    assert tables.written[3:] == ["MERGE", "raw_events"]


def test_what_was_not_written_holds_back_what_follows(merges):
    tables = Tables(broken=DUPLICATES)
    plan = Plan(appends(EVENTS, DUPLICATES), Rows(), appends(RAW_EVENTS), is_awaited=True)
    with pytest.raises(OSError, match="no space left"):
        booking.execute(tables, plan, 1, few_files=True)
    assert tables.written == ["events"]


def test_appends_that_nobody_awaits_run_on(merges):
    tables = Tables(held=EVENTS)
    plan = Plan(appends(EVENTS, RAW_EVENTS), None, [], is_awaited=False)
    running = booking.execute(tables, plan, 1, few_files=True)
    assert "events" not in tables.written
    tables.gate.set()
    for each in running:
        each.result(10)
    assert sorted(tables.written) == ["events", "raw_events"]


def test_no_rows_are_no_write_and_few_rows_few_files(merges):
    tables, many = Tables(), appends(EVENTS, count=1_200_000)
    plan = Plan([*appends(QUARANTINE, count=0), *many], None, appends(RAW_EVENTS, count=0), is_awaited=True)
    booking.execute(tables, plan, 1, few_files=True)
    assert tables.written == ["events"]
    assert tables.files == 3
    assert plan.added == {"quarantine": 0, "events": 1_200_000, "raw_events": 0}
