"""One block of users to lists: candidates from every source, features, scores, reasons. The only place that does it, so
the ranker is trained on what it meets later."""

from __future__ import annotations

import numpy as np

from nightstream.models.arrays import Lists, Windows
from nightstream.models.ranking.candidate_sources import Sources
from nightstream.models.ranking.candidates import Prepared, candidates, score_block
from nightstream.models.ranking.rank_features import features
from nightstream.models.ranking.ranker import Ranker
from nightstream.models.ranking.reasons import explain
from nightstream.models.ranking.topk import best_columns

TIE_BREAK = np.float32(1e-3)


def empty_lists(users: int, k: int, width: int) -> Lists:
    return Lists(
        np.zeros((users, k), np.int32),
        np.zeros((users, k), np.float32),
        np.zeros((users, k), np.int8),
        np.zeros((users, k), np.int32),
        np.zeros((users, width), np.float32),
    )


def recommend_block(
    windows: Windows, vectors: np.ndarray, table: Prepared, sources: Sources, ranker: Ranker | None, k: int
) -> Lists:
    """Lists of one block; Model.recommend states the contract. vectors: as in score_block."""
    count, items = len(windows), len(table.catalogue)
    k_found = min(k, items)
    lists = empty_lists(count, k, vectors.shape[1])
    lists.vectors[:] = vectors[:count]
    has_window = np.asarray((windows.items > 0).any(1))
    scores = score_block(windows, vectors, table, sources, ranker is not None)
    values: np.ndarray | None = None
    if ranker is not None and has_window.any():
        columns = candidates(scores, table, sources, k)
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
    listed = ~np.isneginf(best)
    lists.rows[:, :k_found] = np.where(listed, chosen + 1, 0)
    lists.scores[:, :k_found] = np.where(listed, best, 0)
    explain(lists, windows, table, sources, scores, ranker, values)
    return lists
