"""One writer at a time, of the serving tables and of what ingest records: a lease in a Delta row, renewed regularly.

Whoever changes the row must have seen its newest version, so of two processes that take a free lease at once one fails.
A process that dies keeps the lease for `serving.lease_seconds`, no longer; started again under the same holder name it
has it at once. What a process still writes that has lost the lease, the fence keeps out.
"""

from __future__ import annotations

import logging
import os
import random
import socket
import threading
import time
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

from nightstream.errors import WriterBusyError
from nightstream.runtime.session import first_in_line
from nightstream.store.fence import Fence
from nightstream.store.merge import Merge, When
from nightstream.store.storage import Storage
from nightstream.store.tables import FENCED, WRITER_LEASE, arrow_table

log = logging.getLogger(__name__)

SERVING = "serving"
POLL_SECONDS = 2.0


def this_process() -> str:
    """A holder that no other process is."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def take(
    storage: Storage,
    holder: str,
    kind: str,
    now: datetime,
    seconds: float,
    attempts: int,
    token: str = "",
    renew: bool = False,
) -> str | None:
    """Take the lease until now + seconds, or with `renew` keep it.

    Args:
        storage: holds WRITER_LEASE, or will.
        holder: who takes it.
        kind: what the holder does, for messages.
        now: the wall clock, UTC.
        seconds: how long it lasts.
        attempts: how often it is tried where another process changes the row at the same time.
        token: of the process. A holder's next process has the lease at once, and the one before cannot renew it any
            more.
        renew: whether this very process must have it.

    Returns:
        None on success, else who holds it.
    """
    storage.create(WRITER_LEASE)
    row = (SERVING, holder, kind, token, now + timedelta(seconds=seconds))
    change = _swapped if storage.local is not None else _merged
    return change(storage, row, now, attempts, renew)


def _swapped(storage: Storage, row: tuple[Any, ...], now: datetime, attempts: int, renew: bool) -> str | None:
    """By delta-rs, whoever writes the other tables: it takes milliseconds, whatever Spark is busy with."""
    assert storage.local is not None
    for attempt in range(attempts):
        version = storage.local.version(WRITER_LEASE)
        held = _held(storage)
        if held is not None and not _may_take(held, row, now, renew):
            return _named(held)
        if storage.local.swap(WRITER_LEASE, arrow_table(WRITER_LEASE.schema, [row]), version):
            return None
        time.sleep(random.uniform(0.01, 0.05) * attempt)
    raise WriterBusyError("the lease of the tables is being taken by many processes at once; try again")


def _may_take(held: dict[str, Any], row: tuple[Any, ...], now: datetime, renew: bool) -> bool:
    _, holder, _, token, _ = row
    if renew:
        return (held["holder"], held["token"]) == (holder, token)
    return held["holder"] == holder or held["expires_at"] < now


def _merged(storage: Storage, row: tuple[Any, ...], now: datetime, attempts: int, renew: bool) -> str | None:
    """By Spark, where the tables lie elsewhere."""
    _, holder, _, token, _ = row
    source = storage.spark.createDataFrame([row], WRITER_LEASE.schema)
    mine = "t.holder = s.holder AND t.token = s.token"
    mine_or_free = mine if renew else f"t.holder = s.holder OR t.expires_at < timestamp'{now.isoformat()}'"
    change = Merge("t.name = s.name", (When("update", mine_or_free), When("insert")))
    storage.with_retries(lambda: storage.merge(WRITER_LEASE, source, change), attempts, WRITER_LEASE.name)
    held = _held(storage)
    return None if held is None or (held["holder"], held["token"]) == (holder, token) else _named(held)


def _named(held: dict[str, Any]) -> str:
    return f"{held['kind']} ({held['holder']})"


def _held(storage: Storage) -> dict[str, Any] | None:
    """The row of the lease; None where nobody has taken it yet."""
    rows = storage.query("SELECT * FROM {writer_lease} WHERE name = :name", WRITER_LEASE, name=SERVING).to_pylist()
    return rows[0] if rows else None


def epoch_of(storage: Storage, token: str) -> int | None:
    """The epoch of the lease that the process of this token has; None where it has none any more.

    It is a version of WRITER_LEASE in which the row is the process's: who takes the lease later commits after it.
    """
    version, held = storage.version(WRITER_LEASE), _held(storage)
    return version if held is not None and held["token"] == token else None


class Lease:
    """The lease, held and renewed in the background inside a `with` block; the storage writes under its fence.

    wait: whether to wait for one lease time until another holder gives it back or is found dead; without, or after it,
    entering raises WriterBusyError.
    """

    def __init__(self, storage: Storage, holder: str, kind: str, seconds: float, attempts: int, wait: bool) -> None:
        self.storage, self.holder, self.kind = storage, holder, kind
        self.seconds, self.attempts, self.wait = seconds, attempts, wait
        self.token = uuid.uuid4().hex
        self.lost_to: str | None = None
        self._until = datetime.min.replace(tzinfo=UTC)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        deadline = time.monotonic() + (self.seconds + POLL_SECONDS if self.wait else 0)
        while (other := self._take()) is not None:
            if time.monotonic() >= deadline:
                raise WriterBusyError(f"the tables are being written by {other}; stop it, or wait until it ends")
            log.info("waiting for the tables", extra={"holder": other})
            time.sleep(POLL_SECONDS)
        self._thread.start()
        try:
            epoch = epoch_of(self.storage, self.token)
            if epoch is None:
                raise WriterBusyError("the tables were taken over by another process; start this process again")
            self.storage.fence = Fence(epoch)
            self.storage.seal(*FENCED)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Raises WriterBusyError where another process took the tables over: what was written since is left out."""
        other = self._end()
        if other is not None and kind is None:
            raise WriterBusyError(f"the tables were taken over by {other}; start this process again")

    def confirm(self) -> None:
        """Raise WriterBusyError unless the lease is this process's still: then all that it wrote so far is written.

        Of a write that the fence keeps out Spark says nothing.
        """
        held = _held(self.storage)
        if held is not None and held["token"] != self.token:
            self.lost_to = _named(held)
        self.check()

    def _end(self) -> str | None:
        """Give the lease back; returns who has it where this process has it no more."""
        self._done.set()
        self._thread.join()
        if self.lost_to is not None:
            return self.lost_to
        ended = datetime.now(UTC) - timedelta(seconds=1)
        return take(self.storage, self.holder, self.kind, ended, 0, self.attempts, self.token, renew=True)

    def check(self) -> None:
        """Raise WriterBusyError if the lease ran out or another process took it: nothing more may be written.

        One that ran out may have been taken and given back: what this process knows of the tables is no longer sure.
        """
        if self.lost_to is None and datetime.now(UTC) > self._until:
            raise WriterBusyError("the lease of the tables ran out while this process stood still; start it again")
        if self.lost_to is not None:
            raise WriterBusyError(f"the tables were taken over by {self.lost_to}; start this process again")

    def _take(self, renew: bool = False) -> str | None:
        now = datetime.now(UTC)
        other = take(self.storage, self.holder, self.kind, now, self.seconds, self.attempts, self.token, renew)
        if other is None and (not renew or now <= self._until):
            self._until = now + timedelta(seconds=self.seconds)
        return other

    def _renew(self) -> None:
        first_in_line(self.storage.spark)
        while not self._done.wait(self.seconds / 3):
            try:
                self.lost_to = self._take(renew=True)
            except Exception:
                # A failed renewal is no loss yet: two more come before the lease runs out.
                log.warning("could not renew the lease of the serving tables", exc_info=True)
            if self.lost_to is not None:
                return
