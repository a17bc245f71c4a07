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
from datetime import UTC, datetime, timedelta

from pyspark.sql import functions as F

from nightstream.errors import WriterBusyError
from nightstream.storage import Storage, with_retries
from nightstream.tables import WRITER_LEASE

log = logging.getLogger(__name__)

SERVING = "serving"
POLL_SECONDS = 2.0


def this_process() -> str:
    """A holder that no other process is."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def take(storage: Storage, holder: str, kind: str, now: datetime, seconds: float, attempts: int) -> str | None:
    """Take or renew the lease until now + seconds. Returns None on success, else who holds it ("kind holder")."""
    row = [(SERVING, holder, kind, now + timedelta(seconds=seconds))]
    source = storage.spark.createDataFrame(row, WRITER_LEASE.schema)
    mine_or_free = (F.col("t.holder") == holder) | (F.col("t.expires_at") < F.lit(now))

    def write() -> None:
        (
            storage.table(WRITER_LEASE)
            .alias("t")
            .merge(source.alias("s"), "t.name = s.name")
            .whenMatchedUpdateAll(condition=mine_or_free)
            .whenNotMatchedInsertAll()
            .execute()
        )

    with_retries(write, attempts, WRITER_LEASE.name)
    found = storage.read(WRITER_LEASE).where(F.col("name") == SERVING).first()
    if found is None or found.holder == holder:
        return None
    return f"{found.kind} ({found.holder})"


class Lease:
    """The lease, held and renewed in the background inside a `with` block.

    wait: whether to wait for one lease time until another holder gives it back or is found dead; without, or after it,
    entering raises WriterBusyError.
    """

    def __init__(self, storage: Storage, holder: str, kind: str, seconds: float, attempts: int, wait: bool) -> None:
        self.storage, self.holder, self.kind = storage, holder, kind
        self.seconds, self.attempts, self.wait = seconds, attempts, wait
        self.lost_to: str | None = None
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
            take(self.storage, self.holder, self.kind, datetime.now(UTC) - timedelta(seconds=1), 0, self.attempts)

    def check(self) -> None:
        """Raise WriterBusyError if the lease ran out and another process took it: nothing more may be written."""
        if self.lost_to is not None:
            raise WriterBusyError(f"the tables were taken over by {self.lost_to}; start this process again")

    def _take(self) -> str | None:
        return take(self.storage, self.holder, self.kind, datetime.now(UTC), self.seconds, self.attempts)

    def _renew(self) -> None:
        while not self._done.wait(self.seconds / 3):
            try:
                self.lost_to = self._take()
            except Exception:
                # A failed renewal is no loss yet: two more come before the lease runs out.
                log.warning("could not renew the lease of the serving tables", exc_info=True)
            if self.lost_to is not None:
                return
