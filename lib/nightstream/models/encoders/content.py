"""What an encoder of items' content takes and gives."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

NO_TEXT = "none"


@dataclass(frozen=True)
class ItemSizes:
    """Sizes of an item encoder.

    vocabulary: items with an embedding of their own. width: D. numbers: n columns. category_sizes: indices of each
    attribute. words: token indices. text: what reads the text, a name that factory.CONTENT_ENCODERS knows, or NO_TEXT.
    id_dropout: share of items that a training step encodes without their id.
    """

    vocabulary: int
    width: int
    numbers: int
    category_sizes: tuple[int, ...]
    words: int
    text: str
    id_dropout: float

    @property
    def has_content(self) -> bool:
        return bool(self.numbers or self.category_sizes or self.text != NO_TEXT)


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


class ContentEncoder(nn.Module):
    """Items to [M, D], from their content alone. A subclass implements `forward`; the item encoder adds what it gives
    to an item's other parts.

    An item without the content that it reads gets the zero vector, and items of one batch do not mix.
    """

    def __init__(self, sizes: ItemSizes) -> None:
        super().__init__()
        self.sizes = sizes

    def forward(self, items: ItemBatch) -> Tensor:
        """[M, D] of M items."""
        raise NotImplementedError
