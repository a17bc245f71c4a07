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
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from statistics import median
from typing import Any, Literal, NamedTuple, Protocol, TypeVar
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.compute as pc

from nightstream.errors import MachineError, NightstreamError, SettingsError, TableError

log = logging.getLogger(__name__)
Result = TypeVar("Result")
Kind = Literal["postgresql", "redis"]

COLUMNS = ("user_id", "revision", "model_version", "as_of", "refreshed_at", "items")
SCHEMES = {"postgresql": ("postgresql", "postgres"), "redis": ("redis", "rediss", "unix")}
# Users whose revision is remembered while a table is read; the rows of others go to the target, which knows.
MOST_KNOWN = 500_000
MOST_DELAYS = 5_000
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 5.0
_CONNECT_SECONDS, _ANSWER_SECONDS = 5, 30
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


def target_of(kind: Kind, url: str, table: str, prefix: str) -> Target:
    """The target, not connected yet.

    Args:
        kind: of the server.
        url: its address, with the password in it.
        table: name in PostgreSQL, with its schema or without.
        prefix: what stands before the user's id in a key of Redis.

    Returns:
        A target; it may be made anew in a process elsewhere from the same arguments.

    Raises:
        SettingsError: the address is none of such a server. It is not shown.
    """
    schemes = SCHEMES[kind]
    scheme, _, rest = url.partition("://")
    # The clients would take a part of such a password for a host or a port, and name it in their errors.
    if scheme not in schemes or rest.count("@") != re.split("[/?#]", rest)[0].count("@") or rest.count("@") > 1:
        example = "postgresql://user:${env:NAME}@host:5432/database"
        if kind == "redis":
            example = "redis://user:${env:NAME}@host:6379/0"
        raise SettingsError(
            [
                f"sync.url is no address for sync.target {kind}; write {example}, "
                "and what is neither letter nor digit in a password as %40, %2F, …"
            ]
        )
    return PostgresTarget(url, table) if kind == "postgresql" else RedisTarget(url, prefix)


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


