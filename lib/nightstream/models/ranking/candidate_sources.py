"""Sources of candidates besides the vectors: co-visitation, item-kNN, popularity, trend, popularity in a segment.

All arrays here are in vocabulary rows: 1-based rows of the items that the model was trained with, 0 for any other item.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from nightstream.errors import ArtifactError
from nightstream.models.arrays import Sequences, UserFeatures

MICROSECONDS_PER_DAY = 86_400_000_000


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
class Sources:
    """What the sequences say without a trained vector; V is the vocabulary's size.

    covisitation, knn: CSR float32 [V + 1, V + 1]; row = window item, column = recommended item.
    popularity, trend: float32 [V + 1], decayed shares of events; they sum to 1. segments: float32 [S, V + 1], decayed
    shares within each value of each user attribute, drawn towards popularity; segment_offsets: where each attribute's
    values start. recency: as in SourceSizes.
    """

    covisitation: sparse.csr_matrix
    knn: sparse.csr_matrix
    popularity: np.ndarray
    trend: np.ndarray
    segments: np.ndarray
    segment_offsets: tuple[int, ...]
    recency: float

    def window_weights(self, items: np.ndarray) -> np.ndarray:
        """float32 [B, L]: weight of each event of left-padded windows [B, L]; 0 at unknown items, 1 at the newest."""
        length = items.shape[1]
        weights = self.recency ** np.arange(length - 1, -1, -1, dtype=np.float32)
        return np.where(items > 0, weights, 0).astype(np.float32)

    def neighbour_scores(self, items: np.ndarray, neighbours: sparse.csr_matrix) -> sparse.csr_matrix:
        """CSR float32 [B, V + 1]: weighted sum of the neighbour lists of the window items [B, L] (vocabulary rows)."""
        rows, columns = np.nonzero(items)
        weights = self.window_weights(items)[rows, columns]
        window = sparse.csr_matrix((weights, (rows, items[rows, columns])), shape=(len(items), neighbours.shape[0]))
        return window @ neighbours

    def segment_scores(self, users: UserFeatures, items: np.ndarray) -> np.ndarray:
        """float32 [B, C], of vocabulary rows [B, C]: mean over a user's attributes of the item's share among users who
        have them; the item's share among all users where there are none."""
        total = np.zeros(items.shape, np.float32)
        found = np.zeros((len(users), 1), np.float32)
        for offset, values in zip(self.segment_offsets, users.categories, strict=False):
            if offset < 0:
                continue
            for column in values.T:
                has = column > 0
                total[has] += self.segments[(offset + column[has])[:, None], items[has]]
                found[has] += 1
        return np.where(found > 0, total / np.maximum(found, 1), self.popularity[items]).astype(np.float32)

    def to_arrays(self) -> dict[str, np.ndarray]:
        arrays = {"popularity": self.popularity, "trend": self.trend, "segments": self.segments}
        arrays["segment_offsets"] = np.asarray(self.segment_offsets, np.int64)
        arrays["recency"] = np.asarray([self.recency], np.float64)
        for name, matrix in (("covisitation", self.covisitation), ("knn", self.knn)):
            arrays |= {f"{name}.data": matrix.data, f"{name}.indices": matrix.indices.astype(np.int32)}
            arrays[f"{name}.indptr"] = matrix.indptr.astype(np.int64)
        return arrays

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> Sources:
        """ArtifactError if an array is missing."""
        try:
            rows = len(arrays["popularity"])
            covisited, alike = (
                sparse.csr_matrix((arrays[f"{n}.data"], arrays[f"{n}.indices"], arrays[f"{n}.indptr"]), (rows, rows))
                for n in ("covisitation", "knn")
            )
            return cls(
                covisited,
                alike,
                arrays["popularity"],
                arrays["trend"],
                arrays["segments"],
                tuple(int(n) for n in arrays["segment_offsets"]),
                float(arrays["recency"][0]),
            )
        except (KeyError, ValueError) as error:
            raise ArtifactError(f"the candidate sources are incomplete: {error}") from error


def strongest(matrix: sparse.csr_matrix, count: int) -> sparse.csr_matrix:
    """The matrix with only the `count` greatest entries of each row; of equals the lower column stays."""
    matrix = matrix.tocsr()
    matrix.sort_indices()
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    order = np.lexsort((matrix.indices, -matrix.data, rows))
    place = np.arange(len(order)) - matrix.indptr[rows[order]]
    kept = np.sort(order[place < count])
    out = sparse.csr_matrix((matrix.data[kept], (rows[kept], matrix.indices[kept])), shape=matrix.shape)
    out.sort_indices()
    return out


def strongest_columns(matrix: sparse.csr_matrix, eligible: np.ndarray, count: int) -> np.ndarray:
    """int64 [B, count]: the columns of the greatest entries above 0 of each row that are eligible (bool [B, M]), in any
    order, −1 where there are no more; of equals the lower column, so that a row's result is its own."""
    owner = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    kept = (matrix.data > 0) & eligible[owner, matrix.indices]
    owner, columns, values = owner[kept], matrix.indices[kept], matrix.data[kept]
    order = np.lexsort((columns, -values, owner))
    owner, columns = owner[order], columns[order]
    starts = np.searchsorted(owner, np.arange(matrix.shape[0]))
    place = np.arange(len(owner)) - starts[owner]
    out = np.full((matrix.shape[0], count), -1)
    first = place < count
    out[owner[first], place[first]] = columns[first]
    return out


