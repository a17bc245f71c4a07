"""A plain SASRec (Kang & McAuley, ICDM 2018): ids only, dot product, tied item vectors, softmax over all items."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from baselines import Histories, popularity, validated
from nightstream.models.arrays import Sequences
from nightstream.training import batching
from nightstream.training.losses import full_softmax
from torch import Tensor, nn
from torch.nn import functional

WIDTH = 64
HEADS = 2
LAYERS = 2
WINDOW = 50
POSITIONS = 1024
LEARNING_RATE = 1e-3
EPOCHS = 60
PATIENCE = 4


class Layer(nn.Module):
    """Causal self-attention and a pointwise network, each normalised before and with a residual path."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.before_attention, self.before_pointwise = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.mix = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.pointwise = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Dropout(dropout), nn.Linear(WIDTH, WIDTH))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        """x: [B, L, WIDTH]; allowed: bool [B, 1, L, L]."""
        rows, length, _ = x.shape
        q, k, v = self.qkv(self.before_attention(x)).view(rows, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        answer = functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        x = x + self.dropout(self.mix(answer.transpose(1, 2).reshape(rows, length, WIDTH)))
        return x + self.dropout(self.pointwise(self.before_pointwise(x)))


class Network(nn.Module):
    def __init__(self, size: int, dropout: float) -> None:
        super().__init__()
        self.items = nn.Embedding(size + 1, WIDTH, padding_idx=0)
        self.places = nn.Embedding(WINDOW, WIDTH)
        self.layers = nn.ModuleList(Layer(dropout) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.dropout = nn.Dropout(dropout)
        for table in (self.items, self.places):
            nn.init.normal_(table.weight, std=0.02)
        nn.init.zeros_(self.items.weight[0])

    def forward(self, items: Tensor) -> Tensor:
        """items: int64 [B, L], L ≤ WINDOW, newest last, 0 = padding. Returns [B, L, WIDTH]."""
        length = items.shape[1]
        x = self.dropout(self.items(items) * WIDTH**0.5 + self.places.weight[WINDOW - length :])
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        itself = torch.eye(length, dtype=torch.bool)
        # A padded place attends to itself alone: softmax over nothing would be NaN.
        allowed = ((causal & (items > 0).unsqueeze(1)) | itself).unsqueeze(1)
        for layer in self.layers:
            x = layer(x, allowed)
        out: Tensor = self.norm(x)
        return out


class SASRec:
    """dropout: share of inputs dropped. epochs: passes over the data; None stops early on the validation events."""

    name = "sasrec"

    def __init__(self, dropout: float = 0.5, epochs: int | None = None, seed: int = 0) -> None:
        self.dropout, self.epochs, self.seed = dropout, epochs, seed

    def fit(self, log: Sequences, size: int, roles: Sequence[int], valid: np.ndarray | None = None) -> None:
        torch.manual_seed(self.seed)
        self.network = Network(size, self.dropout)
        optimizer = torch.optim.Adam(self.network.parameters(), lr=LEARNING_RATE)
        is_target = np.isin(log.roles, np.asarray(roles, np.int8))
        fallback = popularity(log, size, roles)
        stopping = valid if self.epochs is None else None
        best, kept, self.best_epoch = -1.0, self.network.state_dict(), self.epochs or 0
        for epoch in range(1, (self.epochs or EPOCHS) + 1):
            self._epoch(log, is_target, optimizer, np.random.default_rng([self.seed, epoch]))
            if stopping is None:
                continue
            score = validated(self, log, stopping, fallback)
            if score > best:
                best, kept, self.best_epoch = score, copy.deepcopy(self.network.state_dict()), epoch
            elif epoch - self.best_epoch >= PATIENCE:
                break
        if stopping is not None:
            self.network.load_state_dict(kept)

    def _epoch(
        self, log: Sequences, is_target: np.ndarray, optimizer: torch.optim.Optimizer, rng: np.random.Generator
    ) -> None:
        chunks = batching.cut_chunks(log, np.arange(len(log)), WINDOW, is_target, rng)
        self.network.train()
        for rows in batching.batches(chunks, POSITIONS, rng):
            index, mask = batching.chunk_indices(chunks, rows)
            following = np.minimum(index + 1, len(log.items) - 1)
            wanted = mask & (index + 1 >= chunks.target_from[rows][:, None]) & is_target[following]
            items = torch.from_numpy(np.where(mask, log.items[index], 0).astype(np.int64))
            targets = torch.from_numpy(log.items[following[wanted]].astype(np.int64))
            states = self.network(items)[torch.from_numpy(wanted)]
            nothing = torch.zeros(len(targets), 1, dtype=torch.int64)
            loss = full_softmax(states, self.network.items.weight[1:], targets, nothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def scores(self, histories: Histories) -> np.ndarray:
        self.network.eval()
        with torch.no_grad():
            states = self.network(torch.from_numpy(histories.newest(WINDOW)))[:, -1]
            return (states @ self.network.items.weight[1:].T).numpy()

    def settled(self) -> dict[str, Any]:
        return {"epochs": self.best_epoch}
