"""A user encoder with causal self-attention, after SASRec (Kang & McAuley, ICDM 2018)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from nightstream.models.encoders.base import EncoderSizes, SequenceEncoder


class Block(nn.Module):
    """Attention and a pointwise layer, both with a residual path and normalised before."""

    def __init__(self, sizes: EncoderSizes) -> None:
        super().__init__()
        width = sizes.width
        self.heads = sizes.heads
        self.before_attention = nn.LayerNorm(width)
        self.before_pointwise = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.pointwise = nn.Sequential(nn.Linear(width, sizes.hidden), nn.GELU(), nn.Linear(sizes.hidden, width))
        self.distance = nn.Parameter(torch.zeros(sizes.heads, sizes.window))
        self.dropout = nn.Dropout(sizes.dropout)

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        """x: [B, L, D]; allowed: bool [B, 1, L, L]."""
        rows, length, width = x.shape
        q, k, v = self.qkv(self.before_attention(x)).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        places = torch.arange(length, device=x.device)
        bias = self.distance[:, (places.unsqueeze(1) - places).clamp_min(0)]  # [heads, L, L]
        bias = bias.unsqueeze(0).masked_fill(~allowed, -1e9)
        answer = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = x + self.dropout(self.mix(answer.transpose(1, 2).reshape(rows, length, width)))
        return x + self.dropout(self.pointwise(self.before_pointwise(x)))


class AttentionEncoder(SequenceEncoder):
    """Blocks of causal attention. A place is the distance to the asking event, so a window's length does not matter."""

    def __init__(self, sizes: EncoderSizes) -> None:
        super().__init__(sizes)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(sizes.width)

    def states(self, x: Tensor, mask: Tensor) -> Tensor:
        length = x.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        itself = torch.eye(length, dtype=torch.bool, device=x.device)
        # A padded place attends to itself alone: softmax over nothing would be NaN.
        allowed = ((causal & mask.unsqueeze(1)) | itself).unsqueeze(1)
        for block in self.blocks:
            x = block(x, allowed)
        out: Tensor = self.norm(x)
        return out