def covisitation(owner: np.ndarray, items: np.ndarray, rows: int, reach: int, neighbours: int) -> sparse.csr_matrix:
    """CSR [rows, rows]: how often column follows row within `reach` events of a user, weighted by 1 / distance (half
    of it when column comes before row), divided by the root of both items' counts.

    owner, items: [E] user and item of each event, users together and in order.
    """
    total = sparse.csr_matrix((rows, rows), dtype=np.float64)
    for distance in range(1, reach + 1):
        same = (owner[distance:] == owner[:-distance]) & (items[distance:] != items[:-distance])
        before, after = items[:-distance][same], items[distance:][same]
        weight = np.full(len(before), 1 / distance)
        forward = sparse.coo_matrix((weight, (before, after)), shape=(rows, rows)).tocsr()
        total = total + forward + 0.5 * forward.T
    counts = np.maximum(np.bincount(items, minlength=rows), 1) + 5.0
    scale = sparse.diags(counts**-0.5)
    return strongest((scale @ total @ scale).tocsr(), neighbours).astype(np.float32)


def item_knn(owner: np.ndarray, items: np.ndarray, rows: int, neighbours: int, shrink: float) -> sparse.csr_matrix:
    """CSR [rows, rows]: cosine of the items' user sets (Sarwar et al., WWW 2001), drawn towards 0 where few users are
    known by `shrink` users more in the denominator; a user of many items counts less, by log(2 + items), and the mean
    user counts as one."""
    users = int(owner.max()) + 1 if len(owner) else 1
    used = sparse.csr_matrix((np.ones(len(items)), (owner, items)), shape=(users, rows))
    used.data[:] = 1.0
    weights = 1 / np.log(2 + np.asarray(used.sum(1)).ravel())
    together = (used.T @ sparse.diags(weights / weights.mean()) @ used).tocsr()
    size = together.diagonal()
    together.setdiag(0)
    together.eliminate_zeros()
    row, column = together.nonzero()
    together.data /= np.sqrt(size[row] * size[column]) + shrink
    return strongest(together, neighbours).astype(np.float32)


def decayed_shares(items: np.ndarray, times: np.ndarray, rows: int, half_life_days: float) -> np.ndarray:
    """float32 [rows]: share of events per item; an event weighs half for each half-life before the newest one."""
    if not len(items):
        return np.zeros(rows, np.float32)
    age = (times.max() - times) / MICROSECONDS_PER_DAY
    weights = 0.5 ** np.minimum(age / max(half_life_days, 1e-9), 60.0)
    counts = np.bincount(items, weights, minlength=rows)
    counts[0] = 0
    return np.asarray(counts / max(counts.sum(), 1e-300), np.float32)


def fit_sources(sequences: Sequences, vocabulary: int, roles: tuple[int, ...], sizes: SourceSizes) -> Sources:
    """Counts everything from the events of the given roles; a fixed function of its inputs."""
    rows = vocabulary + 1
    kept = np.isin(sequences.roles, np.asarray(roles, np.int8)) & (sequences.items > 0)
    everyone = np.repeat(np.arange(len(sequences)), np.diff(sequences.offsets))
    owner, items, times = everyone[kept], sequences.items[kept].astype(np.int64), sequences.times[kept]
    ends = np.searchsorted(owner, owner, side="right")
    recent = ends - np.arange(len(owner)) <= sizes.history
    span = float(times.max() - times.min()) / MICROSECONDS_PER_DAY if len(times) else 1.0
    half_life = sizes.half_life_days if sizes.half_life_days is not None else max(span, 1e-6)
    trend_half_life = sizes.trend_half_life_days if sizes.trend_half_life_days is not None else max(span / 50, 1e-6)
    popularity = decayed_shares(items, times, rows, half_life)
    segments, offsets = _segments(sequences.users, owner, items, rows, popularity, sizes.prior_events)
    return Sources(
        covisitation(owner, items, rows, sizes.reach, sizes.neighbours),
        item_knn(owner[recent], items[recent], rows, sizes.neighbours, sizes.shrink),
        popularity,
        decayed_shares(items, times, rows, trend_half_life),
        segments,
        offsets,
        sizes.recency,
    )


def _segments(
    users: UserFeatures, owner: np.ndarray, items: np.ndarray, rows: int, popularity: np.ndarray, prior: float
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Shares per attribute value, and where each attribute starts (−1: too many values to be segments)."""
    parts: list[np.ndarray] = []
    offsets: list[int] = []
    start = 0
    for values, size in zip(users.categories, users.category_sizes, strict=True):
        if size > 100:
            offsets.append(-1)
            continue
        offsets.append(start)
        counts = np.zeros((size, rows), np.float64)
        for column in values.T:
            np.add.at(counts, (column[owner], items), 1.0)
        parts.append((counts + prior * popularity) / (counts.sum(1, keepdims=True) + prior))
        start += size
    if not parts:
        return np.zeros((0, rows), np.float32), tuple(offsets)
    return np.concatenate(parts).astype(np.float32), tuple(offsets)
