"""Between Spark and the baselines: the same split, the same test events and the same scoring as for what serves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from baselines import Histories
from nightstream.evaluation.protocol import Split
from nightstream.models.arrays import Sequences, UserFeatures
from nightstream.models.arrow import combined, rows_of
from nightstream.serving.user_state import FoldRules, fold
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

# A baseline sees whole histories: whoever needs fewer events takes the newest ones itself.
EVERYTHING = 2**31 - 1
VALID_LIMIT = 5000
ENTRIES = pa.list_(
    pa.struct(
        [
            pa.field("rank", pa.int32(), nullable=False),
            pa.field("item_id", pa.string(), nullable=False),
            pa.field("score", pa.float64(), nullable=False),
        ]
    )
)


@dataclass(frozen=True)
class Log:
    """The history of a split as arrays, made once for all baselines.

    events: as in blocks.Sequences, without user attributes. user_ids: string [U], in the order of the events.
    item_ids: string [M]; row r is item_ids[r - 1].
    """

    events: Sequences
    user_ids: pa.Array
    item_ids: pa.Array

    @property
    def size(self) -> int:
        return len(self.item_ids)


def log_of(parts: Split) -> Log:
    """The split's history; a user's events in the order (event_time, event_id) of every other reader."""
    item_ids = combined(parts.items.select("item_id").toArrow()["item_id"])
    item_ids = item_ids.take(pc.sort_indices(item_ids))
    table = (
        parts.history.select(
            "user_id", "item_id", F.unix_micros("event_time").alias("micros"), "event_id", "value", "role"
        )
        .orderBy("user_id", "event_time", "event_id")
        .toArrow()
    )
    users = combined(table["user_id"])
    starts = np.flatnonzero(np.concatenate([[True], np.asarray(pc.not_equal(users[1:], users[:-1]))]))
    count = len(users)
    return Log(
        Sequences(
            np.concatenate([starts, [count]]).astype(np.int64),
            rows_of(combined(table["item_id"]), item_ids).astype(np.int32),
            np.ones(count, np.int32),
            np.asarray(table["micros"], np.int64),
            np.zeros(count, np.float32),
            np.asarray(table["role"], np.int8),
            UserFeatures(np.zeros((len(starts), 0), np.float32), (), ()),
        ),
        users.take(pa.array(starts)),
        item_ids,
    )


@dataclass(frozen=True)
class BaselineLister:
    """A baseline where the evaluation expects the refresh (evaluation.Lister).

    best: user ids [B] and their histories -> rows and scores of their lists, as baselines.best_rows gives them.
    item_ids: as in Log.
    """

    spark: SparkSession
    best: Callable[[pa.Array, Histories], tuple[np.ndarray, np.ndarray]]
    item_ids: pa.Array
    users: DataFrame
    window_types: Sequence[str]
    window_length: int = EVERYTHING

    def lists(self, states: DataFrame, events: DataFrame, users: DataFrame) -> DataFrame:
        """States and events -> user_id, items (rank, item_id, score). users, their attributes, are not looked at."""
        rules = FoldRules(EVERYTHING, EVERYTHING, tuple(self.window_types))
        table = fold(states.toArrow(), events.toArrow(), rules)
        items, offsets = self._rows(combined(table["window"]))
        histories = Histories(items, offsets, *self._rows(combined(table["seen"])))
        rows, scores = self.best(combined(table["user_id"]), histories)
        return self.spark.createDataFrame(
            pa.table({"user_id": table["user_id"], "items": entries(rows, scores, self.item_ids)})
        )

    def _rows(self, lists: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
        """Catalogue rows and offsets; an item that the catalogue lacks tells a baseline nothing and is left out."""
        rows = rows_of(lists.flatten().field("item_id"), self.item_ids)
        sizes = np.asarray(pc.list_value_length(lists), np.int64)
        owner = np.repeat(np.arange(len(sizes)), sizes)[rows > 0]
        offsets = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(sizes)))])
        return rows[rows > 0], offsets.astype(np.int64)


def entries(rows: np.ndarray, scores: np.ndarray, item_ids: pa.Array) -> pa.ListArray:
    """Lists of (rank, item_id, score) from 1-based rows [B, K], 0 behind the last one."""
    held = rows > 0
    ranks = np.broadcast_to(np.arange(1, rows.shape[1] + 1, dtype=np.int32), rows.shape)
    entry = pa.StructArray.from_arrays(
        [
            pa.array(ranks[held], pa.int32()),
            item_ids.take(pa.array(rows[held] - 1)).cast(pa.string()),
            pa.array(scores[held].astype(np.float64)),
        ],
        fields=list(ENTRIES.value_type),
    )
    offsets = np.concatenate([[0], np.cumsum(held.sum(1))]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), entry)


def records(
    scores: Sequence[dict[str, Any]], data: str, protocol: str, model: str, ranker: bool, seed: int, seconds: float
) -> list[dict[str, Any]]:
    """evaluation.scores over all users, as the entries of --json."""
    return [
        {
            "data": data,
            "protocol": protocol,
            "delay_s": row["delay_s"],
            "model": model,
            "ranker": ranker,
            "default": model == "default",
            "seed": seed,
            "hr@10": row["hr@10"],
            "ndcg@10": row["ndcg@10"],
            "seconds": round(seconds, 1),
        }
        for row in scores
        if row["users"] == "all"
    ]
