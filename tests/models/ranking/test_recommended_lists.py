"""What a list holds, whichever way its candidates came: every source reaches it, and nothing that it must not hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from learning_data import catalogue_of, make_windows, no_users, ring_sequences
from nightstream.models.arrays import TRAIN
from nightstream.models.ranking.candidate_sources import SourceSizes, fit_sources
from nightstream.models.ranking.candidates import prepare
from nightstream.models.ranking.recommend import recommend_block
from nightstream.models.ranking.topk import unit

ITEMS, WIDTH = 400, 4
# Row 1 is the most popular and not lately, row 200 has a few events, the newest, row 300 has one, after row 350, and
# row 399 none.
POPULAR, TRENDING, FOLLOWER, WINDOW, UNKNOWN = 1, 200, 300, 350, 399


class FarthestFirst:
    """A ranker that prefers what the vectors like least: what leads its list came from another source."""

    def score(self, values: np.ndarray) -> np.ndarray:
        return -10 * values[:, 0]

    def contributions(self, values: np.ndarray) -> np.ndarray:
        return np.zeros_like(values)


RANKER: Any = FarthestFirst()


def sources_and_rows() -> tuple[Any, dict[str, int]]:
    sequences = ring_sequences(users=60, items=ITEMS, events=14, step=1)
    items = sequences.items.reshape(60, 14)
    items[np.isin(items, (TRENDING, FOLLOWER, WINDOW, UNKNOWN))] = 2
    items[:-20, 0:3] = POPULAR
    items[0, 5:7] = WINDOW, FOLLOWER
    items[-1, 9:12] = TRENDING
    sizes = SourceSizes(half_life_days=1000.0, trend_half_life_days=0.01)
    rows = {f"i{row}": row for row in range(1, ITEMS + 1)}
    return fit_sources(replace(sequences, items=items.ravel()), ITEMS, (TRAIN,), sizes), rows


def vectors(near: dict[int, float], width: int = WIDTH) -> np.ndarray:
    """float32 [ITEMS, width]: unit vectors whose cosine with the first axis is that of `near`, else about 0.5."""
    cosine = np.full(ITEMS, 0.5) + np.linspace(0, 0.01, ITEMS)
    for row, value in near.items():
        cosine[row - 1] = value
    found = np.zeros((ITEMS, width), np.float32)
    found[:, 0], found[:, 1] = cosine, np.sqrt(1 - cosine**2)
    return found


USER = np.array([[1.0, 0, 0, 0]], np.float32)


@pytest.mark.parametrize(("row", "window"), [(POPULAR, UNKNOWN), (TRENDING, UNKNOWN), (FOLLOWER, WINDOW)])
def test_an_item_reaches_the_list_by_one_source_alone(row: int, window: int) -> None:
    sources, rows = sources_and_rows()
    table = prepare(catalogue_of(vectors({row: -0.9})), rows, [("gru", WIDTH, 1.0)], sources)
    lists = recommend_block(make_windows([[window]], users=no_users(1)), USER, table, sources, RANKER, 5)
    assert lists.rows[0, 0] == row


def test_an_item_that_no_source_puts_forward_is_in_no_list() -> None:
    sources, rows = sources_and_rows()
    table = prepare(catalogue_of(vectors({FOLLOWER: -0.9})), rows, [("gru", WIDTH, 1.0)], sources)
    lists = recommend_block(make_windows([[UNKNOWN]], users=no_users(1)), USER, table, sources, RANKER, 5)
    assert FOLLOWER not in lists.rows
    assert (lists.rows > 0).all()


def test_each_member_of_an_ensemble_puts_items_forward() -> None:
    sources, rows = sources_and_rows()
    second = vectors({50: 0.99})
    catalogue = catalogue_of(unit(np.concatenate([vectors({50: -1.0}), 0.1 * second], 1)))
    table = prepare(catalogue, rows, [("gru", WIDTH, 0.9), ("cnn", WIDTH, 0.1)], sources)
    windows = make_windows([[UNKNOWN]], users=no_users(1))
    user = unit(np.concatenate([USER, 0.1 * USER], 1))
    assert recommend_block(windows, user, table, sources, RANKER, 5).rows[0, 0] == 50


@pytest.mark.parametrize("ranker", [RANKER, None])
def test_a_list_longer_than_any_source_is_full_and_holds_no_item_twice(ranker: Any) -> None:
    sources, rows = sources_and_rows()
    catalogue = catalogue_of(vectors({}))
    available = np.ones(ITEMS, bool)
    available[[POPULAR - 1, 20]] = False
    table = prepare(replace(catalogue, available=available), rows, [("gru", WIDTH, 1.0)], sources)
    seen = [[WINDOW, FOLLOWER, 7], [], list(range(1, ITEMS - 9))]
    windows = make_windows([[WINDOW], [], [5]], users=no_users(3), seen=seen)
    lists = recommend_block(windows, np.repeat(USER, 3, 0), table, sources, ranker, 200)
    for row, out, size in zip(lists.rows.tolist(), seen, (200, 200, 10), strict=True):
        listed = row[:size]
        assert 0 not in listed
        assert row[size:] == [0] * (200 - size)
        assert len(set(listed)) == size
        assert not {POPULAR, 21, *out} & set(listed)


def test_items_that_the_model_has_not_met_are_listed_by_their_vectors() -> None:
    sources, rows = sources_and_rows()
    del rows["i77"]
    table = prepare(catalogue_of(vectors({77: 0.99})), rows, [("gru", WIDTH, 1.0)], sources)
    lists = recommend_block(make_windows([[WINDOW]], users=no_users(1)), USER, table, sources, None, 5)
    assert lists.rows[0, 0] == 77
    assert lists.scores[0, 0] == pytest.approx(0.99)
