"""The sources of one model: fitted to events, to and from arrays.

All arrays are in vocabulary rows: 1-based rows of the items that the model was trained with, 0 for any other item.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from nightstream.errors import ArtifactError
from nightstream.models.arrays import Sequences, UserFeatures
from nightstream.models.ranking.sources.base import CandidateSource, History, SourceSizes
from nightstream.models.ranking.sources.registry import SOURCES
from nightstream.models.ranking.sources.segments import Segments
from nightstream.models.ranking.sources.shares import Popularity, decayed_shares, span_days

__all__ = ["SourceSizes", "Sources", "fit_sources"]

Kind = TypeVar("Kind", bound=CandidateSource)


@dataclass(frozen=True)
class Sources:
    """What the sequences say without a trained vector. fitted: by name, in the order of the ranker's columns,
    popularity among them. recency: as in SourceSizes."""

    fitted: dict[str, CandidateSource]
    recency: float

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.fitted)

    @property
    def popularity(self) -> np.ndarray:
        """float32 [V + 1]: each item's decayed share of the events."""
        return self.get(Popularity).shares

    def get(self, kind: type[Kind]) -> Kind:
        """The fitted source of one kind. KeyError if the model was trained without it."""
        source = self.fitted[kind.name]
        if not isinstance(source, kind):
            raise KeyError(kind.name)
        return source

    def segment_scores(self, users: UserFeatures, items: np.ndarray) -> np.ndarray:
        """float32 [B, C], of vocabulary rows [B, C]: mean over a user's attributes of the item's share among users who
        have them; the item's share among all users where there are none."""
        if Segments.name not in self.fitted:
            return self.popularity[items]
        return self.get(Segments).scores(users, items, self.popularity)

    def to_arrays(self) -> dict[str, np.ndarray]:
        arrays = {"recency": np.asarray([self.recency], np.float64)}
        for source in self.fitted.values():
            arrays |= source.to_arrays()
        return arrays

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], names: Sequence[str]) -> Sources:
        """The sources that to_arrays was called on. names: of these sources, in their order; the registry's may differ.

        Raises:
            ArtifactError: An array is missing, a source is not registered, or an array belongs to none of them.
        """
        if missing := [name for name in names if name not in SOURCES]:
            raise ArtifactError(
                "the model was trained with candidate sources that are not registered here "
                f"({', '.join(missing)}); register them or publish another version"
            )
        left = dict(arrays)
        try:
            recency = float(left.pop("recency")[0])
            fitted = {name: _restored(SOURCES[name], left) for name in names}
        except (KeyError, ValueError) as error:
            raise ArtifactError(f"the candidate sources are incomplete: {error}") from error
        if left:
            raise ArtifactError(
                f"no candidate source of the model has the arrays {', '.join(sorted(left))}; "
                "register the source that they belong to or publish another version"
            )
        if Popularity.name not in fitted:
            raise ArtifactError(f"the model lacks the candidate source {Popularity.name}; publish another version")
        return cls(fitted, recency)


def _restored(kind: type[CandidateSource], left: dict[str, np.ndarray]) -> CandidateSource:
    return kind.from_arrays({name: left.pop(name) for name in kind.arrays if name in left})


def fit_sources(sequences: Sequences, vocabulary: int, roles: tuple[int, ...], sizes: SourceSizes) -> Sources:
    """Every registered source, fitted to the same events; a fixed function of its arguments.

    Args:
        sequences: Events of all users.
        vocabulary: V, the number of items.
        roles: Of the events that count.
        sizes: Of all sources.
    """
    kept = np.isin(sequences.roles, np.asarray(roles, np.int8)) & (sequences.items > 0)
    everyone = np.repeat(np.arange(len(sequences)), np.diff(sequences.offsets))
    owner, items, times = everyone[kept], sequences.items[kept].astype(np.int64), sequences.times[kept]
    days = sizes.half_life_days
    half_life = days if days is not None else max(span_days(times), 1e-6)
    popularity = decayed_shares(items, times, vocabulary + 1, half_life)
    history = History(owner, items, times, sequences.users, vocabulary + 1, popularity)
    return Sources({name: kind.fit(history, sizes) for name, kind in SOURCES.items()}, sizes.recency)
