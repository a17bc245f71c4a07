"""Why an item is in a list: the source that moved its score most, and the window item that the source went by."""

from __future__ import annotations

import numpy as np

from nightstream.models.arrays import Lists, Windows
from nightstream.models.ranking.candidate_sources import Sources
from nightstream.models.ranking.candidates import Prepared, Scores
from nightstream.models.ranking.rank_features import RECENT_EVENTS, feature_groups
from nightstream.models.ranking.ranker import Ranker
from nightstream.models.ranking.strategies import STRATEGIES


def strongest_group(contributions: np.ndarray, groups: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """int64 [N]: the strategy whose features added most to a score.

    contributions: float32 [N, F], what each feature added. groups: int [F], index into STRATEGIES, −1 for features
    that are nobody's reason. allowed: bool [N, len(STRATEGIES)]: a strategy that does not know the item is no reason.
    """
    totals = np.full((len(contributions), len(STRATEGIES)), -np.inf, np.float64)
    for strategy in range(len(STRATEGIES)):
        columns = groups == strategy
        if columns.any():
            totals[:, strategy] = contributions[:, columns].sum(1)
    return np.asarray(np.where(allowed, totals, -np.inf).argmax(1))


def strongest_event(weights: np.ndarray) -> np.ndarray:
    """int64 [N]: the place in the window whose event weighs most, the newest of equals; −1 where none weighs anything.

    weights: float32 [N, L], what each window event adds to an item's score.
    """
    length = weights.shape[1]
    if not length:
        return np.full(len(weights), -1)
    newest_first = weights[:, ::-1]
    place = length - 1 - newest_first.argmax(1)
    return np.where(weights.max(1) > 0, place, -1)


SEQUENCE, COVISITATION, CONTENT, POPULAR, TRENDING, SEGMENT = range(len(STRATEGIES))


def explain(
    lists: Lists,
    windows: Windows,
    table: Prepared,
    sources: Sources,
    scores: Scores,
    ranker: Ranker | None,
    values: np.ndarray | None,
) -> None:
    """Fill strategies and because of the lists of one block, in place.

    Args:
        lists: Rows and scores are chosen already.
        windows: Of the same users.
        table: The catalogue as the model sees it.
        sources: What was counted for the vocabulary.
        scores: What the candidates were chosen by.
        ranker: None where the cosine alone ordered the lists.
        values: float32 [B, K, F], the features of the listed items; None without a ranker.
    """
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
