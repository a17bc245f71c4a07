from __future__ import annotations

import numpy as np
import pytest
from nightstream.errors import ArtifactError
from nightstream.models.ranking.linear_ranker import Linear, fit_linear

COLUMNS, LOGS = np.array([0, 2, 2]), np.array([False, False, True])


def drawn(weights: list[float], groups: int = 3000, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Groups of five whose label is drawn by the softmax of a known linear score of the columns."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(groups, 5, len(weights))).astype(np.float32)
    scores = features @ np.asarray(weights) + rng.gumbel(size=(groups, 5))
    labels = (scores == scores.max(1, keepdims=True)).astype(np.float32)
    return features.reshape(-1, len(weights)), labels.ravel(), np.full(groups, 5)


def test_it_finds_the_weights_that_drew_the_labels() -> None:
    linear = fit_linear(*drawn([1.0, 0.0, -0.5]), np.arange(3), np.zeros(3, bool), l2=0.0)
    np.testing.assert_allclose(linear.weights / linear.scale, [1.0, 0.0, -0.5], atol=0.06)


def test_contributions_add_up_to_the_score_and_stay_in_their_columns() -> None:
    features = drawn([1.0, 0.5, 0.2])[0][:20]
    linear = fit_linear(*drawn([1.0, 0.5, 0.2], groups=50), COLUMNS, LOGS)
    parts = linear.contributions(features)
    np.testing.assert_allclose(parts.sum(1), linear.score(features), atol=1e-5)
    assert not parts[:, 1].any()


def test_a_row_has_the_very_same_score_in_any_batch() -> None:
    features = drawn([1.0, 0.5, 0.2])[0][:100]
    linear = fit_linear(*drawn([1.0, 0.5, 0.2], groups=50), COLUMNS, LOGS)
    np.testing.assert_array_equal(linear.score(features)[7:8], linear.score(features[7:8]))


def test_json_there_and_back_and_nonsense_is_refused() -> None:
    features = drawn([1.0, 0.5, 0.2])[0][:100]
    linear = fit_linear(*drawn([1.0, 0.5, 0.2], groups=50), COLUMNS, LOGS)
    np.testing.assert_array_equal(Linear.from_json(linear.to_json()).score(features), linear.score(features))
    for text in ("", "{}", "[1]"):
        with pytest.raises(ArtifactError, match="linear"):
            Linear.from_json(text)


def test_a_term_that_stands_still_but_for_rounding_has_no_weight() -> None:
    features, labels, sizes = drawn([1.0, 0.5, 0.2], groups=200)
    features[:, 1] = 0.7 + 1e-7 * np.random.default_rng(1).normal(size=len(features))
    linear = fit_linear(features, labels, sizes, np.arange(3), np.zeros(3, bool))
    elsewhere = features.copy()
    elsewhere[:, 1] = 1.4
    np.testing.assert_array_equal(linear.score(elsewhere), linear.score(features))
    assert linear.weights[0] > 0.5


def test_what_lies_far_from_all_that_was_learnt_from_does_not_rule_the_score() -> None:
    features, labels, sizes = drawn([1.0, 0.5, 0.2], groups=200)
    linear = fit_linear(features, labels, sizes, np.arange(3), np.zeros(3, bool))
    far = np.concatenate([features[:1], features[:1]])
    far[:, 2] = 20, 2_000
    np.testing.assert_array_equal(linear.score(far)[0], linear.score(far)[1])
