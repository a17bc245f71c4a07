"""What the ranker reads of a candidate: the columns, their names, and whose reason each of them is."""

from __future__ import annotations

import numpy as np
from scipy import sparse

from nightstream.models.arrays import Windows
from nightstream.models.ranking.candidate_sources import Sources
from nightstream.models.ranking.candidates import Prepared, Scores
from nightstream.models.ranking.strategies import STRATEGIES
from nightstream.models.ranking.topk import unit

COMMON_FEATURES = (
    ("ensemble_cosine", "sequence"),
    ("ensemble_gap", "sequence"),
    ("ensemble_place", "sequence"),
    ("last_cosine", "sequence"),
    ("recent_cosine", "sequence"),
    ("covisitation", "covisitation"),
    ("covisitation_share", "covisitation"),
    ("covisitation_place", "covisitation"),
    ("knn", "covisitation"),
    ("knn_share", "covisitation"),
    ("knn_place", "covisitation"),
    ("log_popularity", "popular"),
    ("log_trend", "trending"),
    ("segment_lift", "segment_popular"),
    ("window_events", ""),
)


MEMBER_FEATURES = (("cosine", "sequence"), ("gap", "sequence"), ("place", "sequence"))


LINEAR_TERMS = (
    ("covisitation_share", False),
    ("covisitation_share", True),
    ("knn_share", False),
    ("knn_share", True),
    ("log_popularity", False),
    ("log_trend", False),
    ("segment_lift", False),
    ("last_cosine", False),
    ("recent_cosine", False),
)


def feature_names(members: tuple[str, ...]) -> list[str]:
    """Names of the ranker's columns, in order, for an ensemble of these members."""
    return [n for n, _ in COMMON_FEATURES] + [f"{m}_{n}" for m in members for n, _ in MEMBER_FEATURES]


def feature_groups(members: tuple[str, ...]) -> np.ndarray:
    """int64 [F]: index into STRATEGIES of each column, −1 where a column is nobody's reason."""
    names = [g for _, g in COMMON_FEATURES] + [g for _ in members for _, g in MEMBER_FEATURES]
    return np.asarray([STRATEGIES.index(g) if g else -1 for g in names])


def linear_terms(members: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Columns int64 [T] and whether their logarithm is meant, bool [T], of the linear part."""
    terms = [(f"{m}_cosine", False) for m in members] + list(LINEAR_TERMS)
    names = feature_names(members)
    return np.asarray([names.index(n) for n, _ in terms]), np.asarray([log for _, log in terms])


RECENT_EVENTS = 8


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
