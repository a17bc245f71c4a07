"""Candidates and the ranker's columns: what they are by definition, whatever catalogue and users they are for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from learning_data import catalogue_of, make_windows, no_users, ring_sequences
from nightstream.models.arrays import TRAIN, UserFeatures
from nightstream.models.ranking.candidate_sources import SourceSizes, fit_sources
from nightstream.models.ranking.candidates import (
    ENSEMBLE_CANDIDATES,
    MEMBER_CANDIDATES,
    candidates,
    prepare,
    score_block,
    strongest_columns,
)
from nightstream.models.ranking.rank_features import RECENT_EVENTS, RankerFeatures, features
from nightstream.models.ranking.sources.neighbours import Covisitation, ItemKnn, window_weights
from nightstream.models.ranking.sources.segments import Segments
from nightstream.models.ranking.sources.shares import Popularity, Trend
from nightstream.models.ranking.topk import unit
from scipy import sparse

ITEMS, WIDTH = 30, 8


@pytest.mark.parametrize("unmet", [0, 3])
def test_without_attributes_a_segment_lifts_nothing(unmet: int) -> None:
    """Also where every item of the catalogue has been met, and the least popular one has more than no share."""
    rng, sequences = np.random.default_rng(0), ring_sequences(items=ITEMS)
    # A few more who all want the first item, so that items differ in popularity.
    sequences.items[:200] = 1
    sources = fit_sources(sequences, ITEMS, (TRAIN,), SourceSizes())
    catalogue = catalogue_of(unit(rng.normal(size=(ITEMS + unmet, WIDTH)).astype(np.float32)))
    rows = {item: row for row, item in enumerate(catalogue.item_ids[:ITEMS], 1)}
    table = prepare(catalogue, rows, [("gru", WIDTH, 1.0)], sources)
    windows = make_windows([[1, 8, 15], [2, 9]], users=no_users(2))
    scores = score_block(windows, unit(rng.normal(size=(2, WIDTH)).astype(np.float32)), table, sources, True)
    columns = candidates(scores, table, sources, 5)
    values = features(scores, table, windows, sources, columns)[columns >= 0]
    names = RankerFeatures(("gru",), sources.names).names
    assert np.ptp(values[:, names.index("log_popularity")]) > 0.1
    assert np.abs(values[:, names.index("segment_lift")]).max() < 1e-5


def test_strongest_columns_are_eligible_and_of_equals_the_lower() -> None:
    matrix = sparse.csr_matrix(
        np.array([[1.0, 3.0, 3.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 5.0, 0.0, 0.0]])
    )
    eligible = np.ones((3, 5), bool)
    eligible[0, 4] = False
    assert strongest_columns(matrix, eligible, 2).tolist() == [[1, 2], [-1, -1], [2, -1]]


def test_candidates_and_columns_are_those_of_dense_arrays() -> None:
    """A catalogue in another order than the vocabulary, with items the model has not met, some withdrawn; users who
    have seen much of it."""
    rng, known, unmet, users = np.random.default_rng(5), 2_990, 13, 6
    sequences = ring_sequences(users=400, items=known, events=30, step=3)
    sequences.items[:] = 1 + (known * rng.random(len(sequences.items)) ** 3).astype(np.int32)
    kinds = UserFeatures(np.zeros((400, 0), np.float32), (rng.integers(1, 4, (400, 1)).astype(np.int32),), (4,))
    sources = fit_sources(replace(sequences, users=kinds), known, (TRAIN,), SourceSizes())
    order = rng.permutation(known + unmet)
    members = [("gru", WIDTH, 0.7), ("cnn", WIDTH, 0.3)]

    def vectors_of(count: int) -> np.ndarray:
        """As Model has them: each member's unit vectors times the root of its weight, side by side."""
        parts = [unit(rng.normal(size=(count, width)).astype(np.float32)) * w**0.5 for _, width, w in members]
        return np.concatenate(parts, 1).astype(np.float32)

    catalogue = catalogue_of(vectors_of(known + unmet))
    catalogue = replace(catalogue, available=rng.random(known + unmet) > 0.1)
    ids = np.asarray(catalogue.item_ids)
    row_of = {ids[place]: row for row, place in enumerate(order[:known], 1)}
    table = prepare(catalogue, row_of, members, sources)
    popular = np.argsort(-table.log_popularity)
    seen = [(popular[: 40 * u] + 1).tolist() for u in range(users)]
    windows = make_windows(
        [(popular[5 * u : 7 * u] + 1).tolist() for u in range(users)], users=kinds.take(np.arange(users)), seen=seen
    )
    vectors = vectors_of(users)
    scores = score_block(windows, vectors, table, sources, True)
    columns = candidates(scores, table, sources, 5)
    values = features(scores, table, windows, sources, columns)

    rows = np.array([row_of.get(i, 0) for i in ids])
    weights = window_weights(table.to_vocabulary[windows.items], sources.recency)
    parts = [unit(catalogue.vectors[:, :WIDTH]), unit(catalogue.vectors[:, WIDTH:])]
    own = [unit(vectors[:, :WIDTH]), unit(vectors[:, WIDTH:])]
    eligible = np.broadcast_to(catalogue.available, (users, len(ids))).copy()
    for user, out in enumerate(seen):
        eligible[user, np.asarray(out, int) - 1] = False
    for user in range(users):
        window = windows.items[user]
        together = [
            sum(w * m[table.to_vocabulary[i]].toarray()[0] for i, w in zip(window, weights[user], strict=True))[rows]
            for m in (sources.get(Covisitation).neighbours, sources.get(ItemKnn).neighbours)
        ]
        cosines = [vectors[user] @ catalogue.vectors.T, own[0][user] @ parts[0].T, own[1][user] @ parts[1].T]
        wanted: set[int] = set()
        sizes = (ENSEMBLE_CANDIDATES, MEMBER_CANDIDATES, MEMBER_CANDIDATES, Popularity.limit, Trend.limit)
        popularity, trend = (np.where(rows, s[rows], 0) for s in (sources.popularity, sources.get(Trend).shares))
        for score, size in zip((*cosines, popularity, trend), sizes, strict=True):
            best = np.lexsort((np.arange(len(ids)), -np.where(eligible[user], score, -np.inf)))
            wanted |= set(best[:size].tolist())
        for score in together:
            best = np.lexsort((np.arange(len(ids)), -np.where(eligible[user], score, 0).astype(np.float32)))
            wanted |= {c for c in best[: Covisitation.limit].tolist() if eligible[user, c] and score[c] > 0}
        found = columns[user][columns[user] >= 0]
        assert set(found.tolist()) == wanted
        assert len(found) == len(wanted)

        recent = [unit(np.where(window[:, None] > 0, p[window - 1], 0)[-RECENT_EVENTS:].sum(0)) for p in parts]
        newest = [p[window[-1] - 1] * (window[-1] > 0) for p in parts]
        segment = sources.get(Segments).segments[kinds.categories[0][user, 0]][rows]
        expected = {
            "ensemble_cosine": cosines[0],
            "gru_cosine": cosines[1],
            "cnn_cosine": cosines[2],
            "last_cosine": 0.7 * newest[0] @ parts[0].T + 0.3 * newest[1] @ parts[1].T,
            "recent_cosine": 0.7 * recent[0] @ parts[0].T + 0.3 * recent[1] @ parts[1].T,
            "covisitation": together[0],
            "knn": together[1],
            "log_popularity": np.log(popularity + table.floor),
            "log_trend": np.log(trend + table.floor) - np.log(popularity + table.floor),
            "segment_lift": np.log(segment + table.floor) - np.log(popularity + table.floor),
            "window_events": np.full(len(ids), (window > 0).sum()),
        }
        expected["cnn_gap"] = expected["cnn_cosine"][found].max() - expected["cnn_cosine"]
        expected["knn_share"] = expected["knn"] / max(expected["knn"][found].max(), 1e-12)
        names = RankerFeatures(("gru", "cnn"), sources.names).names
        for name, of_item in expected.items():
            column = values[user][columns[user] >= 0][:, names.index(name)]
            np.testing.assert_allclose(column, of_item[found], atol=2e-5, err_msg=name)
