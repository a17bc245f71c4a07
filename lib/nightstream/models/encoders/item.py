"""Items to unit vectors: identity, categories, numbers and text, each of them optional."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

ID_LENGTH = 0.1
TEXT_KINDS = ("cnn", "rnn", "none")


@dataclass(frozen=True)
class ItemSizes:
    """Sizes of an item encoder.

    vocabulary: items with an embedding of their own. width: D. numbers: n columns.
    category_sizes: indices of each attribute. words: token indices. text: one of TEXT_KINDS.
    id_dropout: share of items that a training step encodes without their id.
    """

    vocabulary: int
    width: int
    numbers: int
    category_sizes: tuple[int, ...]
    words: int
    text: str
    id_dropout: float

    def __post_init__(self) -> None:
        if self.text not in TEXT_KINDS:
            raise ValueError(f"unknown text encoder {self.text!r}; known are {', '.join(TEXT_KINDS)}")

    @property
    def has_content(self) -> bool:
        return bool(self.numbers or self.category_sizes or self.text != "none")


@dataclass(frozen=True)
class ItemBatch:
    """M items as tensors.

    ids: int64 [M], 1-based row in the vocabulary, 0 = without an id of its own.
    numbers: float32 [M, n]. categories: int64 [M, w] each. tokens: int64 [M, t]; 0 is padding in both.
    """

    ids: Tensor
    numbers: Tensor
    categories: tuple[Tensor, ...]
    tokens: Tensor

    def take(self, rows: Tensor) -> ItemBatch:
        return ItemBatch(self.ids[rows], self.numbers[rows], tuple(c[rows] for c in self.categories), self.tokens[rows])


class TextConvolution(nn.Module):
    """Words to [M, D]: convolutions of three words, then the maximum over the text (Kim, EMNLP 2014)."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width // 2, padding_idx=0)
        self.convolution = nn.Linear(3 * (width // 2), width)
        self.out = nn.Linear(width + width // 2, width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
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
        # Texts of one length are a block without padding.
        counts = length.bincount(minlength=1).tolist()
        parts = answers.split([n * count for n, count in enumerate(counts)])
        strongest = torch.cat(
            [
                part.view(count, n, -1).max(1).values if n else part.new_zeros(count, part.shape[1])
                for n, (part, count) in enumerate(zip(parts, counts, strict=True))
                if count or not n
            ]
        )[order.argsort()]
        mean = functional.embedding_bag(tokens, self.words.weight, mode="mean", padding_idx=0)
        out: Tensor = self.out(torch.cat([strongest, mean], 1))
        return out


class TextRecurrence(nn.Module):
    """Words to [M, D]: a GRU over the words, read at the last word."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width // 2, padding_idx=0)
        self.gru = nn.GRU(width // 2, width, batch_first=True)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.gru(self.words(tokens))
        length = (tokens > 0).sum(1)
        last = states.gather(1, (length - 1).clamp_min(0).view(-1, 1, 1).expand(-1, 1, states.shape[2])).squeeze(1)
        out: Tensor = self.out(last) * (length > 0).unsqueeze(1)
        return out


class ItemEncoder(nn.Module):
    """The sum of an item's parts, scaled to unit length.

    Leaving out the id of some items in each training step makes the content alone a usable vector
    (DropoutNet; Volkovs et al., NeurIPS 2017). An item with neither id nor content gets the vector of a stranger.
    """

    def __init__(self, sizes: ItemSizes) -> None:
        super().__init__()
        self.sizes = sizes
        width = sizes.width
        self.ids = nn.Embedding(sizes.vocabulary + 1, width)
        # Short at first: vectors are compared by direction, and the few events of a rare item can't turn a random one
        # that is long, which hides what the content says meanwhile.
        nn.init.normal_(self.ids.weight, std=ID_LENGTH * width**-0.5)
        self.numbers = nn.Linear(sizes.numbers, width, bias=False) if sizes.numbers else None
        self.categories = nn.ModuleList(nn.Embedding(n, width, padding_idx=0) for n in sizes.category_sizes)
        with torch.no_grad():
            for parameter in self.categories.parameters():
                parameter.normal_(std=0.3 * width**-0.5)
                parameter[0] = 0
        self.text: nn.Module | None = None
        if sizes.text != "none":
            self.text = (TextConvolution if sizes.text == "cnn" else TextRecurrence)(sizes.words, width)

    def forward(self, items: ItemBatch) -> Tensor:
        """Unit vectors [M, D]."""
        ids = items.ids
        if self.training and self.sizes.has_content and self.sizes.id_dropout > 0:
            ids = torch.where(torch.rand(ids.shape) < self.sizes.id_dropout, 0, ids)
        total = self.ids(ids)
        if self.numbers is not None:
            total = total + self.numbers(items.numbers)
        for embedding, values in zip(self.categories, items.categories, strict=True):
            total = total + embedding(values).sum(1) / (values > 0).sum(1, keepdim=True).clamp_min(1).sqrt()
        if self.text is not None and items.tokens.shape[1]:
            total = total + self.text(items.tokens)
        return functional.normalize(total, dim=1)
