"""What is trained: an item encoder and a sequence encoder with one temperature, and its moving average."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from nightstream.models.encoders import ItemEncoder, SequenceEncoder
from nightstream.models.encoders.item import ItemBatch
from nightstream.training.batching import in_blocks

AVERAGE_DECAY = 0.99
ITEM_BLOCK = 8192


class Recommender(nn.Module):
    """An item encoder and a sequence encoder that share one space, and the temperature of their softmax."""

    def __init__(self, items: ItemEncoder, sequence: SequenceEncoder, scale: float) -> None:
        super().__init__()
        self.items = items
        self.sequence = sequence
        self.log_scale = nn.Parameter(torch.tensor(float(np.log(scale))))


def moving_average(model: Recommender, warm_up: bool) -> AveragedModel:
    """A moving average that starts at the model's weights; each update takes in a hundredth of the model's.

    It ends where a falling learning rate would, without having to know beforehand when the end comes (Polyak &
    Juditsky, 1992). warm_up: whether the first updates take in more, 9 / (9 + update), since the start is random.
    """

    def blend(means: Sequence[Tensor], weights: Sequence[Tensor], updates: Tensor | int) -> None:
        share = 1 - AVERAGE_DECAY
        if warm_up:
            share = max(share, 9 / (9 + int(updates)))
        for mean, weight in zip(means, weights, strict=True):
            mean.lerp_(weight, share)

    average = AveragedModel(model, multi_avg_fn=blend).requires_grad_(False)
    # Its first update copies the model: that is the start, which the copy holds already.
    average.update_parameters(model)
    return average


def encode_all_items(encoder: ItemEncoder, items: ItemBatch) -> Tensor:
    """float32 [M, D] unit vectors, without gradients, in blocks of ITEM_BLOCK items."""
    device = items.ids.device
    was_training = encoder.training
    encoder.eval()
    with torch.no_grad():
        blocks = in_blocks(len(items.ids), ITEM_BLOCK)
        parts = [encoder(items.take(torch.arange(start, stop, device=device))) for start, stop in blocks]
    encoder.train(was_training)
    return torch.cat(parts) if parts else torch.zeros(0, encoder.sizes.width, device=device)


def padded(vectors: Tensor) -> Tensor:
    """[M + 1, D]: a zero vector in row 0, so that vectors [M, D] are found by their 1-based rows."""
    return torch.cat([vectors.new_zeros(1, vectors.shape[1]), vectors])
