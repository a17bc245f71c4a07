"""Shares of events that decay."""

from __future__ import annotations

import numpy as np
import pytest
from learning_data import ring_sequences
from nightstream.models.arrays import TRAIN
from nightstream.models.ranking.candidate_sources import SourceSizes, fit_sources
from nightstream.models.ranking.sources.base import MICROSECONDS_PER_DAY
from nightstream.models.ranking.sources.shares import Trend, decayed_shares, span_days


def test_an_event_counts_half_after_one_half_life() -> None:
    times = np.array([0, 10 * MICROSECONDS_PER_DAY], np.int64)
    shares = decayed_shares(np.array([1, 2]), times, 4, 10.0)
    assert shares.tolist() == pytest.approx([0, 1 / 3, 2 / 3, 0])


def test_half_lives_are_those_given_or_the_time_span_and_a_fiftieth_of_it() -> None:
    sequences = ring_sequences()
    days = span_days(sequences.times[sequences.roles == TRAIN])
    auto = fit_sources(sequences, 30, (TRAIN,), SourceSizes())
    given = fit_sources(sequences, 30, (TRAIN,), SourceSizes(half_life_days=days, trend_half_life_days=days / 50))
    other = fit_sources(sequences, 30, (TRAIN,), SourceSizes(half_life_days=days / 9, trend_half_life_days=days / 9))
    np.testing.assert_array_equal(auto.popularity, given.popularity)
    np.testing.assert_array_equal(auto.get(Trend).shares, given.get(Trend).shares)
    np.testing.assert_array_equal(other.popularity, other.get(Trend).shares)
    assert np.abs(auto.popularity - other.popularity).max() > 1e-4
    assert np.abs(auto.get(Trend).shares - other.get(Trend).shares).max() > 1e-4
