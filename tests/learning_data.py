"""Synthetic histories whose next item is known by construction, shared by the tests of the learning core."""

from __future__ import annotations

import numpy as np
import torch
from nightstream.models.arrays import RANK, TRAIN, VALID, Catalogue, ItemFeatures, Sequences, UserFeatures, Windows
from nightstream.models.encoders import EncoderSizes, ItemEncoder, ItemSizes, build_sequence_encoder
from nightstream.models.model import Member, Model
from nightstream.models.ranking.candidate_sources import SourceSizes, fit_sources

SECOND = 1_000_000


def no_users(count: int) -> UserFeatures:
    return UserFeatures(np.zeros((count, 0), np.float32), (), ())


def plain_items(count: int) -> ItemFeatures:
    return ItemFeatures(np.zeros((count, 0), np.float32), (), (), np.zeros((count, 0), np.int32), 2)


def ring_sequences(users: int = 80, items: int = 30, events: int = 12, step: int = 7, seed: int = 0) -> Sequences:
    """Every user starts somewhere and goes from row r to the row `step` further round the ring of rows 1..items."""
    start = np.random.default_rng(seed).integers(0, items, users)
    rows = (start[:, None] + step * np.arange(events)) % items + 1
    roles = np.full((users, events), TRAIN, np.int8)
    roles[:, -2], roles[:, -1] = RANK, VALID
    times = np.arange(users * events).reshape(users, events) * 60 * SECOND
    return Sequences(
        np.arange(users + 1, dtype=np.int64) * events,
        rows.ravel().astype(np.int32),
        np.ones(users * events, np.int32),
        times.ravel().astype(np.int64),
        np.zeros(users * events, np.float32),
        roles.ravel(),
        no_users(users),
    )


def make_windows(
    rows: list[list[int]], length: int = 10, users: UserFeatures | None = None, seen: list[list[int]] | None = None
) -> Windows:
    """Left-padded windows of the given catalogue rows; seen is the window itself unless given."""
    items = np.zeros((len(rows), length), np.int32)
    for b, events in enumerate(rows):
        if events:
            items[b, -len(events) :] = events[-length:]
    seen = rows if seen is None else seen
    offsets = np.cumsum([0] + [len(s) for s in seen]).astype(np.int64)
    times = np.where(items > 0, 1_700_000_000 * SECOND + np.arange(length) * 60 * SECOND, 0)
    return Windows(
        items,
        (items > 0).astype(np.int32),
        times.astype(np.int64),
        np.zeros(items.shape, np.float32),
        users if users is not None else no_users(len(rows)),
        np.asarray([r for s in seen for r in s], np.int32),
        offsets,
    )


def catalogue_of(vectors: np.ndarray, ids: list[str] | None = None) -> Catalogue:
    ids = ids if ids is not None else [f"i{n}" for n in range(1, len(vectors) + 1)]
    return Catalogue(ids, vectors, np.ones(len(ids), bool), [f"Title {i}" for i in ids])


def untrained_model(sequences: Sequences, items: int = 30, width: int = 8, seed: int = 0) -> Model:
    """Vectors that say nothing, and the sources that are registered."""
    torch.manual_seed(seed)
    sizes = EncoderSizes("gru", width, 10, 3, 16, 1, 1, 0.0, 1, 0, ())
    encoder = ItemEncoder(ItemSizes(items, width, 0, (), 2, "none", 0.0))
    member = Member("gru", encoder, build_sequence_encoder(sizes), 1.0, np.ones(items, bool))
    sources = fit_sources(sequences, items, (TRAIN,), SourceSizes())
    return Model([f"i{n}" for n in range(1, items + 1)], ["event"], [member], sources)
