"""A key-value copy of the newest lists: a service reads one user's list with one lookup.

Rows of REFRESHES become records, and a target (PostgreSQL or Redis) takes them. A record replaces only one of a lower
revision, so records may come in any order and any number of times. How far the copy has come is kept in the target too:
a server that comes back with older data, or with none, says so itself.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from statistics import median
from typing import Any, NamedTuple, Protocol, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from nightstream.errors import MachineError, NightstreamError

log = logging.getLogger(__name__)
Result = TypeVar("Result")

COLUMNS = ("user_id", "revision", "model_version", "as_of", "refreshed_at", "items")
# Users whose revision is remembered while a table is read; the rows of others go to the target, which knows.
MOST_KNOWN = 500_000
MOST_DELAYS = 5_000
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 5.0
CONNECT_SECONDS, ANSWER_SECONDS = 5, 30
_TIME = pa.timestamp("us", tz="UTC")


@dataclass(frozen=True, slots=True)
class Record:
    """One user's list. items: a JSON array of the entries with all their fields, by rank. Times in UTC."""

    user_id: str
    revision: int
    model_version: str | None
    as_of: datetime | None
    refreshed_at: datetime | None
    items: str


@dataclass(frozen=True)
class Position:
    """How far a copy has come: to commit or micro-batch `at` of the reader, of the Delta table with that id."""

    table: str
    reader: str
    at: int

    def text(self) -> str:
        """As a target keeps it; equal positions have equal texts."""
        return json.dumps([self.table, self.reader, self.at])

    @classmethod
    def of(cls, text: str) -> Position | None:
        """The position of a text; None where it is no position."""
        try:
            table, reader, at = json.loads(text)
        except (TypeError, ValueError):
            return None
        return cls(str(table), str(reader), at) if isinstance(at, int) else None


class Written(NamedTuple):
    """users: whose record was replaced or is new. refused: how many records the target cannot hold."""

    users: frozenset[str]
    refused: int = 0

    def and_of(self, other: Written) -> Written:
        return Written(self.users | other.users, self.refused + other.refused)


class Unreachable(Exception):
    """The server does not answer, or not for now; the text is a clause that names it and says why."""


class Stopped(Exception):
    """The process was asked to end."""


class Target(Protocol):
    """A store with one record per user, on a server.

    name: what messages call it. connections: how often a connection was made. A server may have lost what was written
    over an earlier one. Every method but close raises Unreachable, or NightstreamError for what a person must mend.
    """

    @property
    def name(self) -> str: ...

    @property
    def connections(self) -> int: ...

    def connect(self) -> None:
        """Connect anew, and make what is missing."""

    def write(self, records: Sequence[Record]) -> Written:
        """Keep each record whose revision is higher than that of its user's. records: one per user."""

    def position(self) -> str | None:
        """What `move` has kept last; None where nothing was."""

    def move(self, before: str | None, after: str) -> bool:
        """Keep a new position, if `before` is the present one; returns whether it was."""

    def close(self) -> None: ...


def newer(batch: pa.RecordBatch, known: dict[str, int]) -> pa.RecordBatch:
    """The rows with a higher revision than is known of their user, the highest of each user alone.

    batch: user_id, revision and any other columns. known: user -> revision; it learns, up to MOST_KNOWN users.
    """
    revisions = batch.column("revision").to_pylist()
    places: dict[str, int] = {}
    for place, (user, revision) in enumerate(zip(batch.column("user_id").to_pylist(), revisions, strict=True)):
        there = revisions[places[user]] if user in places else known.get(user)
        if there is None or revision > there:
            places[user] = place
    for user, place in places.items():
        if user in known or len(known) < MOST_KNOWN:
            known[user] = revisions[place]
    return batch.take(pa.array(sorted(places.values()), pa.int64()))


def records(batch: pa.RecordBatch) -> list[Record]:
    """A record of each row. batch: COLUMNS of REFRESHES, times in any unit."""
    names = ("user_id", "revision", "model_version")
    plain = [batch.column(name).to_pylist() for name in names]
    times = [_utc(batch.column(name)).to_pylist() for name in ("as_of", "refreshed_at")]
    return [Record(*values) for values in zip(*plain, *times, _lists(batch.column("items")), strict=True)]


@dataclass
class Tally:
    """What was read and written. since: delays count for rows that were refreshed from then on.

    delays: seconds from refreshed_at to the answer of the target, the newest MOST_DELAYS.
    """

    since: datetime
    rows: int = 0
    written: int = 0
    refused: int = 0
    slowest: float | None = None
    delays: deque[float] = field(default_factory=lambda: deque(maxlen=MOST_DELAYS))

    def count(self, taken: Sequence[Record], written: Written, at: datetime) -> None:
        """Count what a target answered at that time."""
        self.written += len(written.users)
        self.refused += written.refused
        refreshed = [r.refreshed_at for r in taken if r.user_id in written.users]
        self.add_delays([(at - time).total_seconds() for time in refreshed if time is not None and time >= self.since])

    def add_delays(self, delays: Sequence[float], slowest: float | None = None) -> None:
        """slowest: among more delays than those given."""
        self.delays.extend(delays)
        self.slowest = max((d for d in (*delays, slowest, self.slowest) if d is not None), default=None)

    def add(self, other: Tally) -> None:
        self.rows += other.rows
        self.written += other.written
        self.refused += other.refused
        self.add_delays(other.delays, other.slowest)

    def summary(self) -> dict[str, Any]:
        """rows read, written and refused, and the delays in seconds, None where there are none."""
        half = median(self.delays) if self.delays else None
        figures = {"rows": self.rows, "written": self.written, "refused": self.refused}
        return {**figures, "delay_p50_s": half, "delay_max_s": self.slowest}


