"""What everyone takes: popularity, and the trend of late."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from nightstream.models.ranking.sources.base import (
    MICROSECONDS_PER_DAY,
    Candidates,
    CandidateSource,
    CatalogueView,
    Feature,
    History,
    SourceSizes,
    Strategy,
)

# The trend's half-life is this share of popularity's, unless it is given.
TREND_SHARE = 50


@dataclass(frozen=True)
class Shares(CandidateSource):
    """shares: float32 [V + 1], each item's decayed share of the events; they sum to 1."""

    shares: np.ndarray
    limit = 15

    def __init_subclass__(cls) -> None:
        cls.arrays = (cls.name,)
        cls.features = (Feature(f"log_{cls.name}", linear=True),)

    def to_arrays(self) -> dict[str, np.ndarray]:
        return {self.name: self.shares}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> Self:
        return cls(arrays[cls.name])

    def item_scores(self, view: CatalogueView) -> np.ndarray:
        return view.of_items(self.shares)


class Popularity(Shares):
    """The other sources measure themselves against it, so every model has it."""

    name = "popularity"
    strategy = Strategy("popular", "Popular with everyone", "Popular with everyone")

    @classmethod
    def fit(cls, history: History, sizes: SourceSizes) -> Self:
        return cls(history.popularity)

    def values(self, candidates: Candidates) -> list[np.ndarray]:
        return [candidates.view.log_popularity[candidates.columns]]


class Trend(Shares):
    name = "trend"
    strategy = Strategy("trending", "Much in demand at the moment", "Much in demand at the moment")

    @classmethod
    def fit(cls, history: History, sizes: SourceSizes) -> Self:
        days = sizes.trend_half_life_days
        half_life = days if days is not None else max(span_days(history.times) / TREND_SHARE, 1e-6)
        return cls(decayed_shares(history.items, history.times, history.rows, half_life))

    def values(self, candidates: Candidates) -> list[np.ndarray]:
        view = candidates.view
        return [np.log(candidates.scores + view.floor) - view.log_popularity[candidates.columns]]

    def may_explain(self, candidates: Candidates) -> np.ndarray:
        return candidates.scores > candidates.view.popularity[candidates.known]


def span_days(times: np.ndarray) -> float:
    """Days between the first and the last of the times [E] in microseconds; 1 where there is none."""
    return float(times.max() - times.min()) / MICROSECONDS_PER_DAY if len(times) else 1.0


def decayed_shares(items: np.ndarray, times: np.ndarray, rows: int, half_life_days: float) -> np.ndarray:
    """The share of events per item; an event weighs half for each half-life before the newest one.

    Args:
        items: int64 [E], vocabulary rows.
        times: int64 [E], microseconds.
        rows: Length of the result, V + 1.
        half_life_days: In days, above 0.

    Returns:
        float32 [rows], 0 for row 0; sums to 1 unless there are no events.
    """
    if not len(items):
        return np.zeros(rows, np.float32)
    age = (times.max() - times) / MICROSECONDS_PER_DAY
    weights = 0.5 ** np.minimum(age / max(half_life_days, 1e-9), 60.0)
    counts = np.bincount(items, weights, minlength=rows)
    counts[0] = 0
    return np.asarray(counts / max(counts.sum(), 1e-300), np.float32)
