"""One block of users to lists: candidates from every source, features, scores, reasons. The only place that does it, so
the ranker is trained on what it meets later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse

from nightstream.models.arrays import Catalogue, Lists, Windows
from nightstream.models.ranking.candidate_sources import Sources, strongest_columns
from nightstream.models.ranking.ranker import Ranker, feature_groups
from nightstream.models.ranking.strategies import STRATEGIES, strongest_event, strongest_group
from nightstream.models.ranking.topk import best_columns, best_unordered, exclude, unit

ENSEMBLE_CANDIDATES = 60
MEMBER_CANDIDATES = 30
OTHER_CANDIDATES = 30
POPULAR_CANDIDATES = 15
RECENT_EVENTS = 8
TIE_BREAK = np.float32(1e-3)
SEQUENCE, COVISITATION, CONTENT, POPULAR, TRENDING, SEGMENT = range(len(STRATEGIES))


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


def empty_lists(users: int, k: int, width: int) -> Lists:
    return Lists(
        np.zeros((users, k), np.int32),
        np.zeros((users, k), np.float32),
        np.zeros((users, k), np.int8),
        np.zeros((users, k), np.int32),
        np.zeros((users, width), np.float32),
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


def features(scores: Scores, table: Prepared, windows: Windows, sources: Sources, columns: np.ndarray) -> np.ndarray:
    """float32 [B, C, F], in the order of ranking.feature_names; meaningless where columns are −1."""
    valid = columns >= 0
    at = np.maximum(columns, 0)
    users = np.repeat(np.arange(len(at)), at.shape[1])

    def take(values: np.ndarray | sparse.csr_matrix) -> np.ndarray:
        if isinstance(values, np.ndarray):
            return np.where(valid, np.take_along_axis(values, at, 1), 0)
        return np.asarray(values[users, at.ravel()]).reshape(at.shape)

    def place(values: np.ndarray) -> np.ndarray:
        order = np.argsort(-np.where(valid, values, -np.inf), axis=1, kind="stable")
        places = np.empty_like(order)
        np.put_along_axis(places, order, np.broadcast_to(np.arange(order.shape[1]), order.shape), 1)
        return places

    def highest(values: np.ndarray) -> np.ndarray:
        return np.asarray(np.where(valid, values, -np.inf).max(1, keepdims=True))

    ensemble, covisitation, knn = take(scores.ensemble), take(scores.covisitation), take(scores.knn)
    popularity = table.log_popularity[at]
    segment = sources.segment_scores(windows.users, table.to_vocabulary[at + 1])
    out = [ensemble, highest(ensemble) - ensemble, place(ensemble), *_cosines_to_window(table, windows, at)]
    for values in (covisitation, knn):
        out += [values, values / np.maximum(highest(values), 1e-12), place(values)]
    out += [popularity, table.log_trend[at] - popularity]
    out += [np.log(segment + table.floor) - popularity]
    out += [np.broadcast_to((windows.items > 0).sum(1, keepdims=True), at.shape)]
    for member in scores.members:
        values = take(member)
        out += [values, highest(values) - values, place(values)]
    return np.stack([np.asarray(o, np.float32) for o in out], 2)


def _cosines_to_window(table: Prepared, windows: Windows, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [B, C] each: cosine of the columns' items with the newest event, and with the mean of the recent ones."""
    last, recent = np.zeros((2, *columns.shape), np.float32)
    for weight, padded in zip(table.weights, table.padded_members, strict=True):
        window = padded[windows.items[:, -RECENT_EVENTS:]]
        ends = np.stack([window[:, -1], unit(window.sum(1))], 2)
        found = np.float32(weight) * (padded[columns + 1] @ ends)
        last += found[:, :, 0]
        recent += found[:, :, 1]
    return last, recent


def recommend_block(
    windows: Windows, vectors: np.ndarray, table: Prepared, sources: Sources, ranker: Ranker | None, k: int
) -> Lists:
    """Lists of one block; Model.recommend states the contract."""
    count, items = len(windows), len(table.catalogue)
    k_found = min(k, items)
    lists = empty_lists(count, k, vectors.shape[1])
    lists.vectors[:] = vectors
    has_window = np.asarray((windows.items > 0).any(1))
    scores = score_block(windows, vectors, table, sources, ranker is not None)
    values: np.ndarray | None = None
    if ranker is not None and has_window.any():
        columns = candidates(scores, table, k)
        values = features(scores, table, windows, sources, columns)
        valid = (columns >= 0) & has_window[:, None]
        ranked = np.full(columns.shape, -np.inf, np.float32)
        # Trees give many candidates the very same score; among those the cosine decides.
        ranked[valid] = ranker.score(values[valid]) + TIE_BREAK * values[valid][:, 0]
        places = best_columns(ranked, k_found)
        chosen = np.take_along_axis(columns, places, 1)
        best = np.take_along_axis(ranked, places, 1)
        values = np.take_along_axis(values, places[:, :, None], 1)
    else:
        chosen = best_columns(scores.ensemble, k_found)
        best = np.take_along_axis(scores.ensemble, chosen, 1)
    rest = np.flatnonzero(~has_window)
    if len(rest):
        everything = np.broadcast_to(table.to_vocabulary[1:], (len(rest), items))
        segment = sources.segment_scores(windows.users.take(rest), everything)
        segment[np.isneginf(scores.ensemble[rest])] = -np.inf
        chosen[rest] = best_columns(segment, k_found)
        best[rest] = np.take_along_axis(segment, chosen[rest], 1)
    found = ~np.isneginf(best)
    lists.rows[:, :k_found] = np.where(found, chosen + 1, 0)
    lists.scores[:, :k_found] = np.where(found, best, 0)
    _explain(lists, windows, table, sources, scores, ranker, values)
    return lists


