"""What one micro-batch did, and what its time went to."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True)
class BatchReport:
    """What one micro-batch did.

    visible_seconds: from its start to its commit; delay_seconds: from the arrival of its oldest event to its commit.
    oldest_event_seconds, newest_event_seconds: from the time of its oldest and its newest event to its commit.
    last_arrival: when its newest row arrived. None where no row tells that time.
    phases: seconds by what they were spent on; record: the arriving rows are cut off and booked; refresh; write: what
    is left to wait for of the appends of the booking; commit: the append to `refreshes`; queue: waiting until the
    MERGEs have room for it. unmerged: commits that the serving tables lack, this one included.
    """

    batch_id: int
    events: int
    quarantined: int
    duplicates: int
    users: int
    visible_seconds: float
    delay_seconds: float | None
    oldest_event_seconds: float | None
    newest_event_seconds: float | None
    last_arrival: datetime | None
    phases: dict[str, float]
    unmerged: int
    model_version: str


class Laps:
    """Seconds by phase, one after the other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.monotonic()

    def end(self, phase: str) -> None:
        now = time.monotonic()
        self.seconds[phase], self._since = now - self._since, now
