"""What the encoders and every source say of a catalogue, and the items that they put forward for each user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse

from nightstream.models.arrays import Catalogue, Windows
from nightstream.models.ranking.candidate_sources import Sources
from nightstream.models.ranking.sources.base import Candidates, CatalogueView
from nightstream.models.ranking.topk import best_unordered, exclude, unit

ENSEMBLE_CANDIDATES = 60
MEMBER_CANDIDATES = 30


@dataclass(frozen=True)
class ItemScores:
    """What a source says of the catalogue whoever asks. scores: float32 [M]. order: int64 [M], columns from the
    greatest score down, of equals the lower first."""

    scores: np.ndarray
    order: np.ndarray


@dataclass(frozen=True)
class Prepared(CatalogueView):
    """What a catalogue of M items and a model have in common, computed once.

    withdrawn: int64 [W], columns of the items that are not available. padded_members: float32 [M + 1, D_m] per ensemble
    member, unit vectors, row 0 zero. names, weights: of the members. item_scores: of the sources that have them.
    """

    catalogue: Catalogue
    withdrawn: np.ndarray
    names: tuple[str, ...]
    weights: tuple[float, ...]
    padded_members: tuple[np.ndarray, ...]
    item_scores: dict[str, ItemScores]


def prepare(
    catalogue: Catalogue,
    row_of: Mapping[str, int],
    members: Sequence[tuple[str, int, float]],
    sources: Sources,
) -> Prepared:
    """The catalogue as a model sees it.

    Args:
        catalogue: M items.
        row_of: Vocabulary row of each item id.
        members: Name, width and weight of each, in the order of the vectors' columns.
        sources: Of the model.
    """
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
    popularity = np.where(rows > 0, sources.popularity[rows], 0)
    log_popularity = np.log(popularity + floor).astype(np.float32)
    view = CatalogueView(to_vocabulary, from_vocabulary, sources.popularity, floor, log_popularity, sources.recency)
    item_scores = {}
    for name, source in sources.fitted.items():
        scores = source.item_scores(view)
        if scores is not None:
            item_scores[name] = ItemScores(scores, np.argsort(-scores, kind="stable"))
    return Prepared(
        **vars(view),
        catalogue=catalogue,
        withdrawn=np.flatnonzero(~catalogue.available),
        names=tuple(name for name, _, _ in members),
        weights=tuple(weight for _, _, weight in members),
        padded_members=tuple(tables),
        item_scores=item_scores,
    )


@dataclass(frozen=True)
class Scores:
    """What is known of every catalogue item for B users before candidates are chosen.

    ensemble, members: float32 [B, M], cosines; −inf at what a user may not get. sources: CSR [B, M] of the sources that
    have user_scores.
    """

    ensemble: np.ndarray
    members: tuple[np.ndarray, ...]
    sources: dict[str, sparse.csr_matrix]


def score_block(windows: Windows, vectors: np.ndarray, table: Prepared, sources: Sources, full: bool) -> Scores:
    """What is known of every item for the users of one block.

    Args:
        windows: Of B users.
        vectors: float32 [at least B, D], user vectors; more where they fill a block up, so that a user's cosines are
            the same in any block.
        table: The catalogue as the model sees it.
        sources: Of the model.
        full: Whether what the ranker reads is wanted too: members and sources stay empty otherwise.
    """

    def cosines(users: np.ndarray, items: np.ndarray) -> torch.Tensor:
        # numpy's BLAS has threads of its own, which get into each other's way where blocks are computed side by side.
        return (torch.from_numpy(users) @ torch.from_numpy(items).T)[: len(windows)]

    def eligible(similarities: torch.Tensor) -> np.ndarray:
        scores = similarities.numpy()
        scores[:, table.withdrawn] = -np.inf
        exclude(scores, windows.seen, windows.seen_offsets)
        return np.asarray(scores)

    if not full:
        return Scores(eligible(cosines(vectors, table.catalogue.vectors)), (), {})
    members = []
    start = 0
    for padded in table.padded_members:
        width = padded.shape[1]
        members.append(cosines(unit(vectors[:, start : start + width]), padded[1:]))
        start += width
    # That of the whole vectors is the weighted mean of the members' cosines, and an addition costs less than a product.
    ensemble = members[0] * table.weights[0]
    for similarities, weight in zip(members[1:], table.weights[1:], strict=True):
        ensemble.add_(similarities, alpha=weight)
    said = {}
    for name, source in sources.fitted.items():
        scores = source.user_scores(table, windows)
        if scores is not None:
            # A source may give them in any order.
            scores.sort_indices()
            said[name] = scores
    return Scores(eligible(ensemble), tuple(eligible(similarities) for similarities in members), said)


def candidates(scores: Scores, table: Prepared, sources: Sources, k: int) -> np.ndarray:
    """The items that the encoders and each source put forward.

    Args:
        scores: Of the full kind, for B users.
        table: The catalogue as the model sees it.
        sources: Of the model.
        k: Length of a list: at least k candidates come by the ensemble alone, so that no list is shorter than it could
            be.

    Returns:
        int64 [B, C] catalogue columns in ascending order, −1 at duplicates and at what a user may not get.
    """
    items = scores.ensemble.shape[1]
    parts = [best_unordered(scores.ensemble, min(max(k, ENSEMBLE_CANDIDATES), items))]
    if len(scores.members) > 1:
        parts += [best_unordered(s, min(MEMBER_CANDIDATES, items)) for s in scores.members]
    for name, source in sources.fitted.items():
        limit = min(source.limit, items)
        if name in table.item_scores:
            parts.append(_first_eligible(table.item_scores[name].order, scores.ensemble, limit))
        elif name in scores.sources:
            parts.append(strongest_columns(scores.sources[name], scores.ensemble > -np.inf, limit))
    columns = np.sort(np.concatenate(parts, 1), axis=1)
    repeated = np.zeros_like(columns, dtype=bool)
    repeated[:, 1:] = columns[:, 1:] == columns[:, :-1]
    left_out = repeated | (columns < 0) | np.isneginf(np.take_along_axis(scores.ensemble, columns, 1))
    return np.where(left_out, -1, columns)


def as_source_sees(name: str, columns: np.ndarray, scores: Scores, table: Prepared, windows: Windows) -> Candidates:
    """The candidates, with what one source says of them.

    Args:
        name: Of the source.
        columns: int64 [B, C], of the catalogue, −1 where there is none.
        scores: Of the full kind, for the same B users.
        table: The catalogue as the model sees it.
        windows: Of the same users.
    """
    at = np.maximum(columns, 0)
    if name in table.item_scores:
        own = table.item_scores[name].scores[at]
    elif name in scores.sources:
        users = np.repeat(np.arange(len(at)), at.shape[1])
        own = np.asarray(scores.sources[name][users, at.ravel()]).reshape(at.shape)
    else:
        own = np.zeros(at.shape, np.float32)
    return Candidates(table, windows, at, columns >= 0, own)


def strongest_columns(matrix: sparse.csr_matrix, eligible: np.ndarray, count: int) -> np.ndarray:
    """The columns of the greatest entries above 0 of each row; of equals the lower, so that a row's result is its own.

    Args:
        matrix: CSR [B, M], columns in ascending order.
        eligible: bool [B, M].
        count: Columns per row.

    Returns:
        int64 [B, count], in any order, −1 where there are no more.
    """
    owner = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    kept = (matrix.data > 0) & eligible[owner, matrix.indices]
    owner, columns, values = owner[kept], matrix.indices[kept], matrix.data[kept]
    # Stable, so of equals the lower column stays first.
    order = np.lexsort((-values, owner))
    owner, columns = owner[order], columns[order]
    starts = np.searchsorted(owner, np.arange(matrix.shape[0]))
    place = np.arange(len(owner)) - starts[owner]
    out = np.full((matrix.shape[0], count), -1)
    first = place < count
    out[owner[first], place[first]] = columns[first]
    return out


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
