from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nightstream.models.ranking.topk import best_columns, best_unordered, cosine, exclude


def test_cosine_of_the_articles_example_is_what_the_formula_gives_and_not_what_the_article_prints() -> None:
    value = float(cosine(np.array([1.0, 2.0, 3.0]), np.array([4.0, 5.0, 6.0]))[0, 0])
    assert value == pytest.approx(32 / np.sqrt(14 * 77), abs=1e-6)
    assert value == pytest.approx(0.9746, abs=5e-5)
    assert abs(value - 0.732) > 0.2


def test_cosine_with_the_zero_vector_is_zero() -> None:
    assert cosine(np.zeros(3), np.ones(3))[0, 0] == 0.0


@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_best_columns_equals_a_full_sort_with_ties_to_the_lower_column(seed: int, items: int, k: int) -> None:
    # Few distinct values, so that ties at the cut are the rule.
    scores = np.random.default_rng(seed).integers(0, 3, (4, items)).astype(np.float32)
    expected = [sorted(range(items), key=lambda c: (-row[c], c))[:k] for row in scores]
    assert best_columns(scores, k).tolist() == expected


@pytest.mark.parametrize(("items", "k"), [(5, 5), (200, 20), (1_000, 60), (1_003, 20), (5_000, 60)])
def test_best_unordered_holds_the_k_highest(items: int, k: int) -> None:
    scores = np.random.default_rng(items).normal(size=(7, items)).astype(np.float32)
    scores[2, k // 2 :] = -np.inf
    scores[3] = 1.0
    found = best_unordered(scores, k)
    expected = -np.sort(-scores, axis=1)[:, :k]
    np.testing.assert_array_equal(-np.sort(-np.take_along_axis(scores, found, 1), axis=1), expected)
    assert all(len(set(row)) == k for row in found.tolist())


def test_exclude_takes_out_each_users_own_items_and_no_others() -> None:
    scores = np.ones((3, 4), np.float32)
    # Row 0 stands for an item that nobody knows, 9 for one that the catalogue no longer has.
    exclude(scores, np.array([1, 0, 4, 9, 2], np.int32), np.array([0, 2, 2, 5]))
    assert np.argwhere(np.isneginf(scores)).tolist() == [[0, 0], [2, 1], [2, 3]]
