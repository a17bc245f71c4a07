"""Items to unit vectors: identity, categories, numbers and text, each of them optional."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from nightstream.models.encoders.text import TextConvolution, TextRecurrence

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
            ids = torch.where(torch.rand(ids.shape, device=ids.device) < self.sizes.id_dropout, 0, ids)
        total = self.ids(ids)
        if self.numbers is not None:
            total = total + self.numbers(items.numbers)
        for embedding, values in zip(self.categories, items.categories, strict=True):
            total = total + embedding(values).sum(1) / (values > 0).sum(1, keepdim=True).clamp_min(1).sqrt()
        if self.text is not None and items.tokens.shape[1]:
            total = total + self.text(items.tokens)
        return functional.normalize(total, dim=1)
