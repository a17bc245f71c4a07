"""Text to vectors: a convolution over words, or a recurrent network."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from nightstream.models.encoders.content import ContentEncoder, ItemBatch, ItemSizes


class TextConvolution(ContentEncoder):
    """Words to [M, D]: convolutions of three words, then the maximum over the text (Kim, EMNLP 2014)."""

    def __init__(self, sizes: ItemSizes) -> None:
        super().__init__(sizes)
        width = sizes.width
        self.words = nn.Embedding(sizes.words, width // 2, padding_idx=0)
        self.convolution = nn.Linear(3 * (width // 2), width)
        self.out = nn.Linear(width + width // 2, width, bias=False)

    def forward(self, items: ItemBatch) -> Tensor:
        tokens = items.tokens
        # A convolution over words is a sum of one product per word and place, and words are fewer than their uses: each
        # product is computed once per word of the language, then added up where the words stand, padding left out.
        before, itself, after = self.convolution.weight.split(self.words.embedding_dim, 1)
        words = torch.cat([self.words.weight[:1].detach(), self.words.weight[1:]])
        products = torch.cat([words @ place.T for place in (before, itself, after)])
        length = (tokens > 0).sum(1)
        order = length.argsort(stable=True)
        around = functional.pad(tokens[order], (1, 1))
        used = around[:, 1:-1] > 0
        shifts = len(words) * torch.arange(3, device=tokens.device)
        places = torch.stack([around[:, :-2][used], around[:, 1:-1][used], around[:, 2:][used]], 1) + shifts
        answers = functional.relu(functional.embedding_bag(places, products, mode="sum") + self.convolution.bias)
        # Texts of one length are a block without padding. Those of no word get zeros by a sum over nothing, so that the
        # convolution has a gradient even where no item has text.
        counts = length.bincount(minlength=1).tolist()
        parts = answers.split([n * count for n, count in enumerate(counts)])
        strongest = torch.cat(
            [
                part.view(count, n, -1).max(1).values if n else part.sum(0).expand(count, -1)
                for n, (part, count) in enumerate(zip(parts, counts, strict=True))
                if count or not n
            ]
        )[order.argsort()]
        mean = functional.embedding_bag(tokens, self.words.weight, mode="mean", padding_idx=0)
        out: Tensor = self.out(torch.cat([strongest, mean], 1))
        return out


class TextRecurrence(ContentEncoder):
    """Words to [M, D]: a GRU over the words, read at the last word."""

    def __init__(self, sizes: ItemSizes) -> None:
        super().__init__(sizes)
        width = sizes.width
        self.words = nn.Embedding(sizes.words, width // 2, padding_idx=0)
        self.gru = nn.GRU(width // 2, width, batch_first=True)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, items: ItemBatch) -> Tensor:
        tokens = items.tokens
        states, _ = self.gru(self.words(tokens))
        length = (tokens > 0).sum(1)
        last = states.gather(1, (length - 1).clamp_min(0).view(-1, 1, 1).expand(-1, 1, states.shape[2])).squeeze(1)
        out: Tensor = self.out(last) * (length > 0).unsqueeze(1)
        return out
