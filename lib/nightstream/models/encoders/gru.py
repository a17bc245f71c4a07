"""A recurrent user encoder, after GRU4Rec (Hidasi et al., ICLR 2016; full softmax as in Hidasi & Karatzoglou 2018)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nightstream.models.encoders.base import EncoderSizes, SequenceEncoder


class RecurrentEncoder(SequenceEncoder):
    """One GRU layer from a zero state over the window, then a linear map to the item space.

    The newest event and the mean of all go there directly too: items and users share one space, and a sum of recent
    items is a good first guess in it.
    """

    def __init__(self, sizes: EncoderSizes) -> None:
        super().__init__(sizes)
        self.gru = nn.GRU(sizes.width, sizes.hidden, batch_first=True)
        self.dropout = nn.Dropout(sizes.dropout)
        self.out = nn.Linear(sizes.hidden, sizes.width)
        self.direct = nn.Parameter(torch.full((2,), 0.3))

    def states(self, x: Tensor, mask: Tensor) -> Tensor:
        length = x.shape[1]
        # The events are moved to the front, so that the state is zero before the first one whatever the padding.
        shift = length - mask.sum(1, keepdim=True)
        places = torch.arange(length, device=x.device).unsqueeze(0)
        front = ((places + shift) % length).unsqueeze(2)
        hidden, _ = self.gru(x.gather(1, front.expand(-1, -1, x.shape[2])))
        back = ((places - shift) % length).unsqueeze(2)
        hidden = hidden.gather(1, back.expand(-1, -1, hidden.shape[2]))
        out: Tensor = self.out(self.dropout(hidden))
        mean = x.cumsum(1) / mask.cumsum(1).clamp_min(1).unsqueeze(2)
        return out + self.direct[0] * x + self.direct[1] * mean
