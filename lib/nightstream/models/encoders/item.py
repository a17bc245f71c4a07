"""Items to unit vectors: identity, categories, numbers and text, each of them optional."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from nightstream.models.encoders.content import NO_TEXT, ItemBatch, ItemSizes
from nightstream.models.encoders.factory import build_content_encoder

ID_LENGTH = 0.1


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
        self.text = build_content_encoder(sizes) if sizes.text != NO_TEXT else None

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
            total = total + self.text(items)
        return functional.normalize(total, dim=1)
