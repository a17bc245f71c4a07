"""A convolutional user encoder, after Caser (Tang & Wang, WSDM 2018)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from nightstream.models.encoders.base import Batch, EncoderSizes, SequenceEncoder


class ConvolutionEncoder(SequenceEncoder):
    """Horizontal and vertical convolutions over the last `span` events of each position.

    Horizontal filters of height 1..span see h neighbouring events at once and keep their strongest answer; vertical
    filters are weighted sums of the span's events, one weight per place. Convolving the whole window once and pooling
    with stride 1 gives what Caser computes for each position by itself. Caser's user embedding, which stands for
    lasting taste, is the mean of the window's events here, so that a user who was not there in training has one too.
    One more vertical filter and that mean also go to the result directly: items and users share one space, and a sum of
    recent items is a good first guess in it.
    """

    def __init__(self, sizes: EncoderSizes) -> None:
        super().__init__(sizes)
        self.span = min(sizes.span, sizes.window)
        filters = max(4, sizes.hidden // 8)
        vertical = 4
        self.horizontal = nn.ModuleList(nn.Conv1d(sizes.width, filters, h) for h in range(1, self.span + 1))
        self.vertical = nn.Parameter(torch.randn(self.span, vertical) / self.span)
        self.direct = nn.Parameter(torch.full((self.span + 1,), 1 / (self.span + 1)))
        self.hidden = nn.Linear(filters * self.span + (vertical + 1) * sizes.width, sizes.hidden)
        self.dropout = nn.Dropout(sizes.dropout)
        self.out = nn.Linear(sizes.hidden, sizes.width)

    def states(self, x: Tensor, mask: Tensor) -> Tensor:
        count = mask.cumsum(1).clamp_min(1).unsqueeze(2)
        return self._answer(functional.pad(x.transpose(1, 2), (self.span - 1, 0)), x.cumsum(1) / count)

    def _answer(self, padded: Tensor, mean: Tensor) -> Tensor:
        """padded: [B, D, P + span - 1] event inputs; mean: [B, P, D] of all events up to each place. [B, P, D]."""
        parts = [mean]
        for height, convolution in enumerate(self.horizontal, start=1):
            answers = functional.relu(convolution(padded))
            if height < self.span:
                answers = functional.max_pool1d(answers, self.span - height + 1, stride=1)
            parts.append(answers.transpose(1, 2))
        spans = padded.unfold(2, self.span, 1)  # [B, D, P, span]
        vertical = spans @ torch.cat([self.vertical, self.direct[:-1].unsqueeze(1)], 1)
        parts.append(vertical[..., :-1].transpose(1, 2).flatten(2))
        out: Tensor = self.out(self.dropout(functional.relu(self.hidden(torch.cat(parts, 2)))))
        return out + vertical[..., -1].transpose(1, 2) + self.direct[-1] * mean

    def last(self, batch: Batch) -> Tensor:
        # The convolutions of the other places would be computed for nothing.
        x = self.event_input(batch)
        mean = x.sum(1, keepdim=True) / batch.mask.sum(1).clamp_min(1).view(-1, 1, 1)
        return self.finish(self._answer(x[:, -self.span :].transpose(1, 2), mean), batch)[:, -1]
