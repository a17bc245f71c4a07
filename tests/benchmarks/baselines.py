"""What a learnt model must beat: popularity, item-kNN, matrix factorisation, and a fusion of lists.

Everything here is numpy over 1-based catalogue rows (0 is padding). A baseline learns from the events of some roles and
scores all items for histories; seen items are taken out by `best_rows` alone, in the same way for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from nightstream.models import ranking_metrics
from nightstream.models.arrays import RANK, TRAIN, Sequences
from nightstream.models.ranking.sources.neighbours import strongest
from nightstream.models.ranking.topk import best_columns, exclude
from scipy import sparse

BLOCK = 256
CUTOFF = 10
FUSED = 20
FUSION_CONSTANT = 60


@dataclass(frozen=True)
class Histories:
    """What is known of B users.

    items: int64, 1-based rows in order of time, user after user; user b's are items[offsets[b]:offsets[b + 1]].
    seen, seen_offsets: the same for what must not be recommended (under a delay more than what is known).
    """

    items: np.ndarray
    offsets: np.ndarray
    seen: np.ndarray
    seen_offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def sizes(self) -> np.ndarray:
        """int64 [B]: known events of each user."""
        return np.diff(self.offsets)

    @property
    def owner(self) -> np.ndarray:
        """int64, one per entry of items: the user whose it is."""
        return np.repeat(np.arange(len(self)), self.sizes)

    def slice(self, start: int, stop: int) -> Histories:
        offsets, seen = self.offsets[start : stop + 1], self.seen_offsets[start : stop + 1]
        return Histories(
            self.items[offsets[0] : offsets[-1]],
            offsets - offsets[0],
            self.seen[seen[0] : seen[-1]],
            seen - seen[0],
        )

    def newest(self, length: int) -> np.ndarray:
        """int64 [B, length]: the newest items of each user, newest last, 0 where there are fewer."""
        place = np.arange(len(self.items)) - self.offsets[1:][self.owner] + length
        out = np.zeros((len(self), length), np.int64)
        out[self.owner[place >= 0], place[place >= 0]] = self.items[place >= 0]
        return out

    def weights(self, decay: float, size: int) -> sparse.csr_matrix:
        """CSR float64 [B, size + 1]: decay ** (events after it) of each item, of its newest event where it repeats."""
        age = self.offsets[1:][self.owner] - 1 - np.arange(len(self.items))
        weights = np.maximum(decay ** age.astype(np.float64), 1e-300)
        # The newest of a user's events with an item comes first, and unique keeps the first.
        order = np.lexsort((age, self.items, self.owner))
        keys = self.owner[order] * (size + 1) + self.items[order]
        _, first = np.unique(keys, return_index=True)
        kept = order[first]
        shape = (len(self), size + 1)
        return sparse.csr_matrix((weights[kept], (self.owner[kept], self.items[kept])), shape=shape)


class Baseline(Protocol):
    """One way to recommend. `name` is what the command line calls it."""

    name: str

    def fit(self, log: Sequences, size: int, roles: Sequence[int], valid: np.ndarray | None = None) -> None:
        """Learn from the events of these roles. size: items of the catalogue, M. valid: positions of validation events
        for early stopping, where the model has any."""

    def scores(self, histories: Histories) -> np.ndarray:
        """float [B, M], higher is better."""

    def settled(self) -> dict[str, Any]:
        """Options that fitting with `valid` settled, for a fit without it."""


def used_events(log: Sequences, roles: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Owner and item, int64 [E], of the events of these roles, in the order of the log."""
    kept = np.isin(log.roles, np.asarray(roles, np.int8)) & (log.items > 0)
    owner = np.repeat(np.arange(len(log)), np.diff(log.offsets))
    return owner[kept], log.items[kept].astype(np.int64)


def histories_before(log: Sequences, events: np.ndarray) -> Histories:
    """The histories as they stood just before the given events (positions in the log), one row each."""
    starts = log.offsets[np.searchsorted(log.offsets, events, side="right") - 1]
    sizes = events - starts
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    index = np.arange(offsets[-1]) - np.repeat(offsets[:-1] - starts, sizes)
    items = log.items[index].astype(np.int64)
    return Histories(items, offsets, items, offsets)


