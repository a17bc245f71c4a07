"""Sequences cut into chunks for training, and into windows for the targets that early stopping looks at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from nightstream.models.arrays import Sequences, Windows


@dataclass(frozen=True)
class Chunks:
    """C stretches of user histories. The inputs of chunk c are the events [first[c], last[c]], positions in Sequences;
    an event e is a target of the chunk if its predecessor is among the inputs and e >= target_from[c]."""

    users: np.ndarray
    first: np.ndarray
    last: np.ndarray
    target_from: np.ndarray

    def __len__(self) -> int:
        return len(self.users)

    @property
    def target_counts(self) -> np.ndarray:
        """int64 [C]: events that may be targets, whatever their role."""
        return np.asarray(self.last + 2 - self.target_from)


def cut_chunks(
    sequences: Sequences, users: np.ndarray, window: int, is_target: np.ndarray, rng: np.random.Generator
) -> Chunks:
    """Chunks of at most `window` inputs that have every event for which is_target [E] holds exactly once as a target.

    A history that fits into one window is one chunk. A longer one is cut at random places into targets of two
    thirds of a window each, so that each of them still has at least a third (or all there is) before it.
    """
    stride = max(1, window - window // 3)
    starts, stops = sequences.offsets[users], sequences.offsets[users + 1]
    lengths = stops - starts
    users, starts, lengths = users[lengths > 1], starts[lengths > 1], lengths[lengths > 1]
    long = lengths - 1 > window
    shifts = rng.integers(0, stride, len(users))
    counts = np.where(long, -(-(lengths - 1 + shifts) // stride), 1)
    owner = np.repeat(np.arange(len(users)), counts)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    target_from = np.where(long[owner], np.maximum(1, 1 - shifts[owner] + number * stride), 1)
    target_to = np.where(
        long[owner], np.minimum(lengths[owner], 1 - shifts[owner] + (number + 1) * stride), lengths[owner]
    )
    base = starts[owner]
    before = np.concatenate([[0], np.cumsum(is_target)])
    useful = before[base + target_to] > before[base + target_from]
    first = base + np.maximum(0, target_to - 1 - window)
    return Chunks(users[owner][useful], first[useful], (base + target_to - 2)[useful], (base + target_from)[useful])


def batches(chunks: Chunks, positions: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Index arrays into the chunks, of some `positions` targets each, alike in length, in random order."""
    order = rng.permutation(len(chunks))
    lengths = (chunks.last - chunks.first + 1)[order]
    # Sorting inside large random groups saves padding and leaves the batches random.
    total = int(chunks.target_counts.sum())
    groups = max(1, total // (positions * 16))
    group = np.arange(len(order)) * groups // max(1, len(order))
    order = order[np.lexsort((lengths, group))]
    number = np.cumsum(chunks.target_counts[order]) // max(1, positions)
    parts = np.split(order, np.flatnonzero(np.diff(number)) + 1)
    return [parts[i] for i in rng.permutation(len(parts))] if len(order) else []


def chunk_indices(chunks: Chunks, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Event positions int64 [B, L] of left-padded chunks (0 where padded) and their mask [B, L]."""
    first, last = chunks.first[rows], chunks.last[rows]
    length = int((last - first + 1).max())
    index = last[:, None] - np.arange(length - 1, -1, -1)
    mask = index >= first[:, None]
    return np.where(mask, index, 0), mask


@dataclass(frozen=True)
class Examples:
    """B chunks with inputs at L positions each, P of which have a target.

    items: int64 [B, L], 1-based rows, 0 = padding or an item that nobody knows. types: int32 [B, L]. times: int64
    [B, L], microseconds, 0 = padding. values: float32 [B, L]. users: int64 [B]. row, place: int64 [P], the positions
    with a target. targets: int64 [P], 1-based rows. excluded: int64 [P, L], the items that the user had up to that
    position, 0 = none: what a user has consumed is not recommended again, so it is no rival of the target either.
    """

    items: np.ndarray
    types: np.ndarray
    times: np.ndarray
    values: np.ndarray
    users: np.ndarray
    row: np.ndarray
    place: np.ndarray
    targets: np.ndarray
    excluded: np.ndarray


def examples(sequences: Sequences, chunks: Chunks, rows: np.ndarray, is_target: np.ndarray) -> Examples:
    """The inputs and targets of some chunks.

    Args:
        sequences: the histories that were cut into chunks.
        chunks: of cut_chunks.
        rows: int64 [B], which chunks.
        is_target: bool [E], which events may be targets.

    Returns:
        Examples of B chunks, left-padded to the longest.
    """
    index, mask = chunk_indices(chunks, rows)
    following = np.minimum(index + 1, len(sequences.items) - 1)
    wanted = mask & (index + 1 >= chunks.target_from[rows][:, None]) & is_target[following]
    row, place = np.nonzero(wanted)
    items = np.where(mask, sequences.items[index], 0).astype(np.int64)
    later = np.arange(items.shape[1]) > place[:, None]
    return Examples(
        items,
        np.where(mask, sequences.types[index], 0),
        np.where(mask, sequences.times[index], 0),
        np.where(mask, sequences.values[index], 0).astype(np.float32),
        chunks.users[rows],
        row,
        place,
        sequences.items[following[row, place]].astype(np.int64),
        np.where(later, 0, items[row]),
    )


def windows_before(sequences: Sequences, events: np.ndarray, window: int) -> Windows:
    """The windows and seen items as they stood just before the given events (positions in Sequences), one row each."""
    owner = np.searchsorted(sequences.offsets, events, side="right") - 1
    starts = sequences.offsets[owner]
    index = events[:, None] - np.arange(window, 0, -1)
    mask = index >= starts[:, None]
    index = np.where(mask, index, 0)
    lengths = events - starts
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    flat = np.arange(offsets[-1]) - np.repeat(offsets[:-1] - starts, lengths)
    return Windows(
        np.where(mask, sequences.items[index], 0).astype(np.int32),
        np.where(mask, sequences.types[index], 0).astype(np.int32),
        np.where(mask, sequences.times[index], 0),
        np.where(mask, sequences.values[index], 0).astype(np.float32),
        sequences.users.take(owner),
        sequences.items[flat].astype(np.int32),
        offsets.astype(np.int64),
    )


def sampled_targets(sequences: Sequences, role: int, limit: int, seed: int) -> np.ndarray:
    """Positions of at most `limit` events of the role that have an event before them, ascending; sampled by seed."""
    events = np.flatnonzero(sequences.roles == role)
    first = sequences.offsets[np.searchsorted(sequences.offsets, events, side="right") - 1]
    events = events[(events > first) & (sequences.items[events] > 0)]
    if len(events) > limit:
        events = np.sort(np.random.default_rng(seed).choice(events, limit, replace=False))
    return events


def in_blocks(count: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, count, size):
        yield start, min(start + size, count)
