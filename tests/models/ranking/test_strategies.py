from __future__ import annotations

import numpy as np
import pytest
from nightstream.models.ranking.reasons import strongest_event, strongest_group
from nightstream.models.ranking.strategies import STRATEGIES, reason_text


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_has_a_sentence_with_and_without_a_title(strategy: str) -> None:
    assert reason_text(strategy)
    assert "{" not in reason_text(strategy)
    if strategy in ("sequence", "covisitation", "content"):
        assert "Dune" in reason_text(strategy, "Dune")


def test_an_unknown_strategy_is_refused() -> None:
    with pytest.raises(ValueError, match="magic"):
        reason_text("magic")


def test_the_group_with_the_greatest_sum_wins_unless_it_is_not_allowed() -> None:
    contributions = np.array([[0.5, 0.6, 0.9, 9.0], [0.5, 0.6, 0.9, 9.0], [-2, -1, -0.1, 0]], np.float32)
    groups = np.array([0, 0, 3, -1])
    allowed = np.ones((3, len(STRATEGIES)), bool)
    allowed[1, 0] = False
    assert strongest_group(contributions, groups, allowed).tolist() == [0, 3, 3]


def test_the_newest_of_equal_events_is_named_and_none_where_nothing_weighs() -> None:
    weights = np.array([[0, 2, 2, 1], [3, 0, 0, 0], [0, 0, 0, 0]], np.float32)
    assert strongest_event(weights).tolist() == [2, 0, -1]
    assert strongest_event(np.zeros((2, 0), np.float32)).tolist() == [-1, -1]