def best_rows(model: Baseline, histories: Histories, fallback: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best unseen items of each user: 1-based rows int64 [B, min(k, M)], 0 behind the last one, and their scores.

    fallback: float [M], the scores of a user of whom nothing is known.
    """
    rows, best = [], []
    for start in range(0, len(histories), BLOCK):
        part = histories.slice(start, min(start + BLOCK, len(histories)))
        scores = np.tile(fallback, (len(part), 1))
        if len(part.items):
            scores = np.where(part.sizes[:, None] > 0, model.scores(part), scores)
        exclude(scores, part.seen, part.seen_offsets)
        columns = best_columns(scores, k)
        found = np.take_along_axis(scores, columns, 1)
        rows.append(np.where(np.isneginf(found), 0, columns + 1))
        best.append(found)
    if not rows:
        return np.zeros((0, min(k, len(fallback))), np.int64), np.zeros((0, min(k, len(fallback))))
    return np.concatenate(rows), np.concatenate(best)


def popular_rows(histories: Histories, fallback: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """As best_rows, the fallback for everyone."""
    nothing = np.zeros(len(histories) + 1, np.int64)
    unknown = Histories(nothing[:0], nothing, histories.seen, histories.seen_offsets)
    return best_rows(Popular(), unknown, fallback, k)


def validated(model: Baseline, log: Sequences, targets: np.ndarray, fallback: np.ndarray) -> float:
    """NDCG@10 of validation events (positions in the log), each ranked for the history before it."""
    rows, _ = best_rows(model, histories_before(log, targets), fallback, CUTOFF)
    return ranking_metrics.ndcg(ranking_metrics.target_ranks(rows, log.items[targets]), CUTOFF)


def tuned(
    make: Callable[..., Baseline],
    grid: Mapping[str, Sequence[Any]],
    log: Sequences,
    size: int,
    targets: np.ndarray,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The options that are best on the validation events, learning from the events before those.

    grid: the values of each option, the first one to begin with. One option after another is varied and its best value
    kept, which takes the sum of the grid's lengths instead of their product.
    """
    fallback = popularity(log, size, (TRAIN, RANK))
    chosen = {name: values[0] for name, values in grid.items()}
    best = -1.0
    settled: dict[str, Any] = {}
    tried: list[dict[str, Any]] = []
    for name, values in grid.items():
        for value in values:
            options = {**chosen, name: value}
            if options in tried:
                continue
            tried.append(options)
            model = make(**options)
            model.fit(log, size, (TRAIN, RANK), targets)
            score = validated(model, log, targets, fallback)
            note(f"{model.name} {' '.join(f'{k}={v}' for k, v in options.items())}: validation NDCG@10 {score:.4f}")
            if score > best:
                best, chosen, settled = score, options, model.settled()
    return {**chosen, **settled}


def popularity(log: Sequences, size: int, roles: Sequence[int]) -> np.ndarray:
    """float64 [M]: share of the events of these roles that each item has."""
    _, items = used_events(log, roles)
    counts = np.bincount(items, minlength=size + 1)[1:].astype(np.float64)
    return np.asarray(counts / max(counts.sum(), 1.0))


class Popular:
    """The same list for everyone: items by the number of their events."""

    name = "popular"

    def fit(self, log: Sequences, size: int, roles: Sequence[int], valid: np.ndarray | None = None) -> None:
        self.share = popularity(log, size, roles)

    def scores(self, histories: Histories) -> np.ndarray:
        return np.tile(self.share, (len(histories), 1))

    def settled(self) -> dict[str, Any]:
        return {}


class ItemKNN:
    """Cosine of the items' sets of users (Sarwar et al., WWW 2001), summed over a user's items.

    decay: weight of an event relative to the next newer one. neighbours: similar items kept per item. shrink: users
    added to the denominator, which draws the similarity of rare items towards 0.
    """

    name = "item-knn"

    def __init__(self, decay: float = 0.9, neighbours: int = 200, shrink: float = 0.0) -> None:
        self.decay, self.neighbours, self.shrink = decay, neighbours, shrink

    def fit(self, log: Sequences, size: int, roles: Sequence[int], valid: np.ndarray | None = None) -> None:
        owner, items = used_events(log, roles)
        used = sparse.csr_matrix((np.ones(len(items)), (owner, items)), shape=(len(log), size + 1))
        used.data[:] = 1.0
        together = (used.T @ used).tocsr()
        count = together.diagonal()
        together.setdiag(0)
        together.eliminate_zeros()
        entries = together.tocoo()
        together.data = entries.data / (np.sqrt(count[entries.row] * count[entries.col]) + self.shrink)
        self.similar = strongest(together, self.neighbours)
        self.share = popularity(log, size, roles)

    def scores(self, histories: Histories) -> np.ndarray:
        size = len(self.share)
        found = (histories.weights(self.decay, size) @ self.similar).toarray()[:, 1:]
        # Items that no item of the user has met stand behind all others, by popularity.
        return np.asarray(found + 1e-9 * self.share)

    def settled(self) -> dict[str, Any]:
        return {}


class Fusion:
    """Reciprocal rank fusion of the lists of fitted models (Cormack et al., SIGIR 2009): no learning."""

    name = "fusion"

    def __init__(self, models: Sequence[Baseline], fallback: np.ndarray) -> None:
        if not models:
            raise ValueError("a fusion needs at least one model")
        self.models, self.fallback = models, fallback

    def fit(self, log: Sequences, size: int, roles: Sequence[int], valid: np.ndarray | None = None) -> None:
        """The models are fitted already."""

    def scores(self, histories: Histories) -> np.ndarray:
        total = np.zeros((len(histories), len(self.fallback) + 1))
        for model in self.models:
            rows, _ = best_rows(model, histories, self.fallback, FUSED)
            gains = np.broadcast_to(1 / (FUSION_CONSTANT + 1 + np.arange(rows.shape[1])), rows.shape)
            np.add.at(total, (np.arange(len(rows))[:, None], rows), gains)
        return np.asarray(total[:, 1:])

    def settled(self) -> dict[str, Any]:
        return {}
