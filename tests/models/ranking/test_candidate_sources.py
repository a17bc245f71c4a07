"""The sources of one model: what they are fitted to, and the way to arrays and back."""

from __future__ import annotations

import numpy as np
import pytest
from learning_data import no_users, ring_sequences
from nightstream.errors import ArtifactError
from nightstream.models.arrays import RANK, TRAIN
from nightstream.models.ranking import candidate_sources
from nightstream.models.ranking.candidate_sources import Sources, SourceSizes, fit_sources
from nightstream.models.ranking.sources.neighbours import Covisitation, ItemKnn
from nightstream.models.ranking.sources.registry import SOURCES


def test_events_of_other_roles_are_not_counted() -> None:
    sequences = ring_sequences(users=1, items=30, events=4)
    sources = fit_sources(sequences, 30, (TRAIN,), SourceSizes())
    held_out = sequences.items[2:]
    assert not sources.popularity[held_out].any()
    assert not sources.get(Covisitation).neighbours[:, held_out].nnz
    assert fit_sources(sequences, 30, (TRAIN, RANK), SourceSizes()).popularity[held_out[0]] > 0


def test_arrays_there_and_back_and_a_missing_one_is_named() -> None:
    sources = fit_sources(ring_sequences(), 30, (TRAIN,), SourceSizes(recency=0.7))
    arrays = sources.to_arrays()
    again = Sources.from_arrays(arrays, sources.names)
    assert (again.names, again.recency) == (tuple(SOURCES), 0.7)
    for name, array in again.to_arrays().items():
        np.testing.assert_array_equal(array, arrays[name], err_msg=name)
    for name in ("popularity", "recency", "knn.data", "segment_offsets"):
        with pytest.raises(ArtifactError, match=name):
            Sources.from_arrays({k: v for k, v in arrays.items() if k != name}, sources.names)


def without(fitted: Sources, name: str) -> Sources:
    arrays = {k: v for k, v in fitted.to_arrays().items() if k not in SOURCES[name].arrays}
    return Sources.from_arrays(arrays, [n for n in fitted.names if n != name])


def test_a_model_keeps_the_sources_that_it_was_trained_with(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = fit_sources(ring_sequences(), 30, (TRAIN,), SourceSizes())
    earlier = without(sources, "knn")
    assert earlier.names == ("covisitation", "popularity", "trend", "segments")
    with pytest.raises(KeyError, match="knn"):
        earlier.get(ItemKnn)
    with pytest.raises(ArtifactError, match=r"the arrays knn\.data"):
        Sources.from_arrays(sources.to_arrays(), earlier.names)
    with pytest.raises(ArtifactError, match="lacks the candidate source popularity"):
        without(sources, "popularity")
    fewer = {name: kind for name, kind in SOURCES.items() if name != "trend"}
    monkeypatch.setattr(candidate_sources, "SOURCES", fewer)
    with pytest.raises(ArtifactError, match=r"not registered here \(trend\)"):
        Sources.from_arrays(sources.to_arrays(), sources.names)


def test_sources_keep_their_order_whatever_the_registrys_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranker's columns follow it, and a worker may have registered the same sources in another order."""
    sources = fit_sources(ring_sequences(), 30, (TRAIN,), SourceSizes())
    monkeypatch.setattr(candidate_sources, "SOURCES", dict(reversed(SOURCES.items())))
    assert Sources.from_arrays(sources.to_arrays(), sources.names).names == sources.names
    assert fit_sources(ring_sequences(), 30, (TRAIN,), SourceSizes()).names == sources.names[::-1]


def test_without_segments_the_share_among_all_users_counts() -> None:
    sources = without(fit_sources(ring_sequences(), 30, (TRAIN,), SourceSizes()), "segments")
    items = np.array([[3, 0, 7]])
    np.testing.assert_array_equal(sources.segment_scores(no_users(1), items), sources.popularity[items])


def test_no_source_names_the_arrays_of_another() -> None:
    names = [name for source in SOURCES.values() for name in source.arrays]
    assert len(names) == len(set(names))
    assert all(name == source.name for name, source in SOURCES.items())


def test_no_events_at_all() -> None:
    sequences = ring_sequences(users=2, events=2)
    sources = fit_sources(sequences, 30, (TRAIN,), SourceSizes())
    assert not sources.popularity.any()
