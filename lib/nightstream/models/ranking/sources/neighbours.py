"""Items that go together: co-visitation, and item-kNN by the users that two items share."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Self

import numpy as np
from scipy import sparse

from nightstream.models.arrays import Windows
from nightstream.models.ranking.sources.base import (
    CandidateSource,
    CatalogueView,
    Feature,
    History,
    SourceSizes,
    Strategy,
)

TOGETHER = Strategy(
    "covisitation", "Often taken together with “{title}”", "Often taken together with your latest items"
)


@dataclass(frozen=True)
class Neighbours(CandidateSource):
    """A list of related items for each item, added up over the window.

    neighbours: CSR float32 [V + 1, V + 1]; row = window item, column = recommended item.
    """

    neighbours: sparse.csr_matrix
    strategy = TOGETHER

    def __init_subclass__(cls) -> None:
        cls.features = (
            Feature(cls.name),
            Feature(f"{cls.name}_share", linear=True, log=True),
            Feature(f"{cls.name}_place"),
        )
        cls.arrays = (f"{cls.name}.data", f"{cls.name}.indices", f"{cls.name}.indptr")

    @classmethod
    @abstractmethod
    def relate(cls, history: History, sizes: SourceSizes) -> sparse.csr_matrix:
        """The neighbour lists that the events give."""

    @classmethod
    def fit(cls, history: History, sizes: SourceSizes) -> Self:
        return cls(cls.relate(history, sizes))

    def to_arrays(self) -> dict[str, np.ndarray]:
        matrix = self.neighbours
        parts = (matrix.data, matrix.indices.astype(np.int32), matrix.indptr.astype(np.int64))
        return dict(zip(self.arrays, parts, strict=True))

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> Self:
        data, indices, indptr = (arrays[name] for name in cls.arrays)
        rows = len(indptr) - 1
        return cls(sparse.csr_matrix((data, indices, indptr), (rows, rows)))

    def user_scores(self, view: CatalogueView, windows: Windows) -> sparse.csr_matrix:
        return view.columns(neighbour_scores(self.neighbours, view.known(windows), view.recency))

    def because(self, view: CatalogueView, windows: Windows, users: np.ndarray, columns: np.ndarray) -> np.ndarray:
        known, target = view.to_vocabulary[windows.items[users]], view.to_vocabulary[columns + 1]
        flat, repeated = known.ravel(), np.repeat(target, known.shape[1])
        strength = np.asarray(self.neighbours[flat, repeated]).reshape(known.shape)
        added = strength * window_weights(known, view.recency)
        # Neighbour lists have different units: each counts relative to its own sum over the window.
        return np.asarray(added / np.maximum(added.sum(1, keepdims=True), 1e-12))


class Covisitation(Neighbours):
    name = "covisitation"

    @classmethod
    def relate(cls, history: History, sizes: SourceSizes) -> sparse.csr_matrix:
        return covisitation(history.owner, history.items, history.rows, sizes.reach, sizes.neighbours)


class ItemKnn(Neighbours):
    name = "knn"

    @classmethod
    def relate(cls, history: History, sizes: SourceSizes) -> sparse.csr_matrix:
        owner = history.owner
        ends = np.searchsorted(owner, owner, side="right")
        recent = ends - np.arange(len(owner)) <= sizes.history
        return item_knn(owner[recent], history.items[recent], history.rows, sizes.neighbours, sizes.shrink)


def window_weights(items: np.ndarray, recency: float) -> np.ndarray:
    """float32 [B, L]: weight of each event of left-padded windows [B, L]; 0 at unknown items, 1 at the newest."""
    length = items.shape[1]
    weights = recency ** np.arange(length - 1, -1, -1, dtype=np.float32)
    return np.where(items > 0, weights, 0).astype(np.float32)


def neighbour_scores(neighbours: sparse.csr_matrix, items: np.ndarray, recency: float) -> sparse.csr_matrix:
    """The neighbour lists of the window items, added up with the weights of window_weights.

    Args:
        neighbours: CSR float32 [V + 1, V + 1].
        items: int64 [B, L], vocabulary rows.
        recency: Weight of an event relative to the next newer one.

    Returns:
        CSR float32 [B, V + 1].
    """
    rows, columns = np.nonzero(items)
    weights = window_weights(items, recency)[rows, columns]
    window = sparse.csr_matrix((weights, (rows, items[rows, columns])), shape=(len(items), neighbours.shape[0]))
    return window @ neighbours


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
