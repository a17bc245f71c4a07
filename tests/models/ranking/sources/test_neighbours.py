"""Neighbour lists against their formulas."""

from __future__ import annotations

import numpy as np
import pytest
from learning_data import ring_sequences
from nightstream.models.arrays import TRAIN
from nightstream.models.ranking.candidate_sources import SourceSizes, fit_sources
from nightstream.models.ranking.sources.neighbours import (
    Covisitation,
    covisitation,
    item_knn,
    neighbour_scores,
    strongest,
    window_weights,
)
from scipy import sparse


def test_the_next_item_of_the_ring_is_the_strongest_neighbour() -> None:
    sequences = ring_sequences(items=30, step=7)
    sources = fit_sources(sequences, 30, (TRAIN,), SourceSizes(reach=3))
    for row in range(1, 31):
        assert sources.get(Covisitation).neighbours[row].toarray().argmax() == (row - 1 + 7) % 30 + 1


def test_covisitation_does_not_cross_users_and_prefers_the_order_of_events() -> None:
    owner, items = np.array([0, 0, 1, 1]), np.array([1, 2, 3, 4])
    matrix = covisitation(owner, items, 5, 2, 10).toarray()
    assert matrix[1, 2] == pytest.approx(2 * matrix[2, 1])
    assert matrix[1, 2] > 0
    assert matrix[2, 3] == 0


def test_item_knn_equals_the_formula_on_dense_arrays() -> None:
    rng = np.random.default_rng(0)
    used = rng.random((12, 7)) < 0.5
    used[:, 0] = False
    owner, items = np.nonzero(used)
    size = used.sum(1)
    weights = 1 / np.log(2 + size)
    weights /= weights.mean()
    expected = np.zeros((7, 7))
    for a in range(7):
        for b in range(7):
            if a != b:
                both = (used[:, a] & used[:, b]) @ weights
                expected[a, b] = both / (np.sqrt((used[:, a] @ weights) * (used[:, b] @ weights)) + 3)
    np.testing.assert_allclose(item_knn(owner, items, 7, 7, 3).toarray(), expected, atol=1e-6)


def test_strongest_keeps_the_greatest_and_of_equals_the_lower_column() -> None:
    matrix = sparse.csr_matrix(np.array([[1.0, 3.0, 3.0, 3.0], [0.0, 0.0, 5.0, 4.0]]))
    assert strongest(matrix, 2).toarray().tolist() == [[0, 3, 3, 0], [0, 0, 5, 4]]


def test_neighbour_scores_are_the_weighted_sum_over_the_window() -> None:
    sources = fit_sources(ring_sequences(), 30, (TRAIN,), SourceSizes())
    windows = np.array([[0, 3, 8, 8]])
    weights = window_weights(windows, sources.recency)[0]
    assert weights.tolist() == pytest.approx([0, 0.85**2, 0.85, 1])
    neighbours = sources.get(Covisitation).neighbours
    dense = neighbours.toarray()
    expected = weights[1] * dense[3] + (weights[2] + weights[3]) * dense[8]
    found = neighbour_scores(neighbours, windows, sources.recency)
    np.testing.assert_allclose(found.toarray()[0], expected, rtol=1e-5)
