"""What people with the same attributes take. It puts no candidates forward: it lifts those of the other sources."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from nightstream.models.arrays import UserFeatures
from nightstream.models.ranking.sources.base import Candidates, CandidateSource, Feature, History, SourceSizes, Strategy

# An attribute of more values says who somebody is rather than what people they are like.
MOST_VALUES = 100


@dataclass(frozen=True)
class Segments(CandidateSource):
    """segments: float32 [S, V + 1], shares within each value of each user attribute, drawn towards popularity.
    offsets: int64 [A], where each attribute's values start; −1: too many values to be segments."""

    segments: np.ndarray
    offsets: np.ndarray
    name = "segments"
    strategy = Strategy("segment_popular", "Popular with people like you", "Popular with people like you")
    features = (Feature("segment_lift", linear=True),)
    arrays = ("segments", "segment_offsets")

    @classmethod
    def fit(cls, history: History, sizes: SourceSizes) -> Self:
        parts: list[np.ndarray] = []
        offsets: list[int] = []
        start = 0
        prior, popularity = sizes.prior_events, history.popularity
        for values, size in zip(history.users.categories, history.users.category_sizes, strict=True):
            if size > MOST_VALUES:
                offsets.append(-1)
                continue
            offsets.append(start)
            counts = np.zeros((size, history.rows), np.float64)
            for column in values.T:
                np.add.at(counts, (column[history.owner], history.items), 1.0)
            parts.append((counts + prior * popularity) / (counts.sum(1, keepdims=True) + prior))
            start += size
        shares = np.concatenate(parts).astype(np.float32) if parts else np.zeros((0, history.rows), np.float32)
        return cls(shares, np.asarray(offsets, np.int64))

    def to_arrays(self) -> dict[str, np.ndarray]:
        return {"segments": self.segments, "segment_offsets": self.offsets}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> Self:
        return cls(arrays["segments"], arrays["segment_offsets"])

    def scores(self, users: UserFeatures, items: np.ndarray, popularity: np.ndarray) -> np.ndarray:
        """The mean over a user's attributes of an item's share among users who have them.

        Args:
            users: B users.
            items: int64 [B, C], vocabulary rows.
            popularity: float32 [V + 1], shares among all users, for a user without attributes.

        Returns:
            float32 [B, C].
        """
        total = np.zeros(items.shape, np.float32)
        attributes = np.zeros((len(users), 1), np.float32)
        for offset, values in zip(self.offsets.tolist(), users.categories, strict=False):
            if offset < 0:
                continue
            for column in values.T:
                has = column > 0
                total[has] += self.segments[(offset + column[has])[:, None], items[has]]
                attributes[has] += 1
        return np.where(attributes > 0, total / np.maximum(attributes, 1), popularity[items]).astype(np.float32)

    def values(self, candidates: Candidates) -> list[np.ndarray]:
        view = candidates.view
        segment = self.scores(candidates.windows.users, candidates.known, view.popularity)
        return [np.log(segment + view.floor) - view.log_popularity[candidates.columns]]

    def may_explain(self, candidates: Candidates) -> np.ndarray:
        known, popularity = candidates.known, candidates.view.popularity
        return self.scores(candidates.windows.users, known, popularity) > popularity[known]
