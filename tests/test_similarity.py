from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nightstream.similarity import BLOCK, best_columns, best_unordered, cosine, top_k, unit


def test_cosine_of_the_articles_example_is_what_the_formula_gives_and_not_what_the_article_prints() -> None:
    value = float(cosine(np.array([1.0, 2.0, 3.0]), np.array([4.0, 5.0, 6.0]))[0, 0])
    assert value == pytest.approx(32 / np.sqrt(14 * 77), abs=1e-6)
    assert value == pytest.approx(0.9746, abs=5e-5)
    assert abs(value - 0.732) > 0.2


def test_cosine_with_the_zero_vector_is_zero() -> None:
    assert cosine(np.zeros(3), np.ones(3))[0, 0] == 0.0


@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 9))
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


def test_top_k_leaves_out_seen_and_unavailable_items_and_pads_with_row_zero() -> None:
    items = unit(np.array([[1, 0], [0.9, 0.1], [0, 1], [-1, 0]], np.float32))
    available = np.array([True, True, False, True])
    rows, scores = top_k(np.array([[1, 0]], np.float32), items, 4, available, np.array([1], np.int32), np.array([0, 1]))
    assert rows.tolist() == [[2, 4, 0, 0]]
    assert scores[0, 1] == pytest.approx(-1.0)
    assert np.isneginf(scores[0, 2:]).all()


def test_top_k_equals_brute_force() -> None:
    rng = np.random.default_rng(0)
    users, items = unit(rng.normal(size=(150, 8))), unit(rng.normal(size=(40, 8)))
    rows, _ = top_k(users, items, 5)
    expected = np.argsort(-(users.astype(np.float64) @ items.T.astype(np.float64)), axis=1)[:, :5] + 1
    assert rows.tolist() == expected.tolist()


def test_a_users_result_is_the_same_alone_and_in_any_batch() -> None:
    rng = np.random.default_rng(1)
    users, items = unit(rng.normal(size=(BLOCK + 30, 16))), unit(rng.normal(size=(300, 16)))
    rows, scores = top_k(users, items, 10)
    for user in (0, 17, BLOCK - 1, BLOCK, BLOCK + 29):
        alone_rows, alone_scores = top_k(users[user : user + 1], items, 10)
        assert alone_rows[0].tolist() == rows[user].tolist()
        np.testing.assert_array_equal(alone_scores[0], scores[user])
