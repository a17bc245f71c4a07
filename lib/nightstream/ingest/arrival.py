"""The payload rows of one call, as they arrived: how many are what, and when they came."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property

import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from nightstream.store.materialize import Cut

# Up to so many rows of a batch, their ids (some 50 bytes each) go to every task instead of shuffling `events`.
_BROADCAST_ROWS = 200_000
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def totals(retraction_type: str) -> dict[str, Column]:
    """What `Arrival.of` must know of all rows, as aggregates over them."""
    return {
        "raw": F.count(F.lit(1)),
        "quarantine": F.count("reason"),
        "retractions": F.count_if(F.col("event_type") == retraction_type),
        "first_arrival": F.min(F.unix_micros("arrival_time")),
        "last_arrival": F.max(F.unix_micros("arrival_time")),
        "oldest_event": F.min(F.unix_micros("event_time")),
        "newest_event": F.max(F.unix_micros("event_time")),
    }


def totals_of(rows: pa.Table, retraction_type: str) -> dict[str, int | None]:
    """The `totals` of rows on the driver; a test compares the two."""
    arrival, event = (pc.min_max(rows[name].cast(pa.int64())) for name in ("arrival_time", "event_time"))
    return {
        "raw": rows.num_rows,
        "quarantine": rows.num_rows - rows["reason"].null_count,
        "retractions": pc.sum(pc.equal(rows["event_type"], retraction_type)).as_py() or 0,
        "first_arrival": arrival["min"].as_py(),
        "last_arrival": arrival["max"].as_py(),
        "oldest_event": event["min"].as_py(),
        "newest_event": event["max"].as_py(),
    }


@dataclass(frozen=True)
class Arrival:
    """Rows of parse.parse with their raw_id, cut off.

    all: the rows.
    raw, quarantine, retractions: how many rows, rejected ones, and retractions.
    arrival_span: microseconds since the epoch of the first and the last arrival; None where no row tells.
    first_arrival, last_arrival, oldest_event, newest_event: UTC; None where no row has such a time.
    """

    all: Cut
    raw: int
    quarantine: int
    retractions: int
    arrival_span: tuple[int, int] | None
    first_arrival: datetime | None
    last_arrival: datetime | None
    oldest_event: datetime | None
    newest_event: datetime | None

    @classmethod
    def of(cls, cut: Cut) -> Arrival:
        """cut: with the `totals`."""
        totals = cut.totals
        first, last = totals["first_arrival"], totals["last_arrival"]
        times = (_time(totals[n]) for n in ("first_arrival", "last_arrival", "oldest_event", "newest_event"))
        span = None if first is None else (first, last)
        return cls(cut, totals["raw"], totals["quarantine"], totals["retractions"], span, *times)

    @property
    def valid_count(self) -> int:
        """How many rows tell a valid event."""
        return self.raw - self.quarantine

    @cached_property
    def rejected(self) -> Cut:
        return self.all.where_not_null("reason")

    @cached_property
    def valid(self) -> Cut:
        return self.all.where_null("reason")

    @property
    def is_small(self) -> bool:
        return self.raw <= _BROADCAST_ROWS

    def broadcast(self, rows: DataFrame) -> DataFrame:
        """The rows, of which there are about as many as arrived; with a hint to broadcast them where those are few."""
        return F.broadcast(rows) if self.is_small else rows


def _time(micros: int | None) -> datetime | None:
    return None if micros is None else EPOCH + timedelta(microseconds=micros)