class PostgresTarget:
    """A table with one row per user, made where it is missing; the row of the empty user id holds the position, so who
    empties the table has it filled again.

    The items are of type json, which keeps them as they are, and not of jsonb, which refuses some characters.
    """

    def __init__(self, url: str, table: str) -> None:
        self.connections = 0
        self._table = table.split(".")
        self._psycopg = _module("psycopg", "PostgreSQL")
        try:
            given = importlib.import_module("psycopg.conninfo").conninfo_to_dict(url)
        except self._psycopg.ProgrammingError:
            # Its text may hold a part of the password.
            raise SettingsError(
                ["sync.url cannot be read; write postgresql://user:${env:NAME}@host:5432/database"]
            ) from None
        # A server that vanished without a word is given up after a while.
        defaults = {
            "connect_timeout": _CONNECT_SECONDS,
            "tcp_user_timeout": _ANSWER_SECONDS * 1000,
            "application_name": "nightstream sync",
        }
        self._given = {**defaults, **given}
        place = f"{given.get('host', 'localhost')}:{given.get('port', 5432)}"
        self.name = f"PostgreSQL at {place}, database {given.get('dbname', given.get('user', ''))}"
        self._connection: Any = None

    def connect(self) -> None:
        self.close()
        with self._errors():
            # Statements are not prepared: poolers such as pgbouncer lose them.
            self._connection = self._psycopg.connect(autocommit=True, prepare_threshold=None, **self._given)
            self.connections += 1
            self._make()

    def write(self, records: Sequence[Record]) -> Written:
        # In one order, so that two processes never wait for each other.
        ordered = sorted(records, key=lambda record: record.user_id)
        columns = [[getattr(record, name) for record in ordered] for name in COLUMNS]
        try:
            with self._errors():
                return Written(frozenset(user for (user,) in self._rows(_UPSERT, columns)))
        except _Unfit as error:
            if len(ordered) == 1:
                log.warning("PostgreSQL cannot hold a user's row: %s", error, extra={"length": len(ordered[0].items)})
                return Written(frozenset(), 1)
            half = len(ordered) // 2
            return self.write(ordered[:half]).and_of(self.write(ordered[half:]))

    def position(self) -> str | None:
        with self._errors():
            rows = self._rows("SELECT items::text FROM {table} WHERE user_id = ''")
        return rows[0][0] if rows else None

    def move(self, before: str | None, after: str) -> bool:
        with self._errors():
            if before is None:
                return bool(self._rows(_FIRST_MOVE, [after]))
            return bool(self._rows(_MOVE_ON, [after, before]))

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _make(self) -> None:
        # Whoever may not create tables is still welcome to one that is there.
        if self._rows("SELECT to_regclass({text})")[0][0] is None:
            # Another process may be making it at the same moment.
            with suppress(self._psycopg.errors.UniqueViolation):
                self._run(f"CREATE TABLE IF NOT EXISTS {{table}} ({_TABLE})")
        try:
            self._run(f"SELECT {', '.join(COLUMNS)} FROM {{table}} LIMIT 0")
        except self._psycopg.errors.UndefinedColumn as error:
            raise TableError(
                f"the table {'.'.join(self._table)} in {self.name} is another one ({_first_line(error)}); "
                "drop it or name another in sync.table"
            ) from error

    def _run(self, statement: str, values: Sequence[Any] | None = None) -> Any:
        sql = self._psycopg.sql
        table = sql.Identifier(*self._table)
        text = sql.Literal(table.as_string())
        return self._connection.execute(sql.SQL(statement).format(table=table, text=text), values)

    def _rows(self, statement: str, values: Sequence[Any] | None = None) -> list[Any]:
        return self._run(statement, values).fetchall()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Errors of psycopg as those of a Target."""
        kinds = self._psycopg.errors
        try:
            yield
        except (self._psycopg.DataError, kinds.ProgramLimitExceeded) as error:
            raise _Unfit(_first_line(error)) from error
        # A table that was dropped is made anew; a standby takes no writes until it is promoted.
        except (
            self._psycopg.OperationalError,
            self._psycopg.InterfaceError,
            self._psycopg.InternalError,
            kinds.UndefinedTable,
        ) as error:
            raise Unreachable(f"{self.name} does not answer ({_first_line(error)})") from error
        except self._psycopg.Error as error:
            raise MachineError(
                f"{self.name} refuses the table {'.'.join(self._table)} ({_first_line(error)}); "
                "grant the user of sync.url what is missing, or name another in sync.table"
            ) from error


class _Unfit(Exception):
    """PostgreSQL cannot hold a value."""


_TABLE = (
    "user_id text PRIMARY KEY, revision bigint NOT NULL, model_version text, as_of timestamptz, "
    "refreshed_at timestamptz, items json NOT NULL"
)
# %b: psycopg writes an array of texts ten times as fast in binary.
_UPSERT = (
    "INSERT INTO {table} AS t (user_id, revision, model_version, as_of, refreshed_at, items) "
    "SELECT s.a, s.b, s.c, s.d, s.e, s.f::json FROM unnest("
    "%b::text[], %s::bigint[], %s::text[], %s::timestamptz[], %s::timestamptz[], %b::text[]) AS s(a, b, c, d, e, f) "
    "ON CONFLICT (user_id) DO UPDATE SET revision = excluded.revision, model_version = excluded.model_version, "
    "as_of = excluded.as_of, refreshed_at = excluded.refreshed_at, items = excluded.items "
    "WHERE excluded.revision > t.revision RETURNING t.user_id"
)
_FIRST_MOVE = (
    "INSERT INTO {table} (user_id, revision, items) VALUES ('', 0, %s) ON CONFLICT DO NOTHING RETURNING user_id"
)
_MOVE_ON = "UPDATE {table} SET items = %s WHERE user_id = '' AND items::text = %s RETURNING user_id"


class RedisTarget:
    """A hash with the fields of a record under <prefix><user_id>; the position is the string under the prefix alone,
    for no user's id is empty."""

    def __init__(self, url: str, prefix: str) -> None:
        self.connections = 0
        self._url, self._prefix = url, prefix
        self._redis = _module("redis", "Redis")
        try:
            parts = urlsplit(url)
            place = parts.path if parts.scheme == "unix" else f"{parts.hostname or 'localhost'}:{parts.port or 6379}"
        except ValueError:
            # Its text may hold a part of the password.
            raise SettingsError(["sync.url cannot be read; write redis://user:${env:NAME}@host:6379/0"]) from None
        self.name = f"Redis at {place}"
        self._client: Any = None

    def connect(self) -> None:
        self.close()

        def count(connection: Any) -> None:
            # The client also reconnects without a word.
            self.connections += 1
            connection.on_connect()

        retry = importlib.import_module("redis.retry").Retry(importlib.import_module("redis.backoff").NoBackoff(), 0)
        with self._errors():
            self._client = self._redis.Redis.from_url(
                self._url,
                decode_responses=True,
                protocol=2,
                redis_connect_func=count,
                retry=retry,
                socket_connect_timeout=_CONNECT_SECONDS,
                socket_timeout=_ANSWER_SECONDS,
                client_name="nightstream-sync",
            )
            self._write, self._move = (self._client.register_script(text) for text in (_WRITE, _MOVE))
            self._client.ping()

    def write(self, records: Sequence[Record]) -> Written:
        users, refused = set(), 0
        with self._errors():
            pipe = self._client.pipeline(transaction=False)
            for record in records:
                self._write(keys=[f"{self._prefix}{record.user_id}"], args=_fields(record), client=pipe)
            answers = pipe.execute(raise_on_error=False)
            for record, answer in zip(records, answers, strict=True):
                if isinstance(answer, Exception):
                    if not str(answer).startswith("WRONGTYPE"):
                        raise answer
                    refused += 1
                elif answer:
                    users.add(record.user_id)
        if refused:
            log.warning("other values have keys of ours: choose another sync.prefix", extra={"refused": refused})
        return Written(frozenset(users), refused)

    def position(self) -> str | None:
        with self._errors():
            return self._client.get(self._prefix)

    def move(self, before: str | None, after: str) -> bool:
        with self._errors():
            return bool(self._move(keys=[self._prefix], args=[before or "", after]))

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Errors of the client as those of a Target."""
        kinds = self._redis.exceptions
        try:
            yield
        except (kinds.NoPermissionError, kinds.MovedError) as error:
            raise MachineError(
                f"{self.name} refuses keys with the prefix {self._prefix} ({_first_line(error)}); name in sync.url a "
                "server that is no cluster, and a user who may read and write them and run scripts"
            ) from error
        except kinds.ResponseError as error:
            raise Unreachable(f"{self.name} refuses what it is asked ({_first_line(error)})") from error
        except kinds.RedisError as error:
            raise Unreachable(f"{self.name} does not answer ({_first_line(error)})") from error


# Revisions are compared as decimal digits: Lua's numbers are doubles.
_WRITE = """
local there, new = redis.call('HGET', KEYS[1], 'revision'), ARGV[1]
if there and (#new < #there or (#new == #there and new <= there)) then return 0 end
redis.call('HSET', KEYS[1], 'revision', new, 'model_version', ARGV[2], 'as_of', ARGV[3], 'refreshed_at', ARGV[4],
  'items', ARGV[5])
return 1
"""
_MOVE = """
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
return 1
"""


def _fields(record: Record) -> list[Any]:
    """The values that _WRITE takes; what is null is empty."""
    times = ("" if time is None else time.isoformat() for time in (record.as_of, record.refreshed_at))
    return [record.revision, record.model_version or "", *times, record.items]


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


def _module(name: str, server: str) -> Any:
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


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].strip() if str(error).strip() else type(error).__name__