def write(
    batches: Iterable[pa.RecordBatch],
    target: Target,
    at_once: int,
    since: datetime,
    clock: Callable[[], datetime],
) -> Tally:
    """Write the newest rows of each user to a target, in bounded memory; doing it again changes nothing.

    Args:
        batches: COLUMNS of REFRESHES, in any order, best the newest first: then each user is sent once.
        target: where they go.
        at_once: rows that are sent together.
        since: see Tally.
        clock: the time now, in UTC.

    Returns:
        What was read and written.

    Raises:
        Unreachable, NightstreamError: of the target.
    """
    tally, known = Tally(since), dict[str, int]()
    pending: dict[str, Record] = {}

    def send() -> None:
        taken = list(pending.values())
        tally.count(taken, target.write(taken), clock())
        pending.clear()

    for batch in batches:
        tally.rows += batch.num_rows
        for start in range(0, batch.num_rows, at_once):
            for record in records(newer(batch.slice(start, at_once), known)):
                there = pending.get(record.user_id)
                if there is None or record.revision > there.revision:
                    pending[record.user_id] = record
            if len(pending) >= at_once:
                send()
    if pending:
        send()
    return tally


class Patient:
    """A target that waits for its server and asks again, with growing pauses.

    Args:
        target: the target itself; it is connected at the first use.
        seconds: how long a server that does not answer is waited for.
        stop: asked while it waits; Stopped is raised then.
    """

    def __init__(self, target: Target, seconds: float, stop: Callable[[], bool] = lambda: False) -> None:
        self.name, self._target, self._seconds, self._stop = target.name, target, seconds, stop
        self._is_connected = False

    @property
    def connections(self) -> int:
        return self._target.connections

    def connect(self) -> None:
        """Connect, without patience: what does not answer at the start was named wrongly. Raises MachineError."""
        try:
            self._target.connect()
        except Unreachable as error:
            raise MachineError(f"{error}; start the server or check sync.url") from error
        self._is_connected = True

    def write(self, records: Sequence[Record]) -> Written:
        return self._ask(lambda: self._target.write(records))

    def position(self) -> str | None:
        return self._ask(self._target.position)

    def move(self, before: str | None, after: str) -> bool:
        return self._ask(lambda: self._target.move(before, after))

    def close(self) -> None:
        self._target.close()

    def _ask(self, action: Callable[[], Result]) -> Result:
        begun, pause = 0.0, FIRST_PAUSE_SECONDS
        while True:
            try:
                if not self._is_connected:
                    self._target.connect()
                    self._is_connected = True
                answer = action()
            except Unreachable as error:
                self._is_connected = False
                begun = begun or time.monotonic()
                waited = time.monotonic() - begun
                if waited + pause > self._seconds:
                    raise MachineError(
                        f"{error}, {waited:.0f} s long (sync.retry_seconds: {self._seconds:g}); mend the server and "
                        "start this command again, it goes on where it was"
                    ) from error
                log.warning("waiting for the server: %s", error, extra={"again_in_s": pause})
                sleep(pause, self._stop)
                if self._stop():
                    raise Stopped from error
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            else:
                if begun:
                    log.info("the server answers again", extra={"after_s": time.monotonic() - begun})
                return answer


def sleep(seconds: float, stop: Callable[[], bool]) -> None:
    """Sleep, at most a tenth of a second longer than until `stop` says so."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and not stop():
        time.sleep(min(left, 0.1))


def position_in(target: Target, table: str) -> tuple[str | None, Position | None]:
    """The position of a target, as it is kept and as it reads. Raises NightstreamError for one of another table."""
    text = target.position()
    if text is None:
        return None, None
    position = Position.of(text)
    if position is None or position.table != table:
        raise NightstreamError(
            f"{target.name} holds the copy of other tables there, whose revisions say nothing about these; "
            "empty it, or name another sync.table or sync.prefix"
        )
    return text, position


def client_module(name: str, server: str) -> Any:
    """The client of a server. Raises MachineError where Python lacks it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MachineError(
            f"to write to {server} Python needs the package {name}: pip install 'nightstream[sync]'"
        ) from error


def _utc(column: pa.Array) -> pa.Array:
    """Times in microseconds, UTC. Spark may write them without a zone, and means UTC."""
    if column.type.tz is None:
        column = pc.assume_timezone(column, "UTC")
    return column.cast(_TIME, safe=False)


def _lists(column: pa.ListArray) -> list[str]:
    """The JSON of each list; a missing one is empty."""
    entries = column.flatten()
    names = [entry.name for entry in entries.type]
    columns = [child.to_pylist() for child in entries.flatten()]
    rows = [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
    texts, start = [], 0
    for length in pc.fill_null(pc.list_value_length(column), 0).to_pylist():
        part = sorted(rows[start : start + length], key=lambda row: row["rank"])
        texts.append(_json(part))
        start += length
    return texts


def _json(part: list[dict[str, Any]]) -> str:
    try:
        return json.dumps(part, ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=str)
    except ValueError:
        # JSON knows no NaN and no infinity.
        finite = [{n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in e.items()} for e in part]
        return json.dumps(finite, ensure_ascii=False, separators=(",", ":"), default=str)


def first_line(error: Exception) -> str:
    """What a client says of an error, without the rest of it."""
    return str(error).strip().splitlines()[0].strip() if str(error).strip() else type(error).__name__
