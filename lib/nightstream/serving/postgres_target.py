"""A key-value copy in PostgreSQL."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from nightstream.errors import MachineError, SettingsError, TableError
from nightstream.serving.key_value import (
    ANSWER_SECONDS,
    COLUMNS,
    CONNECT_SECONDS,
    Record,
    Unreachable,
    Written,
    client_module,
    first_line,
)

log = logging.getLogger(__name__)


class PostgresTarget:
    """A table with one row per user, made where it is missing; the row of the empty user id holds the position, so who
    empties the table has it filled again.

    The items are of type json, which keeps them as they are, and not of jsonb, which refuses some characters.
    """

    def __init__(self, url: str, table: str) -> None:
        self.connections = 0
        self._table = table.split(".")
        self._psycopg = client_module("psycopg", "PostgreSQL")
        try:
            given = importlib.import_module("psycopg.conninfo").conninfo_to_dict(url)
        except self._psycopg.ProgrammingError:
            # Its text may hold a part of the password.
            raise SettingsError(
                ["sync.url cannot be read; write postgresql://user:${env:NAME}@host:5432/database"]
            ) from None
        # A server that vanished without a word is given up after a while.
        defaults = {
            "connect_timeout": CONNECT_SECONDS,
            "tcp_user_timeout": ANSWER_SECONDS * 1000,
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
                f"the table {'.'.join(self._table)} in {self.name} is another one ({first_line(error)}); "
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
            raise _Unfit(first_line(error)) from error
        # A table that was dropped is made anew; a standby takes no writes until it is promoted.
        except (
            self._psycopg.OperationalError,
            self._psycopg.InterfaceError,
            self._psycopg.InternalError,
            kinds.UndefinedTable,
        ) as error:
            raise Unreachable(f"{self.name} does not answer ({first_line(error)})") from error
        except self._psycopg.Error as error:
            raise MachineError(
                f"{self.name} refuses the table {'.'.join(self._table)} ({first_line(error)}); "
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
