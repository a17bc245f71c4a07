"""A key-value copy in Redis."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from nightstream.errors import MachineError, SettingsError
from nightstream.serving.key_value import (
    ANSWER_SECONDS,
    CONNECT_SECONDS,
    Record,
    Unreachable,
    Written,
    client_module,
    first_line,
)

log = logging.getLogger(__name__)


class RedisTarget:
    """A hash with the fields of a record under <prefix><user_id>; the position is the string under the prefix alone,
    for no user's id is empty."""

    def __init__(self, url: str, prefix: str) -> None:
        self.connections = 0
        self._url, self._prefix = url, prefix
        self._redis = client_module("redis", "Redis")
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
                socket_connect_timeout=CONNECT_SECONDS,
                socket_timeout=ANSWER_SECONDS,
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
                f"{self.name} refuses keys with the prefix {self._prefix} ({first_line(error)}); name in sync.url a "
                "server that is no cluster, and a user who may read and write them and run scripts"
            ) from error
        except kinds.ResponseError as error:
            raise Unreachable(f"{self.name} refuses what it is asked ({first_line(error)})") from error
        except kinds.RedisError as error:
            raise Unreachable(f"{self.name} does not answer ({first_line(error)})") from error


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
