"""What the ranker reads of a candidate: the features, their names, and whose reason each of them is."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from nightstream.models.arrays import Windows
from nightstream.models.ranking.candidate_sources import Sources
from nightstream.models.ranking.candidates import Prepared, Scores, as_source_sees
from nightstream.models.ranking.sources.base import Feature, highest, place
from nightstream.models.ranking.sources.registry import SOURCES
from nightstream.models.ranking.strategies import SEQUENCE, known_strategies
from nightstream.models.ranking.topk import unit

ENSEMBLE_FEATURES = (
    Feature("ensemble_cosine"),
    Feature("ensemble_gap"),
    Feature("ensemble_place"),
    Feature("last_cosine", linear=True),
    Feature("recent_cosine", linear=True),
)
WINDOW_FEATURES = (Feature("window_events"),)
RECENT_EVENTS = 8


def _member_features(member: str) -> tuple[Feature, ...]:
    return Feature(f"{member}_cosine", linear=True), Feature(f"{member}_gap"), Feature(f"{member}_place")


@dataclass(frozen=True)
class RankerFeatures:
    """The columns that a ranker reads, for an ensemble of these members and these sources, by name."""

    members: tuple[str, ...]
    sources: tuple[str, ...]

    def __post_init__(self) -> None:
        """ValueError where two columns have one name."""
        twice = sorted(name for name, count in Counter(self.names).items() if count > 1)
        if twice:
            raise ValueError(f"the ranker would have two columns {', '.join(twice)}; rename the encoder or the feature")

    @cached_property
    def names(self) -> list[str]:
        """Of the F columns, in order."""
        return [feature.name for feature, _ in self._columns()]

    def groups(self) -> np.ndarray:
        """int64 [F]: index into STRATEGIES of each column, −1 where a column is nobody's reason."""
        place_of = {name: place for place, name in enumerate(known_strategies())}
        return np.asarray([place_of.get(strategy, -1) for _, strategy in self._columns()])

    def linear_terms(self) -> tuple[np.ndarray, np.ndarray]:
        """Columns int64 [T] and whether their logarithm is meant, bool [T], of the linear part."""
        members = [feature for member in self.members for feature in _member_features(member)]
        ordered = (*members, *self._source_features(), *ENSEMBLE_FEATURES)
        terms = [(f.name, log) for f in ordered for log, wanted in ((False, f.linear), (True, f.log)) if wanted]
        return np.asarray([self.names.index(n) for n, _ in terms]), np.asarray([log for _, log in terms])

    def _source_features(self) -> list[Feature]:
        return [feature for name in self.sources for feature in SOURCES[name].features]

    def _columns(self) -> list[tuple[Feature, str]]:
        """Feature and strategy of each column; no strategy where a column is nobody's reason."""
        columns = [(feature, SEQUENCE.name) for feature in ENSEMBLE_FEATURES]
        columns += [(f, SOURCES[name].strategy.name) for name in self.sources for f in SOURCES[name].features]
        columns += [(feature, "") for feature in WINDOW_FEATURES]
        return columns + [(f, SEQUENCE.name) for member in self.members for f in _member_features(member)]


def features(scores: Scores, table: Prepared, windows: Windows, sources: Sources, columns: np.ndarray) -> np.ndarray:
    """What the ranker reads of each candidate.

    Args:
        scores: Of the full kind, for B users.
        table: The catalogue as the model sees it.
        windows: Of the same users.
        sources: Of the model.
        columns: int64 [B, C], of the catalogue, −1 where there is no candidate.

    Returns:
        float32 [B, C, F], in the order of RankerFeatures.names; meaningless where columns are −1.
    """
    valid = columns >= 0
    at = np.maximum(columns, 0)

    def take(values: np.ndarray) -> np.ndarray:
        return np.where(valid, np.take_along_axis(values, at, 1), 0)

    def cosine_features(values: np.ndarray) -> list[np.ndarray]:
        return [values, highest(values, valid) - values, place(values, valid)]

    out = [*cosine_features(take(scores.ensemble)), *_cosines_to_window(table, windows, at)]
    for name, source in sources.fitted.items():
        out += source.values(as_source_sees(name, columns, scores, table, windows))
    out += [np.broadcast_to((windows.items > 0).sum(1, keepdims=True), at.shape)]
    for member in scores.members:
        out += cosine_features(take(member))
    return np.stack([np.asarray(o, np.float32) for o in out], 2)


def _cosines_to_window(table: Prepared, windows: Windows, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [B, C] each: cosine of the columns' items with the newest event, and with the mean of the recent ones."""
    last, recent = np.zeros((2, *columns.shape), np.float32)
    for weight, padded in zip(table.weights, table.padded_members, strict=True):
        window = padded[windows.items[:, -RECENT_EVENTS:]]
        ends = np.stack([window[:, -1], unit(window.sum(1))], 2)
        cosines = np.float32(weight) * (padded[columns + 1] @ ends)
        last += cosines[:, :, 0]
        recent += cosines[:, :, 1]
    return last, recent
