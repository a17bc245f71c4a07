"""Which event ids `events` may hold, in the memory of the one process that records: most micro-batches bring only new
ones, and then the table, the largest there is, need not be asked."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import pandas as pd
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from nightstream.store.storage import Storage
from nightstream.store.tables import EVENTS

log = logging.getLogger(__name__)

# 8 bytes each. A table with more ids is asked in each micro-batch.
MOST_IDS = 20_000_000
_MOST_RECENT = 1_000_000


def hashes(ids: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """int64 [N]: 64-bit hashes of texts, the same in every process."""
    values = ids.drop_null().to_pandas().to_numpy(object)
    return pd.util.hash_array(values, categorize=False).astype(np.int64)


class IdFilter:
    """64-bit hashes of event ids that occurred, as events or as targets of retractions. It may claim an id that never
    occurred, but never misses one. Beyond MOST_IDS it claims all.

    hashes: int64, in any order, repetitions included.
    """

    def __init__(self, hashes: np.ndarray) -> None:
        self._claims_all = False
        self._keep(np.unique(hashes))

    @classmethod
    def of(cls, storage: Storage) -> IdFilter:
        """All ids of the table `events`."""
        known = cls(np.array([], np.int64))
        storage.create(EVENTS)
        if storage.local is None:
            events = storage.read(EVENTS)
            known.add_rows(events, events.count())
            return known
        parts, count = [np.array([], np.int64)], 0
        for batch in storage.local.batches(EVENTS, ["event_id", "retracts"]):
            added = [hashes(batch["event_id"]), hashes(batch["retracts"])]
            parts += added
            count += sum(map(len, added))
            if count > MOST_IDS:
                known._give_up()
                return known
        return cls(np.concatenate(parts))

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

    def add_ids(self, events: pa.Table) -> None:
        """Add the ids of EVENTS rows."""
        self.add(np.concatenate([hashes(events["event_id"]), hashes(events["retracts"])]))

    def add_rows(self, events: DataFrame, count: int) -> None:
        """Add the ids of EVENTS rows of any number, `count`."""
        if self._claims_all or len(self._sorted) + count > MOST_IDS:
            self._give_up()
            return
        retracted = events.where(F.col("retracts").isNotNull()).select(F.col("retracts").alias("event_id"))
        ids = events.select("event_id").unionByName(retracted)
        # At most MOST_IDS numbers.
        added = np.asarray(ids.mapInArrow(_hashed, "id_hash long").toArrow()["id_hash"], np.int64)
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


def _hashed(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        yield pa.record_batch([pa.array(hashes(batch["event_id"]))], ["id_hash"])
