"""The arrays that pass between Spark and the models: numpy only, shapes stated, checked on construction.

Catalogue rows are 1-based everywhere below, because 0 is padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

PADDING = 0


@dataclass(frozen=True)
class ItemFeatures:
    """Normalised content of M items, aligned with a catalogue.

    numbers: float32 [M, n], scaled; a missing value is 0 and its indicator column (the second half of n) is 1.
    categories: one int32 [M, w] per attribute, multi-valued, padded with 0; 1 is out-of-vocabulary.
    category_sizes: number of indices of each attribute, padding and out-of-vocabulary included.
    tokens: int32 [M, t], words of the text in order, padded with 0 on the right; 1 is out-of-vocabulary.
    vocabulary_size: number of token indices, padding and out-of-vocabulary included.
    """

    numbers: np.ndarray
    categories: tuple[np.ndarray, ...]
    category_sizes: tuple[int, ...]
    tokens: np.ndarray
    vocabulary_size: int

    def __post_init__(self) -> None:
        count = len(self.numbers)
        if any(len(c) != count for c in self.categories) or len(self.tokens) != count:
            raise ValueError("numbers, categories and tokens must have one row per item each")
        if len(self.categories) != len(self.category_sizes):
            raise ValueError("one category size per category attribute is needed")

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def has_content(self) -> bool:
        return bool(self.numbers.shape[1] or self.categories or self.tokens.shape[1])

    def take(self, rows: np.ndarray) -> ItemFeatures:
        return ItemFeatures(
            self.numbers[rows],
            tuple(c[rows] for c in self.categories),
            self.category_sizes,
            self.tokens[rows],
            self.vocabulary_size,
        )


@dataclass(frozen=True)
class UserFeatures:
    """Normalised attributes of B users; shapes as in ItemFeatures, without text."""

    numbers: np.ndarray
    categories: tuple[np.ndarray, ...]
    category_sizes: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, rows: np.ndarray) -> UserFeatures:
        return UserFeatures(self.numbers[rows], tuple(c[rows] for c in self.categories), self.category_sizes)


@dataclass(frozen=True)
class Windows:
    """The windows of B users, newest event last, left-padded to L events.

    items: int32 [B, L], 1-based catalogue rows; 0 = padding, or an item that the catalogue does not know.
    types: int32 [B, L], 1-based index into the model's event types; 0 = padding or unknown type.
    times: int64 [B, L], event time in microseconds since the epoch; 0 = padding.
    values: float32 [B, L], normalised event value, 0 where absent.
    users: attributes of the same B users.
    seen: int32 [sum of lengths], 1-based catalogue rows that must not be recommended, user after user.
    seen_offsets: int64 [B + 1], user b's seen rows are seen[seen_offsets[b]:seen_offsets[b + 1]].
    """

    items: np.ndarray
    types: np.ndarray
    times: np.ndarray
    values: np.ndarray
    users: UserFeatures
    seen: np.ndarray
    seen_offsets: np.ndarray

    def __post_init__(self) -> None:
        if not (self.items.shape == self.types.shape == self.times.shape == self.values.shape):
            raise ValueError("items, types, times and values must have one shape [B, L]")
        if len(self.seen_offsets) != len(self.items) + 1:
            raise ValueError("seen_offsets must have B + 1 entries")

    def __len__(self) -> int:
        return len(self.items)

    def slice(self, start: int, stop: int) -> Windows:
        offsets = self.seen_offsets[start : stop + 1]
        return Windows(
            self.items[start:stop],
            self.types[start:stop],
            self.times[start:stop],
            self.values[start:stop],
            self.users.take(np.arange(start, stop)),
            self.seen[offsets[0] : offsets[-1]],
            offsets - offsets[0],
        )


@dataclass(frozen=True)
class Catalogue:
    """The items that can be recommended under one model.

    item_ids: M distinct ids; row r (1-based) is item_ids[r - 1].
    vectors: float32 [M, D], unit length: the item embeddings.
    available: bool [M]; a withdrawn item keeps its row and its vector, but is never recommended.
    titles: M display texts for reasons (the id where there is none).
    """

    item_ids: Sequence[str]
    vectors: np.ndarray
    available: np.ndarray
    titles: Sequence[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not len(self.item_ids) == len(self.vectors) == len(self.available):
            raise ValueError("item_ids, vectors and available must have one entry per item each")

    def __len__(self) -> int:
        return len(self.item_ids)


@dataclass(frozen=True)
class Lists:
    """The recommendations of B users, best first.

    rows: int32 [B, K], 1-based catalogue rows; 0 behind the last eligible item.
    scores: float32 [B, K], descending within a list.
    strategies: int8 [B, K], index into strategies.STRATEGIES.
    because: int32 [B, K], the 1-based row of the window item that the reason names, 0 where none.
    vectors: float32 [B, D], the user vectors, unit length (all zero for a user with an empty window).
    """

    rows: np.ndarray
    scores: np.ndarray
    strategies: np.ndarray
    because: np.ndarray
    vectors: np.ndarray


@dataclass(frozen=True)
class Sequences:
    """The training history of U users, each user's events in ascending (event_time, tie order).

    offsets: int64 [U + 1]; user u's events are [offsets[u], offsets[u + 1]).
    items, types: int32 [E] (1-based, as in Windows); times: int64 [E] microseconds; values: float32 [E].
    roles: int8 [E], one of TRAIN, RANK, VALID: what an event may be the target of.
    users: attributes of the same U users.
    """

    offsets: np.ndarray
    items: np.ndarray
    types: np.ndarray
    times: np.ndarray
    values: np.ndarray
    roles: np.ndarray
    users: UserFeatures

    def __len__(self) -> int:
        return len(self.offsets) - 1


TRAIN, RANK, VALID = 0, 1, 2
