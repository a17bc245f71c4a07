"""Which event ids `events` may hold, in the memory of the one process that records: most micro-batches bring only new
ones, and then the table, the largest there is, need not be asked."""

from __future__ import annotations

import logging

import numpy as np
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

log = logging.getLogger(__name__)

# 8 bytes each. A table with more ids is asked in each micro-batch.
MOST_IDS = 20_000_000
_MOST_RECENT = 1_000_000

HASHES = {"id_hash": "event_id", "retracts_hash": "retracts"}


def with_hashes(rows: DataFrame) -> DataFrame:
    """The rows with the hashes of the event ids that they are and that they retract, columns HASHES."""
    return rows.withColumns({name: F.xxhash64(column) for name, column in HASHES.items()})


class IdFilter:
    """64-bit hashes of event ids that occurred, as events or as targets of retractions. It may claim an id that never
    occurred, but never misses one. Beyond MOST_IDS it claims all.

    hashes: int64, in any order, repetitions included.
    """

    def __init__(self, hashes: np.ndarray) -> None:
        self._claims_all = False
        self._keep(np.unique(hashes))

    @classmethod
    def of(cls, events: DataFrame) -> IdFilter:
        """All ids of EVENTS rows."""
        known = cls(np.array([], np.int64))
        known.add_rows(with_hashes(events), events.count())
        return known

    def may_hold(self, hashes: np.ndarray) -> bool:
        """Whether one of the ids may have occurred."""
        if self._claims_all or not self._recent.isdisjoint(hashes.tolist()):
            return True
        if not len(self._sorted):
            return False
        places = np.minimum(np.searchsorted(self._sorted, hashes), len(self._sorted) - 1)
        return bool((self._sorted[places] == hashes).any())

    def add(self, hashes: np.ndarray) -> None:
        if self._claims_all:
            return
        self._recent.update(hashes.tolist())
        if len(self._recent) > _MOST_RECENT:
            recent = np.fromiter(self._recent, np.int64, len(self._recent))
            self._keep(np.union1d(self._sorted, recent))

    def add_rows(self, rows: DataFrame, count: int) -> None:
        """Add the ids of rows (`with_hashes`) of any number, `count`."""
        if self._claims_all or len(self._sorted) + count > MOST_IDS:
            self._give_up()
            return
        ids = rows.select("id_hash").unionByName(
            rows.where(F.col("retracts").isNotNull()).select(F.col("retracts_hash").alias("id_hash"))
        )
        # At most MOST_IDS numbers.
        added = np.asarray(ids.toArrow()["id_hash"], np.int64)
        recent = np.fromiter(self._recent, np.int64, len(self._recent))
        self._keep(np.unique(np.concatenate([self._sorted, recent, added])))

    def _keep(self, hashes: np.ndarray) -> None:
        """hashes: distinct, ascending."""
        self._sorted: np.ndarray = hashes
        self._recent: set[int] = set()
        if len(hashes) > MOST_IDS:
            self._give_up()

    def _give_up(self) -> None:
        if not self._claims_all:
            log.warning(
                "more event ids than are kept at hand: each micro-batch asks the table", extra={"most": MOST_IDS}
            )
        self._claims_all, self._sorted, self._recent = True, np.array([], np.int64), set()
