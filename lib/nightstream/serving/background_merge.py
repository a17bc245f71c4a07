"""The MERGEs that follow the commits of a stream, in the background."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from nightstream.serving import commits
from nightstream.store.materialize import Cut
from nightstream.store.storage import Storage

log = logging.getLogger(__name__)

# So much may be committed and not merged yet: it is held in memory.
MOST_PENDING = 256  # micro-batches
MOST_PENDING_BYTES = 256 * 1024 * 1024
LONGEST_REST = 30.0  # seconds


class BackgroundMerge:
    """Merges committed rows into the serving tables while the next micro-batches are computed.

    A MERGE costs seconds whatever its size, so all that was committed during one goes together into the next, of each
    user the newest alone. After each it rests, so that MERGEs take `share` of the time: on few cores they would else
    take half of them from the micro-batches. It does not rest while somebody waits for it.
    """

    def __init__(
        self,
        storage: Storage,
        top_k: int,
        attempts: int,
        share: float = 1.0,
        on_merge: Callable[[float, int], None] = lambda seconds, commits: None,
    ) -> None:
        """
        Args:
            storage: the tables.
            top_k: items per list.
            attempts: how often a MERGE is tried that meets another writer.
            share: of the time, above 0 to 1.
            on_merge: told after each MERGE how many seconds it took and how many commits went into it.
        """
        self.storage, self.top_k, self.attempts, self.on_merge = storage, top_k, attempts, on_merge
        self.share = share
        self.layout = commits.Layout(top_k)
        self._pending: list[Cut] = []
        self._error: Exception | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._awaited = 0

    def start(self) -> None:
        """Merge what an earlier process committed and did not merge; before the first commit, holding the lease."""
        self.layout = commits.Layout.of(self.storage, self.top_k)
        commits.merge_tail(self.storage, self.layout, self.attempts)

    def pending(self) -> list[Cut]:
        """Commits that the serving tables may lack, in the order of their commits.

        Ask before reading those tables: then one of the two has each row.
        """
        with self._changed:
            return list(self._pending)

    def add(self, commit: Cut) -> None:
        """Take over committed rows. Waits while too many are pending. Raises what the MERGEs have met."""
        with self._changed:
            self._wait(lambda: not self._is_full() or self._error is not None)
            self._raise()
            self._pending.append(commit)
            if self._thread is None:
                self._thread = threading.Thread(target=self._follow, name="merge", daemon=True)
                self._thread.start()

    def _is_full(self) -> bool:
        size = sum(each.table.nbytes for each in self._pending if each.table is not None)
        return len(self._pending) >= MOST_PENDING or size >= MOST_PENDING_BYTES

    def settle(self) -> None:
        """Wait until all is merged. Raises what the MERGEs have met; the next start of the stream merges then."""
        with self._changed:
            self._wait(lambda: self._thread is None)
            self._raise()

    def close(self) -> None:
        """Begin no other MERGE, and wait for the one that runs; the next start of the stream merges what is left."""
        with self._changed:
            self._pending.clear()
            self._wait(lambda: self._thread is None)

    def _wait(self, until: Callable[[], bool]) -> None:
        """Wait, and let nothing rest meanwhile; holding the lock."""
        self._awaited += 1
        self._changed.notify_all()
        self._changed.wait_for(until)
        self._awaited -= 1

    def check(self) -> None:
        """Raises what the MERGEs have met."""
        with self._changed:
            self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            self._pending.clear()
            raise error

    def _follow(self) -> None:
        while True:
            with self._changed:
                taken = list(self._pending) if self._error is None else []
                if not taken:
                    self._thread = None
                    self._changed.notify_all()
                    return
            begun = time.monotonic()
            try:
                rows = commits.newest_committed(self.storage, taken)
                commits.merge(self.storage, rows, self.layout, self.attempts)
                took = time.monotonic() - begun
                self.on_merge(took, len(taken))
            except Exception as error:
                log.exception("what is committed could not be merged", extra={"commits": len(taken)})
                with self._changed:
                    self._error = error
            else:
                with self._changed:
                    del self._pending[: len(taken)]
                    self._changed.notify_all()
                    rest = min(took * (1 / self.share - 1), LONGEST_REST)
                    self._changed.wait_for(lambda: self._awaited > 0, rest)