def _explain(
    lists: Lists,
    windows: Windows,
    table: Prepared,
    sources: Sources,
    scores: Scores,
    ranker: Ranker | None,
    values: np.ndarray | None,
) -> None:
    """Fills strategies and because of the lists in place."""
    rows, places = np.nonzero(lists.rows)
    if not len(rows):
        return
    chosen = lists.rows[rows, places].astype(np.int64)
    segment = sources.segment_scores(windows.users, table.to_vocabulary[lists.rows])[rows, places]
    cold = table.to_vocabulary[chosen] == 0
    with_window = np.asarray((windows.items > 0).any(1))[rows]
    strategy = np.where(cold, CONTENT, SEQUENCE)
    if ranker is not None and values is not None:
        used = np.flatnonzero(with_window)
        contributions = ranker.contributions(values[rows[used], places[used]])
        known = table.to_vocabulary[chosen[used]]
        allowed = np.ones((len(used), len(STRATEGIES)), bool)
        at = (rows[used], chosen[used] - 1)
        together = [np.asarray(s[at]).ravel() for s in (scores.covisitation, scores.knn)]
        allowed[:, COVISITATION] = (together[0] > 0) | (together[1] > 0)
        allowed[:, POPULAR] = sources.popularity[known] > 0
        allowed[:, TRENDING] = sources.trend[known] > sources.popularity[known]
        allowed[:, SEGMENT] = segment[used] > sources.popularity[known]
        allowed[:, CONTENT] = False
        found = strongest_group(contributions, feature_groups(table.names), allowed)
        strategy[used] = np.where((found == SEQUENCE) & cold[used], CONTENT, found)
    without = ~with_window
    liked = segment > sources.popularity[table.to_vocabulary[chosen]]
    strategy = np.where(without, np.where(liked, SEGMENT, POPULAR), strategy)
    lists.strategies[rows, places] = strategy
    lists.because[rows, places] = _because(rows, chosen, strategy, windows, table, sources)


def _because(
    rows: np.ndarray, chosen: np.ndarray, strategy: np.ndarray, windows: Windows, table: Prepared, sources: Sources
) -> np.ndarray:
    """int32 [N]: the window item that a reason names. For co-visitation the event that adds most to the neighbour
    score, exactly; for the vectors the recent event most similar to the item in the space that scored it."""
    out = np.zeros(len(rows), np.int32)
    pick = np.flatnonzero(strategy == COVISITATION)
    if len(pick):
        events = windows.items[rows[pick]]
        known, target = table.to_vocabulary[events], table.to_vocabulary[chosen[pick]]
        flat, repeated = known.ravel(), np.repeat(target, known.shape[1])
        strength = [np.asarray(m[flat, repeated]).reshape(known.shape) for m in (sources.covisitation, sources.knn)]
        # The two neighbour lists have different units: each counts relative to its own sum over the window.
        weights = sources.window_weights(known)
        shares = [s * weights / np.maximum((s * weights).sum(1, keepdims=True), 1e-12) for s in strength]
        place = strongest_event(np.asarray(shares[0] + shares[1]))
        out[pick] = np.where(place >= 0, events[np.arange(len(pick)), place], 0)
    pick = np.flatnonzero((strategy == SEQUENCE) | (strategy == CONTENT))
    if len(pick):
        events = windows.items[rows[pick]][:, -RECENT_EVENTS:]
        closeness = np.zeros(events.shape, np.float32)
        for weight, padded in zip(table.weights, table.padded_members, strict=True):
            target = padded[chosen[pick]][:, :, None]
            closeness += np.float32(weight) * (padded[events] @ target)[:, :, 0]
        place = strongest_event(np.where(events > 0, closeness + 1, 0))
        out[pick] = np.where(place >= 0, events[np.arange(len(pick)), place], 0)
    return out
