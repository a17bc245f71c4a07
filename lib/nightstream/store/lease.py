"""One writer at a time, of the serving tables and of what ingest records: a lease in a Delta row, renewed by MERGE.

Delta's own conflict check makes taking it safe: of two processes that take a free lease at once, one MERGE fails.
A process that dies keeps the lease for `serving.lease_seconds`, no longer; started again under the same holder name it
has it at once.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from datetime import UTC, datetime, timedelta

from pyspark.sql import functions as F

from nightstream.errors import WriterBusyError
from nightstream.store.storage import Storage
from nightstream.store.tables import WRITER_LEASE

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
    """Take the lease until now + seconds, or with `renew` keep it. Returns None on success, else who holds it.

    token: of the process. A holder's next process has the lease at once, and the one before cannot renew it any more.
    """
    row = [(SERVING, holder, kind, token, now + timedelta(seconds=seconds))]
    source = storage.spark.createDataFrame(row, WRITER_LEASE.schema)
    mine = "t.holder = s.holder AND t.token = s.token"
    mine_or_free = mine if renew else f"t.holder = s.holder OR t.expires_at < timestamp'{now.isoformat()}'"

    def write() -> None:
        (
            storage.table(WRITER_LEASE)
            .alias("t")
            .merge(source.alias("s"), "t.name = s.name")
            .whenMatchedUpdateAll(condition=mine_or_free)
            .whenNotMatchedInsertAll()
            .execute()
        )

    storage.with_retries(write, attempts, WRITER_LEASE.name)
    current = storage.read(WRITER_LEASE).where(F.col("name") == SERVING).first()
    if current is None or (current.holder, current.token) == (holder, token):
        return None
    return f"{current.kind} ({current.holder})"


class Lease:
    """The lease, held and renewed in the background inside a `with` block.

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
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()
        if self.lost_to is None:
            ended = datetime.now(UTC) - timedelta(seconds=1)
            take(self.storage, self.holder, self.kind, ended, 0, self.attempts, self.token, renew=True)

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
        while not self._done.wait(self.seconds / 3):
            try:
                self.lost_to = self._take(renew=True)
            except Exception:
                # A failed renewal is no loss yet: two more come before the lease runs out.
                log.warning("could not renew the lease of the serving tables", exc_info=True)
            if self.lost_to is not None:
                return
