from __future__ import annotations

import numpy as np
import pytest
from nightstream.errors import ArtifactError
from nightstream.models.ranking.rank_features import RankerFeatures
from nightstream.models.ranking.ranker import LabelledGroups, Ranker, RankerSizes, train_ranker
from nightstream.models.ranking.sources.registry import SOURCES
from nightstream.models.ranking.strategies import STRATEGIES

READS = RankerFeatures(("gru",), tuple(SOURCES))


def groups(seed: int, count: int = 80, telling: str = "window_events") -> LabelledGroups:
    """Groups of ten whose target is the row with the highest value of one feature; the others are noise."""
    rng = np.random.default_rng(seed)
    names = READS.names
    values = rng.random((count, 10, len(names))).astype(np.float32)
    labels = np.zeros((count, 10), np.float32)
    np.put_along_axis(labels, values[:, :, names.index(telling)].argmax(1)[:, None], 1.0, 1)
    return LabelledGroups(values.reshape(-1, len(names)), labels.ravel(), np.full(count, 10))


@pytest.fixture(scope="module")
def ranker() -> Ranker:
    trained = train_ranker(groups(0), groups(1), READS, RankerSizes(trees=60, threads=1, min_child_weight=0.1), 3)
    assert trained is not None
    return trained


def test_it_finds_the_feature_that_tells(ranker: Ranker) -> None:
    test = groups(2)
    scores = ranker.score(test.features).reshape(-1, 10)
    assert (scores.argmax(1) == test.labels.reshape(-1, 10).argmax(1)).mean() > 0.6


def test_contributions_add_up_to_the_score_and_name_the_telling_feature(ranker: Ranker) -> None:
    test = groups(2)
    parts = ranker.contributions(test.features)
    rest = ranker.score(test.features) - parts.sum(1)
    np.testing.assert_allclose(rest, rest[0], atol=1e-4)
    assert np.abs(parts).mean(0).argmax() == READS.names.index("window_events")


def test_a_row_has_the_same_score_in_any_batch(ranker: Ranker) -> None:
    values = groups(4).features
    np.testing.assert_array_equal(ranker.score(values)[5:6], ranker.score(values[5:6]))


def test_bytes_there_and_back(ranker: Ranker) -> None:
    values = groups(4).features
    again = Ranker.from_bytes(ranker.to_bytes(), READS)
    np.testing.assert_array_equal(again.score(values), ranker.score(values))
    np.testing.assert_array_equal(again.contributions(values), ranker.contributions(values))
    assert again.columns == ranker.columns == READS.names


def test_a_ranker_whose_file_names_no_columns_is_read(ranker: Ranker) -> None:
    values = groups(4).features
    nameless = Ranker(ranker.booster, ranker.linear).to_bytes()
    assert Ranker.from_bytes(nameless, READS).columns == []
    np.testing.assert_array_equal(Ranker.from_bytes(nameless, READS).score(values), ranker.score(values))


def test_damaged_or_foreign_bytes_are_refused(ranker: Ranker) -> None:
    with pytest.raises(ArtifactError, match="XGBoost"):
        Ranker.from_bytes(b"{nonsense", READS)
    with pytest.raises(ArtifactError, match="18 features, its model 21"):
        Ranker.from_bytes(ranker.to_bytes(), RankerFeatures(("gru", "cnn"), tuple(SOURCES)))


def test_a_ranker_of_the_same_features_in_another_order_is_refused(ranker: Ranker) -> None:
    reads = RankerFeatures(("gru",), tuple(reversed(SOURCES)))
    with pytest.raises(ArtifactError, match="from the feature covisitation where its model gives segment_lift"):
        Ranker.from_bytes(ranker.to_bytes(), reads)


def test_two_columns_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two columns last_cosine"):
        RankerFeatures(("gru", "last"), tuple(SOURCES))


def test_groups_without_their_target_are_left_out_and_nothing_to_learn_gives_none() -> None:
    some = groups(0, count=4)
    some.labels[:10] = 0
    assert some.with_target().sizes.tolist() == [10, 10, 10]
    assert some.with_target().labels.sum() == 3
    some.labels[:] = 0
    assert train_ranker(some, some, READS, RankerSizes(), 0) is None


def test_every_feature_of_a_source_counts_for_a_strategy() -> None:
    reads = RankerFeatures(("gru", "cnn"), tuple(SOURCES))
    names, by = reads.names, reads.groups()
    assert len(names) == len(by) == len(set(names))
    assert {STRATEGIES[g] for g in by if g >= 0} == set(STRATEGIES) - {"content"}
