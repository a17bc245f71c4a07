"""Why an item is in a list: the source that moved its score most, and the window item that the source went by."""

from __future__ import annotations

import numpy as np

from nightstream.models.arrays import Lists, Windows
from nightstream.models.ranking.candidate_sources import Sources
from nightstream.models.ranking.candidates import Prepared, Scores, as_source_sees
from nightstream.models.ranking.rank_features import RECENT_EVENTS, RankerFeatures
from nightstream.models.ranking.ranker import Ranker
from nightstream.models.ranking.sources.segments import Segments
from nightstream.models.ranking.sources.shares import Popularity
from nightstream.models.ranking.strategies import CONTENT, SEQUENCE, STRATEGIES, known_strategies


def strongest_group(contributions: np.ndarray, groups: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """The strategy whose features added most to a score.

    Args:
        contributions: float32 [N, F], what each feature added.
        groups: int [F], index into STRATEGIES, −1 for features that are nobody's reason.
        allowed: bool [N, len(STRATEGIES)]: a strategy that does not know the item is no reason.

    Returns:
        int64 [N], index into STRATEGIES.
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
    index = {name: place for place, name in enumerate(known_strategies())}
    chosen = lists.rows[rows, places].astype(np.int64)
    cold = table.to_vocabulary[chosen] == 0
    with_window = np.asarray((windows.items > 0).any(1))[rows]
    strategy = np.where(cold, index[CONTENT.name], index[SEQUENCE.name])
    if ranker is not None and values is not None:
        used = np.flatnonzero(with_window)
        contributions = ranker.contributions(values[rows[used], places[used]])
        allowed = np.zeros((len(used), len(index)), bool)
        allowed[:, index[SEQUENCE.name]] = True
        for name, source in sources.fitted.items():
            listed = as_source_sees(name, lists.rows - 1, scores, table, windows)
            allowed[:, index[source.strategy.name]] |= source.may_explain(listed)[rows[used], places[used]]
        found = strongest_group(contributions, RankerFeatures(table.names, sources.names).groups(), allowed)
        strategy[used] = np.where((found == index[SEQUENCE.name]) & cold[used], index[CONTENT.name], found)
    without = ~with_window
    segment = sources.segment_scores(windows.users, table.to_vocabulary[lists.rows])[rows, places]
    liked = segment > sources.popularity[table.to_vocabulary[chosen]]
    by_share = np.where(liked, index[Segments.strategy.name], index[Popularity.strategy.name])
    strategy = np.where(without, by_share, strategy)
    lists.strategies[rows, places] = strategy
    lists.because[rows, places] = _because(rows, chosen, strategy, windows, table, sources)


def _because(
    rows: np.ndarray, chosen: np.ndarray, strategy: np.ndarray, windows: Windows, table: Prepared, sources: Sources
) -> np.ndarray:
    """int32 [N]: the window item that a reason names. For a source the event that adds most to its score, exactly; for
    the vectors the recent event most similar to the item in the space that scored it."""
    out = np.zeros(len(rows), np.int32)
    names = np.asarray(list(known_strategies()))[strategy]
    for name in {source.strategy.name for source in sources.fitted.values()}:
        pick = np.flatnonzero(names == name)
        if len(pick):
            weights = [
                found
                for source in sources.fitted.values()
                if source.strategy.name == name
                and (found := source.because(table, windows, rows[pick], chosen[pick] - 1)) is not None
            ]
            if weights:
                events = windows.items[rows[pick]]
                place = strongest_event(np.sum(weights, 0))
                out[pick] = np.where(place >= 0, events[np.arange(len(pick)), place], 0)
    pick = np.flatnonzero((names == SEQUENCE.name) | (names == CONTENT.name))
    if len(pick):
        events = windows.items[rows[pick]][:, -RECENT_EVENTS:]
        closeness = np.zeros(events.shape, np.float32)
        for weight, padded in zip(table.weights, table.padded_members, strict=True):
            target = padded[chosen[pick]][:, :, None]
            closeness += np.float32(weight) * (padded[events] @ target)[:, :, 0]
        place = strongest_event(np.where(events > 0, closeness + 1, 0))
        out[pick] = np.where(place >= 0, events[np.arange(len(pick)), place], 0)
    return out
