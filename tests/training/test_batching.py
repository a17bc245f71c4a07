from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from learning_data import no_users
from nightstream.models.arrays import RANK, TRAIN, VALID, Sequences
from nightstream.training import batching


def histories(lengths: list[int], seed: int = 0) -> Sequences:
    rng = np.random.default_rng(seed)
    events = sum(lengths)
    return Sequences(
        np.cumsum([0, *lengths]).astype(np.int64),
        np.arange(1, events + 1, dtype=np.int32),
        np.ones(events, np.int32),
        np.arange(events, dtype=np.int64) * 1_000_000,
        rng.random(events).astype(np.float32),
        rng.choice([TRAIN, RANK, VALID], events).astype(np.int8),
        no_users(len(lengths)),
    )


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 12), st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_every_target_with_a_history_comes_exactly_once_and_with_enough_before_it(
    lengths: list[int], window: int, seed: int
) -> None:
    sequences = histories(lengths, seed)
    is_target = sequences.roles == TRAIN
    chunks = batching.cut_chunks(sequences, np.arange(len(lengths)), window, is_target, np.random.default_rng(seed))
    found = []
    for c in range(len(chunks)):
        start = sequences.offsets[chunks.users[c]]
        assert start <= chunks.first[c] <= chunks.last[c]
        assert chunks.last[c] - chunks.first[c] + 1 <= window
        for event in range(chunks.target_from[c], chunks.last[c] + 2):
            assert event < sequences.offsets[chunks.users[c] + 1]
            assert event - chunks.first[c] >= min(event - start, window // 3, window)
            if is_target[event]:
                found.append(event)
    first = set(sequences.offsets[:-1].tolist())
    assert sorted(found) == [e for e in np.flatnonzero(is_target).tolist() if e not in first]


@pytest.mark.parametrize(("window", "targets"), [(9, 6), (8, 6), (3, 2), (2, 2), (1, 1)])
def test_a_long_history_is_cut_into_targets_of_two_thirds_of_a_window(window: int, targets: int) -> None:
    sequences = histories([window + 1, 60])
    chunks = batching.cut_chunks(sequences, np.arange(2), window, sequences.roles >= 0, np.random.default_rng(1))
    short, long = (chunks.target_counts[chunks.users == user] for user in (0, 1))
    # A window's worth of targets needs no cut; of a longer history only the ends are shorter.
    assert short.tolist() == [window]
    assert set(long[1:-1].tolist()) == {targets}
    assert long.max() == targets
    assert long.sum() == 59


def test_where_a_long_history_is_cut_is_drawn() -> None:
    sequences = histories([60])
    first = [
        batching.cut_chunks(sequences, np.arange(1), 9, sequences.roles >= 0, np.random.default_rng(seed))
        .target_counts[0]
        for seed in range(60)
    ]  # fmt: skip
    assert set(first) == {1, 2, 3, 4, 5, 6}


def test_batches_hold_every_chunk_once_and_depend_on_the_seed_alone() -> None:
    sequences = histories([30, 5, 17, 2, 9, 40] * 5)
    everyone = np.arange(len(sequences))
    chunks = batching.cut_chunks(sequences, everyone, 8, sequences.roles >= 0, np.random.default_rng(0))
    parts = batching.batches(chunks, 20, np.random.default_rng(3))
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(chunks)))
    again = batching.batches(chunks, 20, np.random.default_rng(3))
    assert [p.tolist() for p in parts] == [p.tolist() for p in again]
    assert max(chunks.target_counts[p].sum() for p in parts) <= 20 + 8


def test_windows_before_hold_the_events_before_and_never_the_target() -> None:
    sequences = histories([3, 6])
    windows = batching.windows_before(sequences, np.array([2, 8]), 4)
    assert windows.items.tolist() == [[0, 0, 1, 2], [5, 6, 7, 8]]
    assert windows.times.tolist() == [[0, 0, 0, 1_000_000], [4_000_000, 5_000_000, 6_000_000, 7_000_000]]
    assert windows.seen.tolist() == [1, 2, 4, 5, 6, 7, 8]
    assert windows.seen_offsets.tolist() == [0, 2, 7]


def test_sampled_targets_have_the_role_and_a_history() -> None:
    sequences = histories([1, 4, 4])
    sequences.roles[:] = [VALID, VALID, TRAIN, VALID, VALID, RANK, VALID, VALID, TRAIN]
    assert batching.sampled_targets(sequences, VALID, 10, 0).tolist() == [3, 4, 6, 7]
    few = batching.sampled_targets(sequences, VALID, 2, 0)
    assert len(few) == 2
    assert few.tolist() == batching.sampled_targets(sequences, VALID, 2, 0).tolist()


def test_in_blocks_covers_the_range() -> None:
    assert list(batching.in_blocks(5, 2)) == [(0, 2), (2, 4), (4, 5)]
    with pytest.raises(ValueError, match="zero"):
        list(batching.in_blocks(5, 0))
