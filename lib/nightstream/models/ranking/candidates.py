"""What every source says of a catalogue, and the items that it puts forward for each user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse

from nightstream.models.arrays import Catalogue, Windows
from nightstream.models.ranking.candidate_sources import Sources, strongest_columns
from nightstream.models.ranking.topk import best_unordered, exclude, unit

ENSEMBLE_CANDIDATES = 60


MEMBER_CANDIDATES = 30


OTHER_CANDIDATES = 30


POPULAR_CANDIDATES = 15


@dataclass(frozen=True)
class Prepared:
    """What a catalogue of M items and a model have in common, computed once.

    to_vocabulary: int64 [M + 1], vocabulary row of each catalogue row, 0 for an item the model has not met.
    from_vocabulary: int64 [V + 1], catalogue column of each vocabulary row, −1 for an item that is not in it.
    withdrawn: int64 [W], columns of the items that are not available. padded_members: float32 [M + 1, D_m] per ensemble
    member, unit vectors, row 0 zero. names, weights: of the members. log_popularity, log_trend: float32 [M], of shares
    plus the floor. by_popularity, by_trend: int64 [M], columns from the greatest share down.
    """

    catalogue: Catalogue
    to_vocabulary: np.ndarray
    from_vocabulary: np.ndarray
    withdrawn: np.ndarray
    names: tuple[str, ...]
    weights: tuple[float, ...]
    padded_members: tuple[np.ndarray, ...]
    log_popularity: np.ndarray
    log_trend: np.ndarray
    by_popularity: np.ndarray
    by_trend: np.ndarray
    floor: np.float32

    def columns(self, scores: sparse.csr_matrix) -> sparse.csr_matrix:
        """CSR [B, M] from [B, V + 1]: scores by vocabulary row as scores by catalogue column, in ascending columns."""
        columns = self.from_vocabulary[scores.indices]
        owner = np.repeat(np.arange(scores.shape[0]), np.diff(scores.indptr))
        here = columns >= 0
        parts = (scores.data[here], (owner[here], columns[here]))
        return sparse.csr_matrix(parts, (scores.shape[0], len(self.catalogue)))


def prepare(
    catalogue: Catalogue,
    row_of: Mapping[str, int],
    members: Sequence[tuple[str, int, float]],
    sources: Sources,
) -> Prepared:
    """members: name, width and weight of each, in the order of the vectors' columns."""
    rows = np.fromiter((row_of.get(i, 0) for i in catalogue.item_ids), np.int64, len(catalogue))
    to_vocabulary = np.concatenate([[0], rows])
    tables = []
    start = 0
    for _, width, _ in members:
        part = unit(catalogue.vectors[:, start : start + width])
        tables.append(np.concatenate([np.zeros((1, width), np.float32), part]))
        start += width
    from_vocabulary = np.full(len(sources.popularity), -1)
    from_vocabulary[rows] = np.arange(len(rows))
    from_vocabulary[0] = -1
    floor = np.float32(0.1 / max(1, len(catalogue)))
    popularity, trend = (np.where(rows > 0, s[rows], 0) for s in (sources.popularity, sources.trend))
    return Prepared(
        catalogue,
        to_vocabulary,
        from_vocabulary,
        np.flatnonzero(~catalogue.available),
        tuple(name for name, _, _ in members),
        tuple(weight for _, _, weight in members),
        tuple(tables),
        np.log(popularity + floor).astype(np.float32),
        np.log(trend + floor).astype(np.float32),
        np.argsort(-popularity, kind="stable"),
        np.argsort(-trend, kind="stable"),
        floor,
    )


@dataclass(frozen=True)
class Scores:
    """What is known of every catalogue item before candidates are chosen.

    ensemble, members: float32 [B, M], cosines; −inf at what a user may not get. covisitation, knn: CSR [B, M].
    """

    ensemble: np.ndarray
    members: tuple[np.ndarray, ...]
    covisitation: sparse.csr_matrix
    knn: sparse.csr_matrix


def score_block(windows: Windows, vectors: np.ndarray, table: Prepared, sources: Sources, full: bool) -> Scores:
    """vectors: [B, D] user vectors. full: whether the ranker's sources are wanted too (they stay empty otherwise)."""

    def cosines(users: np.ndarray, items: np.ndarray) -> np.ndarray:
        # numpy's BLAS has threads of its own, which get into each other's way where blocks are computed side by side.
        found = (torch.from_numpy(users) @ torch.from_numpy(items).T).numpy()
        found[:, table.withdrawn] = -np.inf
        exclude(found, windows.seen, windows.seen_offsets)
        return np.asarray(found)

    ensemble = cosines(vectors, table.catalogue.vectors)
    if not full:
        nothing = sparse.csr_matrix(ensemble.shape, dtype=np.float32)
        return Scores(ensemble, (), nothing, nothing)
    members = []
    start = 0
    for padded in table.padded_members:
        width = padded.shape[1]
        members.append(cosines(unit(vectors[:, start : start + width]), padded[1:]))
        start += width
    known = table.to_vocabulary[windows.items]
    neighbours = (table.columns(sources.neighbour_scores(known, m)) for m in (sources.covisitation, sources.knn))
    return Scores(ensemble, tuple(members), *neighbours)


def candidates(scores: Scores, table: Prepared, k: int) -> np.ndarray:
    """int64 [B, C] columns in ascending order, −1 at duplicates and at what a user may not get.

    At least k of them come by the ensemble alone, so that no list is shorter than it could be.
    """
    items = scores.ensemble.shape[1]
    parts = [best_unordered(scores.ensemble, min(max(k, ENSEMBLE_CANDIDATES), items))]
    if len(scores.members) > 1:
        parts += [best_unordered(s, min(MEMBER_CANDIDATES, items)) for s in scores.members]
    for order in (table.by_popularity, table.by_trend):
        parts.append(_first_eligible(order, scores.ensemble, min(POPULAR_CANDIDATES, items)))
    for values in (scores.covisitation, scores.knn):
        parts.append(strongest_columns(values, scores.ensemble > -np.inf, min(OTHER_CANDIDATES, items)))
    columns = np.sort(np.concatenate(parts, 1), axis=1)
    repeated = np.zeros_like(columns, dtype=bool)
    repeated[:, 1:] = columns[:, 1:] == columns[:, :-1]
    left_out = repeated | (columns < 0) | np.isneginf(np.take_along_axis(scores.ensemble, columns, 1))
    return np.where(left_out, -1, columns)


def _first_eligible(order: np.ndarray, scores: np.ndarray, size: int) -> np.ndarray:
    """int64 [B, size]: the first columns of the order whose score [B, M] is not −inf; −1 where there are no more."""
    reach = size
    while True:
        reach = min(2 * reach, len(order))
        eligible = scores[:, order[:reach]] > -np.inf
        if reach == len(order) or (eligible.sum(1) >= size).all():
            break
    first = eligible & (np.cumsum(eligible, 1) <= size)
    users, places = np.nonzero(first)
    out = np.full((len(scores), size), -1)
    out[users, np.cumsum(first, 1)[users, places] - 1] = order[places]
    return out
