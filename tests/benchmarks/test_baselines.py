"""Each baseline against a slow, obvious re-implementation."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from als import SparkALS, fold_in
from baselines import (
    Fusion,
    Histories,
    ItemKNN,
    Popular,
    best_rows,
    histories_before,
    popularity,
    tuned,
    used_events,
    validated,
)
from learning_data import no_users
from nightstream.models.arrays import RANK, TRAIN, VALID, Sequences

ITEMS = 12
EVERYTHING = (TRAIN, RANK, VALID)


def log_of(users: list[list[int]]) -> Sequences:
    """Users' items in order; the last event of each is VALID, the one before RANK."""
    sizes = [len(u) for u in users]
    roles = [r for n in sizes for r in ([TRAIN] * n + [RANK, VALID])[-n:]]
    count = sum(sizes)
    return Sequences(
        np.cumsum([0, *sizes]).astype(np.int64),
        np.asarray([i for u in users for i in u], np.int32),
        np.ones(count, np.int32),
        np.arange(count, dtype=np.int64),
        np.zeros(count, np.float32),
        np.asarray(roles, np.int8),
        no_users(len(users)),
    )


def histories_of(rows: list[list[int]], seen: list[list[int]] | None = None) -> Histories:
    def flat(lists: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        return np.asarray([i for row in lists for i in row], np.int64), np.cumsum([0, *map(len, lists)])

    return Histories(*flat(rows), *flat(rows if seen is None else seen))


@pytest.fixture
def users() -> list[list[int]]:
    rng = np.random.default_rng(4)
    return [[int(i) for i in rng.choice(np.arange(1, ITEMS + 1), rng.integers(3, 8), False)] for _ in range(15)]


class Fixed:
    """Scores that are given, whatever the history."""

    name = "fixed"

    def __init__(self, scores: list[float]) -> None:
        self.given = np.asarray(scores)

    def fit(self, log: Sequences, size: int, roles: Any, valid: Any = None) -> None:
        pass

    def scores(self, histories: Histories) -> np.ndarray:
        return np.tile(self.given, (len(histories), 1))

    def settled(self) -> dict[str, Any]:
        return {}


def test_popularity_counts_events_of_the_roles_alone(users):
    log = log_of(users)
    model = Popular()
    model.fit(log, ITEMS, (TRAIN, RANK))
    counts = Counter(i for u in users for i in u[:-1])
    expected = [counts[i] / sum(counts.values()) for i in range(1, ITEMS + 1)]
    np.testing.assert_allclose(model.scores(histories_of([[1], [2]])), [expected] * 2)


@pytest.mark.parametrize(("decay", "neighbours", "shrink"), [(1.0, 99, 0.0), (0.7, 3, 2.0)])
def test_item_knn_is_the_sum_of_cosines_over_the_history(users, decay, neighbours, shrink):
    model = ItemKNN(decay, neighbours, shrink)
    model.fit(log_of(users), ITEMS, (TRAIN, RANK))
    users_of = {i: {n for n, u in enumerate(users) if i in u[:-1]} for i in range(1, ITEMS + 1)}

    def similar(a: int) -> dict[int, float]:
        found = {
            b: len(users_of[a] & users_of[b]) / (math.sqrt(len(users_of[a]) * len(users_of[b])) + shrink)
            for b in users_of
            if a != b and users_of[a] & users_of[b]
        }
        return dict(sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))[:neighbours])

    histories = [[3], [1, 5, 2], [7, 8, 9, 10, 11]]
    expected = np.zeros((len(histories), ITEMS))
    for row, history in enumerate(histories):
        for age, item in enumerate(reversed(history)):
            for other, value in similar(item).items():
                expected[row, other - 1] += decay**age * value
    np.testing.assert_allclose(model.scores(histories_of(histories)), expected, atol=1e-8)
    assert expected.any(1).all()


def test_an_item_without_neighbours_leaves_the_order_to_popularity():
    model = ItemKNN()
    model.fit(log_of([[1, 2, 3], [1, 2, 3], [2, 1, 4]]), 6, EVERYTHING)
    rows, _ = best_rows(model, histories_of([[6]]), popularity(log_of([[3]]), 6, EVERYTHING), 3)
    assert rows.tolist() == [[1, 2, 3]]


def test_repeated_items_weigh_as_their_newest_event():
    weights = histories_of([[2, 3, 2], []]).weights(0.5, 4).toarray()
    np.testing.assert_allclose(weights, [[0, 0, 1.0, 0.5, 0], [0] * 5])


def test_newest_pads_on_the_left():
    assert histories_of([[1, 2, 3], [], [4]]).newest(2).tolist() == [[2, 3], [0, 0], [0, 4]]


