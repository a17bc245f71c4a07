from __future__ import annotations

from contextlib import nullcontext

from nightstream.monitoring.batch_report import BatchReport
from nightstream.runtime import console
from nightstream.steps.demo_feed import LiveLine


class Beats:
    """A heartbeat that beats when it is told to."""

    def during(self, state):
        self.state = state
        return nullcontext()


def batch(number: int, events: int, delay_s: float | None) -> BatchReport:
    return BatchReport(number, events, 1, 2, 5, 0.5, delay_s, None, None, None, {}, 0, "v1")


def test_the_line_tells_the_stream_so_far(monkeypatch):
    beats = Beats()
    monkeypatch.setattr(console, "heartbeat", beats)
    with LiveLine(1_000) as line:
        assert beats.state() == "stream: waiting for the first micro-batch"
        line.update(batch(0, 17, 1.25))
        line.update(batch(1, 7, None))
        assert beats.state() == "stream: 30/1,000 events in, 10 users refreshed, micro-batch 2, delay 1.2 s"
    assert line.delays == [1.25]
