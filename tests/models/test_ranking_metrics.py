from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nightstream.models import ranking_metrics
from nightstream.monitoring import measurements

ranks_strategy = st.lists(st.integers(0, 20), max_size=30)


@given(ranks_strategy, st.integers(1, 15))
@settings(max_examples=100, deadline=None)
def test_metrics_equal_a_slow_reading_of_their_definitions(values: list[int], k: int) -> None:
    hits = gain = 0.0
    for rank in values:
        for place in range(1, k + 1):
            if place == rank:
                hits += 1
                gain += 1 / math.log2(place + 1)
    count = max(1, len(values))
    ranks = np.asarray(values, np.int64)
    assert ranking_metrics.hit_rate(ranks, k) == pytest.approx(hits / count)
    assert ranking_metrics.ndcg(ranks, k) == pytest.approx(gain / count)


@given(st.integers(0, 10_000))
@settings(max_examples=50, deadline=None)
def test_score_ranks_equal_the_place_in_a_sorted_list(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 4, (5, 9)).astype(np.float32)
    scores[rng.random(scores.shape) < 0.2] = -np.inf
    targets = rng.integers(0, 9, 5)
    for row, target, rank in zip(scores, targets, ranking_metrics.score_ranks(scores, targets), strict=True):
        ordered = sorted(range(9), key=lambda c: (-row[c], c))
        assert rank == (0 if np.isneginf(row[target]) else ordered.index(target) + 1)


def test_target_ranks_reads_places_and_knows_absent_targets_and_padding() -> None:
    rows = np.array([[3, 1, 2], [3, 1, 0], [3, 1, 0], [0, 0, 0]])
    assert ranking_metrics.target_ranks(rows, np.array([2, 1, 9, 0])).tolist() == [3, 2, 0, 0]


def test_gains_fall_with_the_rank_and_end_at_the_cutoff() -> None:
    expected = [0.0, 1.0, 1 / math.log2(3), 0.5, 0.0, 0.0]
    assert ranking_metrics.gains(np.array([0, 1, 2, 3, 4, 99]), 3).tolist() == pytest.approx(expected)


def test_coverage_counts_distinct_items_and_no_padding() -> None:
    assert ranking_metrics.coverage(np.array([[1, 2], [2, 0]]), 8) == pytest.approx(0.25)
    assert ranking_metrics.coverage(np.zeros((0, 3), int), 0) == 0.0


def test_percentile_against_sorting_by_hand():
    assert measurements.percentile([], 50) == 0.0
    assert measurements.percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert measurements.percentile(list(range(100)), 95) == 95