def test_histories_before_events(users):
    log = log_of(users)
    events = np.flatnonzero(log.roles == VALID)
    made = histories_before(log, events)
    for n, user in enumerate(users):
        assert made.slice(n, n + 1).items.tolist() == user[:-1]
        assert made.slice(n, n + 1).seen.tolist() == user[:-1]


def test_best_rows_leave_out_what_is_seen_and_fall_back_on_nothing_known():
    model = Fixed([0.1, 0.4, 0.3, 0.2])
    fallback = np.array([0.9, 0.1, 0.2, 0.3])
    rows, scores = best_rows(model, histories_of([[1], [], [1]], [[2], [1], [1, 2, 3]]), fallback, 3)
    assert rows.tolist() == [[3, 4, 1], [4, 3, 2], [4, 0, 0]]
    np.testing.assert_allclose(scores[0], [0.3, 0.2, 0.1])


def test_folding_in_solves_the_normal_equations(users):
    rng = np.random.default_rng(0)
    factors = rng.normal(size=(ITEMS, 4))
    factors[6] = 0
    regularisation, alpha = 0.3, 5.0
    found = fold_in(histories_of([[1, 2, 7, 1], [], [7]]), factors, regularisation, alpha)
    # Minimise Σ over all items of c (p − x·y)² + λ n |x|², c = 1 + α and p = 1 at the user's items, else 1 and 0.
    confidence, wanted = np.ones(ITEMS), np.zeros(ITEMS)
    confidence[[0, 1]], wanted[[0, 1]] = 1 + alpha, 1.0
    root = np.sqrt(confidence)[:, None]
    system = np.concatenate([root * factors, math.sqrt(2 * regularisation) * np.eye(4)])
    expected = np.linalg.lstsq(system, np.concatenate([root[:, 0] * wanted, np.zeros(4)]), rcond=None)[0]
    np.testing.assert_allclose(found, [expected, np.zeros(4), np.zeros(4)], atol=1e-9)


def test_folding_in_gives_sparks_own_user_factors(spark, users, monkeypatch):
    monkeypatch.setattr("als.ITERATIONS", 2)
    log = log_of(users)
    model = SparkALS(spark, rank=3, regularisation=0.2, alpha=4.0, seed=1)
    model.fit(log, ITEMS, EVERYTHING)
    wanted = {r.id: r.features for r in model.model.userFactors.collect()}
    found = fold_in(histories_of(users), model.factors, 0.2, 4.0)
    np.testing.assert_allclose(found, [wanted[n] for n in range(len(users))], atol=1e-4)
    assert np.abs(found).max() > 0.05


def test_fusion_adds_reciprocal_ranks():
    first, second = Fixed([4, 3, 2, 1]), Fixed([1, 2, 4, 3])
    fused = Fusion([first, second], np.zeros(4))
    found = fused.scores(histories_of([[1]], [[1]]))
    expected = [0, 1 / 61 + 1 / 63, 1 / 62 + 1 / 61, 1 / 63 + 1 / 62]
    np.testing.assert_allclose(found[0], expected)


def test_tuning_takes_the_option_that_finds_the_validation_events():
    log = log_of([[1, 2, 3, 4], [5, 6, 1, 4], [2, 3, 6, 5]])
    targets = np.flatnonzero(log.roles == VALID)

    def make(right: float, other: str) -> Fixed:
        # Item 4 is the validation event of two users, 5 of one.
        return Fixed([0, 0, 0, right, 1.0 if other == "b" else 0.0, 0.5])

    notes: list[str] = []
    assert tuned(make, {"right": (0.0, 2.0), "other": ("a", "b")}, log, 6, targets, notes.append) == {
        "right": 2.0,
        "other": "b",
    }
    assert len(notes) == 3
    score = validated(make(2.0, "b"), log, targets, np.zeros(6))
    # Users 1 and 2 have 4 first; user 3 has seen neither, so 4 comes before the 5 that is wanted.
    assert score == pytest.approx((1 + 1 + 1 / math.log2(3)) / 3)


def test_tuning_fits_to_nothing_of_validation(users):
    class Told(Fixed):
        def fit(self, log: Sequences, size: int, roles: Any, valid: Any = None) -> None:
            assert VALID not in roles
            assert len(used_events(log, roles)[1]) == sum(len(u) - 1 for u in users)

    log = log_of(users)
    tuned(lambda: Told([0.0] * ITEMS), {}, log, ITEMS, np.flatnonzero(log.roles == VALID))
    tuned(lambda a: Told([a] * ITEMS), {"a": (0.0,)}, log, ITEMS, np.flatnonzero(log.roles == VALID))
