from __future__ import annotations

import numpy as np
import pytest
from learning_data import no_users, ring_sequences
from nightstream.errors import ArtifactError
from nightstream.models.arrays import RANK, TRAIN, UserFeatures
from nightstream.models.ranking.candidate_sources import (
    MICROSECONDS_PER_DAY,
    Sources,
    SourceSizes,
    covisitation,
    decayed_shares,
    fit_sources,
    item_knn,
    strongest,
    strongest_columns,
)
from scipy import sparse


def test_the_next_item_of_the_ring_is_the_strongest_neighbour() -> None:
    sequences = ring_sequences(items=30, step=7)
    sources = fit_sources(sequences, 30, (TRAIN,), SourceSizes(reach=3))
    for row in range(1, 31):
        assert sources.covisitation[row].toarray().argmax() == (row - 1 + 7) % 30 + 1


def test_events_of_other_roles_are_not_counted() -> None:
    sequences = ring_sequences(users=1, items=30, events=4)
    sources = fit_sources(sequences, 30, (TRAIN,), SourceSizes())
    held_out = sequences.items[2:]
    assert not sources.popularity[held_out].any()
    assert not sources.covisitation[:, held_out].nnz
    assert fit_sources(sequences, 30, (TRAIN, RANK), SourceSizes()).popularity[held_out[0]] > 0


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


def test_strongest_columns_are_eligible_and_of_equals_the_lower() -> None:
    matrix = sparse.csr_matrix(
        np.array([[1.0, 3.0, 3.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 5.0, 0.0, 0.0]])
    )
    eligible = np.ones((3, 5), bool)
    eligible[0, 4] = False
    assert strongest_columns(matrix, eligible, 2).tolist() == [[1, 2], [-1, -1], [2, -1]]


def test_an_event_counts_half_after_one_half_life() -> None:
    times = np.array([0, 10 * MICROSECONDS_PER_DAY], np.int64)
    shares = decayed_shares(np.array([1, 2]), times, 4, 10.0)
    assert shares.tolist() == pytest.approx([0, 1 / 3, 2 / 3, 0])


def test_a_segment_prefers_what_its_users_take() -> None:
    sequences = ring_sequences(users=40, items=30, events=12)
    half = np.repeat([2, 3], 20).astype(np.int32)
    sequences.items[: 20 * 12] = np.tile(np.arange(1, 13), 20)
    sequences.items[20 * 12 :] = np.tile(np.arange(13, 25), 20)
    users = UserFeatures(np.zeros((40, 0), np.float32), (half[:, None],), (4,))
    sequences = type(sequences)(**{**vars(sequences), "users": users})
    sources = fit_sources(sequences, 30, (TRAIN,), SourceSizes(prior_events=10))
    everything = np.broadcast_to(np.arange(31), (2, 31))
    scores = sources.segment_scores(users.take(np.array([0, 39])), everything)
    assert scores[0].argmax() in range(1, 13)
    assert scores[1].argmax() in range(13, 25)
    plain = sources.segment_scores(no_users(1), everything[:1])[0]
    np.testing.assert_allclose(plain, sources.popularity)


def test_neighbour_scores_are_the_weighted_sum_over_the_window() -> None:
    sources = fit_sources(ring_sequences(), 30, (TRAIN,), SourceSizes())
    windows = np.array([[0, 3, 8, 8]])
    weights = sources.window_weights(windows)[0]
    assert weights.tolist() == pytest.approx([0, 0.85**2, 0.85, 1])
    dense = sources.covisitation.toarray()
    expected = weights[1] * dense[3] + (weights[2] + weights[3]) * dense[8]
    np.testing.assert_allclose(
        sources.neighbour_scores(windows, sources.covisitation).toarray()[0], expected, rtol=1e-5
    )


def test_arrays_there_and_back_and_a_missing_one_is_named() -> None:
    sources = fit_sources(ring_sequences(), 30, (TRAIN,), SourceSizes())
    arrays = sources.to_arrays()
    again = Sources.from_arrays(arrays)
    windows = np.array([[0, 3, 8, 9]])
    for name in ("covisitation", "knn"):
        np.testing.assert_array_equal(
            again.neighbour_scores(windows, getattr(again, name)).toarray(),
            sources.neighbour_scores(windows, getattr(sources, name)).toarray(),
        )
    with pytest.raises(ArtifactError, match="trend"):
        Sources.from_arrays({k: v for k, v in arrays.items() if k != "trend"})


def test_no_events_at_all() -> None:
    sequences = ring_sequences(users=2, events=2)
    sources = fit_sources(sequences, 30, (TRAIN,), SourceSizes())
    assert not sources.popularity.any()
