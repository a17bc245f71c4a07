"""Shares of events among people of one kind."""

from __future__ import annotations

import numpy as np
from learning_data import no_users, ring_sequences
from nightstream.models.arrays import TRAIN, UserFeatures
from nightstream.models.ranking.candidate_sources import SourceSizes, fit_sources


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
