"""What training minimises: the softmax cross-entropy of each position's next item, over all items or a sample."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from nightstream.models.arrays import UserFeatures
from nightstream.models.encoders.item import ItemBatch
from nightstream.models.encoders.tensors import sequence_batch
from nightstream.training.batching import Examples
from nightstream.training.losses import full_softmax, sampled_softmax
from nightstream.training.recommender import Recommender, padded


class Objective(nn.Module):
    """The mean loss of a batch as a module's forward, which is where DistributedDataParallel takes part.

    On a GPU the encoders compute in bfloat16, the softmax in float32.
    """

    def __init__(
        self, recommender: Recommender, items: ItemBatch, users: UserFeatures, counts: np.ndarray, negatives: int
    ) -> None:
        """The objective over a vocabulary of V items.

        Args:
            recommender: what is trained, on the device of `items`.
            items: the vocabulary.
            users: attributes of all users that examples may name.
            counts: [V], how often each item is a target; items are sampled by its power of 3/4, plus 1.
            negatives: sampled items per step, 0 for the full softmax.
        """
        super().__init__()
        self.recommender = recommender
        self.items = items
        self.users = users
        self.negatives = negatives
        self.device = items.ids.device
        share = counts**0.75 + 1.0
        self.draw = torch.as_tensor(share / share.sum(), device=self.device)

    def forward(self, examples: Examples | None) -> Tensor:
        """The loss, a scalar; 0 with a gradient of 0 for a process that has no examples."""
        if examples is None:
            # Every parameter takes part, or the other processes would wait for its gradient.
            return torch.stack([parameter.sum() for parameter in self.parameters()]).sum() * 0
        if self.negatives:
            return self._sampled(examples)
        with self._mixed_precision():
            vectors = self.recommender.items(self.items)
            users = self._users(examples, padded(vectors), self._tensor(examples.items))
        targets, excluded = self._tensor(examples.targets), self._tensor(examples.excluded)
        return full_softmax(users * self.recommender.log_scale.exp(), vectors.float(), targets, excluded)

    def _sampled(self, examples: Examples) -> Tensor:
        items, targets, excluded = (
            self._tensor(rows) for rows in (examples.items, examples.targets, examples.excluded)
        )
        chances = torch.multinomial(self.draw, self.negatives, replacement=True)
        drawn, repeats = chances.add(1).unique(return_counts=True)
        # Only the items that the step needs are encoded; `place` tells where each of them lies in the table.
        needed = torch.cat([items.flatten(), targets, drawn]).unique()
        needed = needed[needed > 0]
        place = self._zeros(len(self.items.ids) + 1)
        place[needed] = torch.arange(1, len(needed) + 1, device=self.device)
        with self._mixed_precision():
            table = padded(self.recommender.items(self.items.take(needed - 1)))
            users = self._users(examples, table, place[items])
        table = table.float()
        log_expected = (self.draw[drawn - 1] * self.negatives).log() - repeats.log()
        column = self._zeros(len(self.items.ids) + 1).fill_(len(drawn))
        column[drawn] = torch.arange(len(drawn), device=self.device)
        same = torch.zeros(len(targets), len(drawn) + 1, dtype=torch.bool, device=self.device)
        same.scatter_(1, column[torch.cat([excluded, targets.unsqueeze(1)], 1)], True)
        return sampled_softmax(
            users * self.recommender.log_scale.exp(),
            table[place[targets]],
            table[place[drawn]],
            log_expected.to(torch.float32),
            same[:, :-1],
        )

    def _users(self, examples: Examples, table: Tensor, rows: Tensor) -> Tensor:
        """float32 [P, D]: the user vectors at the positions that have a target; rows: int64 [B, L] into the table."""
        batch = sequence_batch(
            table[rows],
            examples.types,
            examples.times,
            examples.values,
            examples.items > 0,
            self.users.take(examples.users),
        )
        states: Tensor = self.recommender.sequence(batch)
        return states[self._tensor(examples.row), self._tensor(examples.place)].float()

    def _mixed_precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.as_tensor(values, device=self.device)

    def _zeros(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.int64, device=self.device)
