"""What a source of candidates is: what it learns from events, says of items, and gives the ranker to read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
from scipy import sparse

from nightstream.models.arrays import UserFeatures, Windows

MICROSECONDS_PER_DAY = 86_400_000_000


@dataclass(frozen=True)
class Strategy:
    """What put an item into a list, as tables and readers know it.

    name: stored with every list. named: the sentence for a reader that names a window item by `{title}`. bare: the
    sentence where no item is named.
    """

    name: str
    named: str
    bare: str


@dataclass(frozen=True)
class Feature:
    """One column that the ranker reads. linear, log: whether it, and its logarithm, are terms of the linear ranker."""

    name: str
    linear: bool = False
    log: bool = False


@dataclass(frozen=True)
class SourceSizes:
    """reach: events between two items that still count as visited together. neighbours: kept per item. shrink: users
    that item-kNN adds to the denominator. history: newest events of a user that it looks at. half_life_days,
    trend_half_life_days: of popularity and trend, None = derived from the data (all of its time span, and a fiftieth of
    it). prior_events: weight of everyone in a segment. recency: weight of a window item relative to the next newer
    one."""

    reach: int = 10
    neighbours: int = 200
    shrink: float = 10.0
    history: int = 300
    half_life_days: float | None = None
    trend_half_life_days: float | None = None
    prior_events: float = 500.0
    recency: float = 0.85


@dataclass(frozen=True)
class History:
    """E events that sources learn from, users together and each user's in order; V is the vocabulary's size.

    owner, items: int64 [E], user and vocabulary row of each event. times: int64 [E] microseconds. users: of all U
    users. rows: V + 1. popularity: float32 [V + 1], each item's decayed share of the events.
    """

    owner: np.ndarray
    items: np.ndarray
    times: np.ndarray
    users: UserFeatures
    rows: int
    popularity: np.ndarray


@dataclass(frozen=True)
class CatalogueView:
    """A catalogue of M items as a vocabulary of V items sees it.

    to_vocabulary: int64 [M + 1], vocabulary row of each catalogue row, 0 for an item the model has not met.
    from_vocabulary: int64 [V + 1], catalogue column of each vocabulary row, −1 for an item that is not in it.
    popularity: float32 [V + 1], shares of events. floor: what is added to a share before its logarithm is taken.
    log_popularity: float32 [M], of popularity plus the floor. recency: as in SourceSizes.
    """

    to_vocabulary: np.ndarray
    from_vocabulary: np.ndarray
    popularity: np.ndarray
    floor: np.float32
    log_popularity: np.ndarray
    recency: float

    @property
    def items(self) -> int:
        """M."""
        return len(self.to_vocabulary) - 1

    def of_items(self, values: np.ndarray) -> np.ndarray:
        """[M] from [V + 1]: values by vocabulary row as values by catalogue column, 0 for an item not met."""
        rows = self.to_vocabulary[1:]
        return np.where(rows > 0, values[rows], 0)

    def columns(self, scores: sparse.csr_matrix) -> sparse.csr_matrix:
        """CSR [B, M] from [B, V + 1]: scores by vocabulary row as scores by catalogue column, in ascending columns."""
        columns = self.from_vocabulary[scores.indices]
        owner = np.repeat(np.arange(scores.shape[0]), np.diff(scores.indptr))
        here = columns >= 0
        parts = (scores.data[here], (owner[here], columns[here]))
        return sparse.csr_matrix(parts, (scores.shape[0], self.items))

    def known(self, windows: Windows) -> np.ndarray:
        """int64 [B, L]: the vocabulary rows of the windows' events."""
        return self.to_vocabulary[windows.items]


@dataclass(frozen=True)
class Candidates:
    """C candidates of each of B users, as one source sees them.

    columns: int64 [B, C], of the catalogue; 0 where not valid. valid: bool [B, C]. scores: float32 [B, C], what the
    source says of them; zeros from a source that has no scores of its own.
    """

    view: CatalogueView
    windows: Windows
    columns: np.ndarray
    valid: np.ndarray
    scores: np.ndarray

    @property
    def known(self) -> np.ndarray:
        """int64 [B, C]: vocabulary rows."""
        return self.view.to_vocabulary[self.columns + 1]


class CandidateSource(ABC):
    """What one source has learnt. A subclass says what it learns and what it says of items; the rest has defaults.

    name: its key in the registry. strategy: whose reason its items are; sources may share one. features: what the
    ranker reads of a candidate, in the order of `values`. arrays: names of all arrays that to_arrays gives. Names of
    features and arrays are unlike those of any other source. limit: candidates that it puts forward for each user.
    """

    name: ClassVar[str]
    strategy: ClassVar[Strategy]
    features: ClassVar[tuple[Feature, ...]]
    arrays: ClassVar[tuple[str, ...]]
    limit: ClassVar[int] = 30

    @classmethod
    @abstractmethod
    def fit(cls, history: History, sizes: SourceSizes) -> Self:
        """What the events teach: a fixed function of its arguments."""

    @abstractmethod
    def to_arrays(self) -> dict[str, np.ndarray]:
        """Everything it has learnt, by the names in `arrays`."""

    @classmethod
    @abstractmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> Self:
        """What to_arrays gave. KeyError if an array is missing, ValueError if one does not fit."""

    def item_scores(self, view: CatalogueView) -> np.ndarray | None:
        """float32 [M] of the catalogue's items, the same for every user; None if its scores depend on the user."""
        return None

    def user_scores(self, view: CatalogueView, windows: Windows) -> sparse.csr_matrix | None:
        """CSR float32 [B, M], above 0 at what it knows for each user; None if it has item_scores or no scores."""
        return None

    def values(self, candidates: Candidates) -> Sequence[np.ndarray]:
        """[B, C] per feature; meaningless where a candidate is not valid. Unless overridden: score, share, place."""
        scores, valid = candidates.scores, candidates.valid
        return scores, share(scores, valid), place(scores, valid)

    def may_explain(self, candidates: Candidates) -> np.ndarray:
        """bool [B, C]: whether the source knows enough of a candidate to be the reason for it."""
        return candidates.scores > 0

    def because(
        self, view: CatalogueView, windows: Windows, users: np.ndarray, columns: np.ndarray
    ) -> np.ndarray | None:
        """How much each window event has to do with an item.

        Args:
            view: Of the catalogue.
            windows: Of B users with L events each.
            users: int64 [N], rows of windows.
            columns: int64 [N], the catalogue column of one item for each of them.

        Returns:
            float32 [N, L], 0 where nothing; None if the source's reason names no window item.
        """
        return None


def highest(values: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """[B, 1]: the greatest valid value of each row of [B, C]."""
    return np.asarray(np.where(valid, values, -np.inf).max(1, keepdims=True))


def share(values: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """[B, C]: values relative to the greatest valid one of their row."""
    return np.asarray(values / np.maximum(highest(values, valid), 1e-12))


def place(values: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """int64 [B, C]: the place of each value among its row's, 0 for the greatest; of equals the lower column first."""
    order = np.argsort(-np.where(valid, values, -np.inf), axis=1, kind="stable")
    places = np.empty_like(order)
    np.put_along_axis(places, order, np.broadcast_to(np.arange(order.shape[1]), order.shape), 1)
    return places
