"""One block of users to lists: candidates from every source, features, scores, reasons. The only place that does it, so
the ranker is trained on what it meets later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nightstream.blocks import Catalogue, Lists, Windows
from nightstream.explain import STRATEGIES, strongest_event, strongest_group
from nightstream.ranking import Ranker, feature_groups
from nightstream.retrieval import Sources
from nightstream.similarity import best_columns, exclude, unit

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
    identity: whether catalogue and vocabulary are the same rows. padded_members: float32 [M + 1, D_m] per ensemble
    member, unit vectors, row 0 zero. names, weights: of the members. log_popularity, log_trend: float32 [M], of shares
    plus the floor.
    """

    catalogue: Catalogue
    to_vocabulary: np.ndarray
    identity: bool
    names: tuple[str, ...]
    weights: tuple[float, ...]
    padded_members: tuple[np.ndarray, ...]
    log_popularity: np.ndarray
    log_trend: np.ndarray
    floor: np.float32

    def columns(self, scores: np.ndarray) -> np.ndarray:
        """[B, M] from [B, V + 1]: vocabulary scores as catalogue scores, 0 for items the model has not met."""
        return scores[:, 1:] if self.identity else scores[:, self.to_vocabulary[1:]]


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
    floor = np.float32(0.1 / max(1, len(catalogue)))
    return Prepared(
        catalogue,
        to_vocabulary,
        len(row_of) == len(catalogue) and bool((rows == np.arange(1, len(rows) + 1)).all()),
        tuple(name for name, _, _ in members),
        tuple(weight for _, _, weight in members),
        tuple(tables),
        np.log(np.where(rows > 0, sources.popularity[rows], 0) + floor).astype(np.float32),
        np.log(np.where(rows > 0, sources.trend[rows], 0) + floor).astype(np.float32),
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
    """Every source's opinion of every catalogue item, float32 [B, M] each; eligible: bool [B, M]."""

    members: tuple[np.ndarray, ...]
    ensemble: np.ndarray
    covisitation: np.ndarray
    knn: np.ndarray
    segment: np.ndarray
    last: np.ndarray
    recent: np.ndarray
    eligible: np.ndarray


def score_block(windows: Windows, vectors: np.ndarray, table: Prepared, sources: Sources, full: bool) -> Scores:
    """vectors: [B, D] user vectors. full: whether the ranker's sources are wanted too (they stay empty otherwise)."""
    count, items = len(windows), len(table.catalogue)
    eligible = np.broadcast_to(table.catalogue.available, (count, items)).copy()
    blocked = np.zeros((count, items), np.float32)
    exclude(blocked, windows.seen, windows.seen_offsets)
    eligible &= blocked == 0
    ensemble = vectors @ table.catalogue.vectors.T
    segment = table.columns(sources.segment_scores(windows.users))
    if not full:
        nothing = np.zeros((count, 0), np.float32)
        return Scores((), ensemble, nothing, nothing, segment, nothing, nothing, eligible)
    known = table.to_vocabulary[windows.items]
    members = []
    last = np.zeros_like(ensemble)
    recent = np.zeros_like(ensemble)
    start = 0
    for weight, padded in zip(table.weights, table.padded_members, strict=True):
        width = padded.shape[1]
        members.append(unit(vectors[:, start : start + width]) @ padded[1:].T)
        window = padded[windows.items[:, -RECENT_EVENTS:]]
        last += np.float32(weight) * (window[:, -1] @ padded[1:].T)
        recent += np.float32(weight) * (unit(window.sum(1)) @ padded[1:].T)
        start += width
    return Scores(
        tuple(members),
        ensemble,
        table.columns(sources.neighbour_scores(known, sources.covisitation)),
        table.columns(sources.neighbour_scores(known, sources.knn)),
        segment,
        last,
        recent,
        eligible,
    )


def candidates(scores: Scores, table: Prepared, k: int) -> np.ndarray:
    """int64 [B, C] columns in ascending order, −1 at duplicates and at what a user may not get.

    At least k of them come by the ensemble alone, so that no list is shorter than it could be.
    """
    items = scores.eligible.shape[1]
    parts = []
    popular = np.broadcast_to(table.log_popularity, scores.eligible.shape)
    trend = np.broadcast_to(table.log_trend, scores.eligible.shape)
    wanted = [(scores.ensemble, max(k, ENSEMBLE_CANDIDATES))]
    if len(scores.members) > 1:
        wanted += [(s, MEMBER_CANDIDATES) for s in scores.members]
    wanted += [(popular, POPULAR_CANDIDATES), (trend, POPULAR_CANDIDATES)]
    for values, size in wanted:
        parts.append(_best(np.where(scores.eligible, values, -np.inf), min(size, items)))
    for values in (scores.covisitation, scores.knn):
        found = _best(np.where(scores.eligible, values, 0), min(OTHER_CANDIDATES, items))
        # Where an item has few neighbours, the rest would be any items at all.
        parts.append(np.where(np.take_along_axis(values, found, 1) > 0, found, -1))
    columns = np.sort(np.concatenate(parts, 1), axis=1)
    repeated = np.zeros_like(columns, dtype=bool)
    repeated[:, 1:] = columns[:, 1:] == columns[:, :-1]
    left_out = repeated | (columns < 0) | ~np.take_along_axis(scores.eligible, columns, 1)
    return np.where(left_out, -1, columns)


def _best(values: np.ndarray, size: int) -> np.ndarray:
    """int64 [B, size]: columns of the highest values [B, M], in any order; of equals some. Many are equal here, which
    makes numpy's partition fifty times slower."""
    return torch.from_numpy(values).topk(size, dim=1, sorted=False).indices.numpy()


def features(scores: Scores, table: Prepared, windows: Windows, columns: np.ndarray) -> np.ndarray:
    """float32 [B, C, F], in the order of ranking.feature_names; meaningless where columns are −1."""
    valid = columns >= 0
    at = np.maximum(columns, 0)

    def take(values: np.ndarray) -> np.ndarray:
        return np.take_along_axis(values, at, 1)

    def place(values: np.ndarray) -> np.ndarray:
        order = np.argsort(-np.where(valid, values, -np.inf), axis=1, kind="stable")
        places = np.empty_like(order)
        np.put_along_axis(places, order, np.broadcast_to(np.arange(order.shape[1]), order.shape), 1)
        return places

    def highest(values: np.ndarray) -> np.ndarray:
        return np.asarray(np.where(valid, values, -np.inf).max(1, keepdims=True))

    ensemble, covisitation, knn = take(scores.ensemble), take(scores.covisitation), take(scores.knn)
    popularity = table.log_popularity[at]
    out = [ensemble, highest(ensemble) - ensemble, place(ensemble), take(scores.last), take(scores.recent)]
    for values in (covisitation, knn):
        out += [values, values / np.maximum(highest(values), 1e-12), place(values)]
    out += [popularity, table.log_trend[at] - popularity]
    out += [np.log(take(scores.segment) + table.floor) - popularity]
    out += [np.broadcast_to((windows.items > 0).sum(1, keepdims=True), at.shape)]
    for member in scores.members:
        values = take(member)
        out += [values, highest(values) - values, place(values)]
    return np.stack([np.asarray(o, np.float32) for o in out], 2)


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
    totals = np.where(has_window[:, None], scores.ensemble, scores.segment)
    totals = np.where(scores.eligible, totals, -np.inf)
    values: np.ndarray | None = None
    if ranker is not None and has_window.any():
        columns = candidates(scores, table, k)
        values = features(scores, table, windows, columns)
        valid = (columns >= 0) & has_window[:, None]
        ranked = np.full(columns.shape, -np.inf, np.float32)
        # Trees give many candidates the very same score; among those the cosine decides.
        ranked[valid] = ranker.score(values[valid]) + TIE_BREAK * values[valid][:, 0]
        places = best_columns(ranked, k_found)
        chosen = np.take_along_axis(columns, places, 1)
        best = np.take_along_axis(ranked, places, 1)
        values = np.take_along_axis(values, places[:, :, None], 1)
        rest = ~has_window
        if rest.any():
            plain = best_columns(totals[rest], k_found)
            chosen[rest] = plain
            best[rest] = np.take_along_axis(totals[rest], plain, 1)
    else:
        chosen = best_columns(totals, k_found)
        best = np.take_along_axis(totals, chosen, 1)
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
    cold = table.to_vocabulary[chosen] == 0
    with_window = np.asarray((windows.items > 0).any(1))[rows]
    strategy = np.where(cold, CONTENT, SEQUENCE)
    if ranker is not None and values is not None:
        used = np.flatnonzero(with_window)
        contributions = ranker.contributions(values[rows[used], places[used]])
        known = table.to_vocabulary[chosen[used]]
        allowed = np.ones((len(used), len(STRATEGIES)), bool)
        at = (rows[used], chosen[used] - 1)
        allowed[:, COVISITATION] = (scores.covisitation[at] > 0) | (scores.knn[at] > 0)
        allowed[:, POPULAR] = sources.popularity[known] > 0
        allowed[:, TRENDING] = sources.trend[known] > sources.popularity[known]
        allowed[:, SEGMENT] = scores.segment[at] > sources.popularity[known]
        allowed[:, CONTENT] = False
        found = strongest_group(contributions, feature_groups(table.names), allowed)
        strategy[used] = np.where((found == SEQUENCE) & cold[used], CONTENT, found)
    without = ~with_window
    share = sources.popularity[table.to_vocabulary[chosen]]
    liked = scores.segment[rows, chosen - 1] > share
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
