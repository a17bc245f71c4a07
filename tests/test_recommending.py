"""The ranker's columns mean the same whatever catalogue and users they are computed for."""

from __future__ import annotations

import numpy as np
import pytest
from learning_data import catalogue_of, make_windows, no_users, ring_sequences
from nightstream.blocks import TRAIN
from nightstream.ranking import feature_names
from nightstream.recommending import candidates, features, prepare, score_block
from nightstream.retrieval import SourceSizes, fit_sources
from nightstream.similarity import unit

ITEMS, WIDTH = 30, 8


@pytest.mark.parametrize("unmet", [0, 3])
def test_without_attributes_a_segment_lifts_nothing(unmet: int) -> None:
    """Also where every item of the catalogue has been met, and the least popular one has more than no share."""
    rng, sequences = np.random.default_rng(0), ring_sequences(items=ITEMS)
    # A few more who all want the first item, so that items differ in popularity.
    sequences.items[:200] = 1
    sources = fit_sources(sequences, ITEMS, (TRAIN,), SourceSizes())
    catalogue = catalogue_of(unit(rng.normal(size=(ITEMS + unmet, WIDTH)).astype(np.float32)))
    rows = {item: row for row, item in enumerate(catalogue.item_ids[:ITEMS], 1)}
    table = prepare(catalogue, rows, [("gru", WIDTH, 1.0)], sources)
    windows = make_windows([[1, 8, 15], [2, 9]], users=no_users(2))
    scores = score_block(windows, unit(rng.normal(size=(2, WIDTH)).astype(np.float32)), table, sources, True)
    columns = candidates(scores, table, 5)
    values = features(scores, table, windows, columns)[columns >= 0]
    assert np.ptp(values[:, feature_names(("gru",)).index("log_popularity")]) > 0.1
    assert np.abs(values[:, feature_names(("gru",)).index("segment_lift")]).max() < 1e-5
