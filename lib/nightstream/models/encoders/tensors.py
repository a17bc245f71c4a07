"""Arrays to what the encoders take: the one place where items and windows become tensors, all on one device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nightstream.models.arrays import ItemFeatures, UserFeatures
from nightstream.models.encoders.base import Batch, gap_buckets
from nightstream.models.encoders.item import ItemBatch

CPU = torch.device("cpu")


def item_batch(features: ItemFeatures, ids: np.ndarray, device: torch.device = CPU) -> ItemBatch:
    """M items as tensors.

    Args:
        features: of the M items.
        ids: [M], 1-based rows of the vocabulary, 0 = without an id.
        device: where the tensors lie.

    Returns:
        An ItemBatch of M items.
    """
    return ItemBatch(
        torch.as_tensor(np.asarray(ids, np.int64), device=device),
        torch.as_tensor(np.asarray(features.numbers, np.float32), device=device),
        _categories(features.categories, device),
        torch.as_tensor(np.asarray(features.tokens, np.int64), device=device),
    )


def sequence_batch(
    vectors: Tensor, types: np.ndarray, times: np.ndarray, values: np.ndarray, mask: np.ndarray, users: UserFeatures
) -> Batch:
    """B windows of L events as tensors, on the device of their vectors.

    Args:
        vectors: float32 [B, L, D] unit item vectors, zero where the mask is false.
        types: [B, L], 1-based indices of event types, 0 = unknown.
        times: int64 [B, L], microseconds since the epoch.
        values: [B, L], normalised event values.
        mask: bool [B, L], true at events with a known item.
        users: attributes of the same B users.

    Returns:
        A Batch of B windows.
    """
    device = vectors.device
    present = torch.as_tensor(mask, device=device)
    return Batch(
        vectors,
        torch.as_tensor(np.asarray(types, np.int64), device=device),
        gap_buckets(torch.as_tensor(times, device=device), present),
        torch.as_tensor(np.ascontiguousarray(values, np.float32), device=device) * present,
        present,
        torch.as_tensor(np.asarray(users.numbers, np.float32), device=device),
        _categories(users.categories, device),
    )


def _categories(categories: tuple[np.ndarray, ...], device: torch.device) -> tuple[Tensor, ...]:
    return tuple(torch.as_tensor(np.asarray(values, np.int64), device=device) for values in categories)
