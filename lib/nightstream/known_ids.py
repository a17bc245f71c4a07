"""Which event ids `events` may hold, in the memory of the one process that records: most micro-batches bring only new
ones, and then the table, the largest there is, need not be asked."""

from __future__ import annotations

import numpy as np
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

# 8 bytes each. A table with more ids is asked in each micro-batch.
MOST_IDS = 20_000_000
_MOST_RECENT = 1_000_000

HASHES = {"id_hash": "event_id", "retracts_hash": "retracts"}


def with_hashes(rows: DataFrame) -> DataFrame:
    """The rows with the hashes of the event ids that they are and that they retract (columns HASHES)."""
    return rows.withColumns({name: F.xxhash64(column) for name, column in HASHES.items()})


class KnownIds:
    """64-bit hashes of event ids that occurred, as events or as targets of retractions. It may claim an id that never
    occurred, but never misses one.

    hashes: int64, in any order, repetitions included.
    """

    def __init__(self, hashes: np.ndarray) -> None:
        self._sorted = np.unique(hashes)
        self._recent: set[int] = set()

    @classmethod
    def of(cls, events: DataFrame) -> KnownIds | None:
        """All ids of EVENTS rows; None where they are more than MOST_IDS."""
        if events.limit(MOST_IDS + 1).count() > MOST_IDS:
            return None
        found = with_hashes(events).select(*HASHES).toArrow()
        return cls(np.concatenate([np.asarray(found[name], np.int64) for name in HASHES]))

    def may_hold(self, hashes: np.ndarray) -> bool:
        """Whether one of the ids may have occurred."""
        if not self._recent.isdisjoint(hashes.tolist()):
            return True
        if not len(self._sorted):
            return False
        places = np.minimum(np.searchsorted(self._sorted, hashes), len(self._sorted) - 1)
        return bool((self._sorted[places] == hashes).any())

    def add(self, hashes: np.ndarray) -> None:
        self._recent.update(hashes.tolist())
        if len(self._recent) > _MOST_RECENT:
            recent = np.fromiter(self._recent, np.int64, len(self._recent))
            self._sorted, self._recent = np.union1d(self._sorted, recent), set()
