"""What every sequence encoder takes and gives, and the parts that they share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

GAP_BUCKETS = 26


@dataclass(frozen=True)
class EncoderSizes:
    """Sizes of one sequence encoder; all of them are known before any data is seen by it.

    kind: a name that factory.ENCODERS knows. width: D, of item and user vectors. window: L, events that a window holds.
    span: events that the convolutions look at (cnn only). hidden: width of the recurrent state or of the inner layers.
    layers, heads: of the transformer. dropout: share of inputs dropped in training.
    event_types: number of known event types. user_numbers, user_categories: sizes of the user attributes.
    """

    kind: str
    width: int
    window: int
    span: int
    hidden: int
    layers: int
    heads: int
    dropout: float
    event_types: int
    user_numbers: int
    user_categories: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """B left-padded windows of L events as tensors.

    items: float32 [B, L, D] unit item vectors, zero at padding. types: int64 [B, L], 0 = unknown or padding.
    gaps: int64 [B, L] buckets of `gap_buckets`. values: float32 [B, L]. mask: bool [B, L], true at events.
    user_numbers: float32 [B, n]. user_categories: int64 [B, w] each.
    """

    items: Tensor
    types: Tensor
    gaps: Tensor
    values: Tensor
    mask: Tensor
    user_numbers: Tensor
    user_categories: tuple[Tensor, ...]


def gap_buckets(times: Tensor, mask: Tensor) -> Tensor:
    """int64 [B, L]: 1 + ⌊log2(1 + seconds since the event before)⌋ up to the last bucket; 0 where there is none before.

    times: int64 [B, L] microseconds; mask: bool [B, L].
    """
    before = torch.zeros_like(times)
    before[:, 1:] = times[:, :-1]
    has_before = torch.zeros_like(mask)
    has_before[:, 1:] = mask[:, 1:] & mask[:, :-1]
    seconds = ((times - before).clamp_min(0) // 1_000_000).to(torch.float64)
    bucket = 1 + torch.log2(1 + seconds).floor().to(torch.int64)
    return torch.where(has_before, bucket.clamp_max(GAP_BUCKETS - 1), 0)


class EventInput(nn.Module):
    """Item vector, event type, time gap and value of each event, added up: [B, L, D].

    Everything but the item starts at zero, so what carries no signal stays out of the way.
    """

    def __init__(self, sizes: EncoderSizes) -> None:
        super().__init__()
        self.scale = sizes.width**0.5
        self.types = nn.Embedding(sizes.event_types + 1, sizes.width) if sizes.event_types > 1 else None
        self.gaps = nn.Embedding(GAP_BUCKETS, sizes.width)
        self.value = nn.Parameter(torch.zeros(sizes.width))
        self.dropout = nn.Dropout(sizes.dropout)
        nn.init.zeros_(self.gaps.weight)
        if self.types is not None:
            nn.init.zeros_(self.types.weight)

    def forward(self, batch: Batch) -> Tensor:
        x = batch.items * self.scale + self.gaps(batch.gaps) + batch.values.unsqueeze(2) * self.value
        if self.types is not None:
            x = x + self.types(batch.types)
        return self.dropout(x) * batch.mask.unsqueeze(2)


class UserInput(nn.Module):
    """User attributes as one vector [B, D], zero at the start of training; None where there are no attributes."""

    def __init__(self, sizes: EncoderSizes) -> None:
        super().__init__()
        self.numbers = nn.Linear(sizes.user_numbers, sizes.width, bias=False) if sizes.user_numbers else None
        self.categories = nn.ModuleList(nn.Embedding(n, sizes.width, padding_idx=0) for n in sizes.user_categories)
        for part in [self.numbers, *self.categories]:
            if part is not None:
                nn.init.zeros_(part.weight)

    def forward(self, batch: Batch) -> Tensor | None:
        total = self.numbers(batch.user_numbers) if self.numbers is not None else None
        for embedding, values in zip(self.categories, batch.user_categories, strict=True):
            part = embedding(values).sum(1)
            total = part if total is None else total + part
        return total


class SequenceEncoder(nn.Module):
    """Windows to user vectors. A subclass implements `states`; the rest is shared.

    Two promises that the contract test checks: the vector at position t depends on the events up to t only, and on
    nothing of the padding before the first event, nor on the other rows of the batch.
    """

    def __init__(self, sizes: EncoderSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.event_input = EventInput(sizes)
        self.user_input = UserInput(sizes)

    def states(self, x: Tensor, mask: Tensor) -> Tensor:
        """x: [B, L, D] event inputs, zero at padding; mask: [B, L]. Returns [B, L, D]."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> Tensor:
        """Unit vectors [B, L, D] of all positions, zero at padding: position t has seen the events up to t."""
        return self.finish(self.states(self.event_input(batch), batch.mask), batch)

    def finish(self, states: Tensor, batch: Batch) -> Tensor:
        """Unit vectors [B, P, D] from the states of the last P positions, user attributes added, zero at padding."""
        user = self.user_input(batch)
        if user is not None:
            states = states + user.unsqueeze(1)
        return nn.functional.normalize(states, dim=2) * batch.mask[:, -states.shape[1] :].unsqueeze(2)

    def last(self, batch: Batch) -> Tensor:
        """Unit vectors [B, D] of the last position; all zero for an empty window."""
        return self(batch)[:, -1]
