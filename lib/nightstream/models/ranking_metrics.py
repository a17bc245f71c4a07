"""Ranking metrics from the ranks of the targets. One relevant item per list, so recall@k is HR@k."""

from __future__ import annotations

import numpy as np


def target_ranks(rows: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """int64 [B]: the 1-based place of targets[b] in the list rows[b] ([B, K], 0 = empty); 0 where it is absent."""
    hits = (rows == targets[:, None]) & (rows > 0)
    return np.where(hits.any(1), hits.argmax(1) + 1, 0)


def score_ranks(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """int64 [B]: the 1-based rank of column targets[b] in scores [B, M], best first; of equal scores the lower column
    comes first. A target at −inf, which no list may hold, gets 0."""
    hit = np.take_along_axis(scores, targets[:, None], 1)
    earlier = np.arange(scores.shape[1]) < targets[:, None]
    ranks = 1 + (scores > hit).sum(1) + ((scores == hit) & earlier).sum(1)
    return np.where(np.isneginf(hit[:, 0]), 0, ranks)


def hit_rate(ranks: np.ndarray, k: int) -> float:
    """HR@k: the share of targets at rank 1..k. Rank 0 means not in the list. 0 for no targets."""
    return float(((ranks > 0) & (ranks <= k)).mean()) if len(ranks) else 0.0


def gains(ranks: np.ndarray, k: int) -> np.ndarray:
    """float64 [B]: what each target adds to NDCG@k, 1 / log2(1 + rank) at ranks 1..k and 0 elsewhere."""
    hit = (ranks > 0) & (ranks <= k)
    return np.where(hit, 1 / np.log2(1 + np.maximum(ranks, 1)), 0.0)


def ndcg(ranks: np.ndarray, k: int) -> float:
    """NDCG@k with one relevant item: the mean of `gains` (Järvelin & Kekäläinen, 2002). 0 for no targets."""
    return float(gains(ranks, k).mean()) if len(ranks) else 0.0


def coverage(rows: np.ndarray, items: int) -> float:
    """The share of `items` catalogue items that at least one list in rows [B, K] holds (0 = empty place)."""
    return len(np.unique(rows[rows > 0])) / items if items else 0.0
