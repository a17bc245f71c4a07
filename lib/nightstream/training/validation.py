"""How well a recommender ranks the events that early stopping looks at."""

from __future__ import annotations

import numpy as np
import torch

from nightstream.models import ranking_metrics
from nightstream.models.arrays import Sequences
from nightstream.models.encoders.item import ItemBatch
from nightstream.models.encoders.tensors import sequence_batch
from nightstream.models.ranking.topk import exclude
from nightstream.training import batching
from nightstream.training.recommender import Recommender, encode_all_items, padded

EVALUATION_BLOCK = 256


def target_ndcg(model: Recommender, items: ItemBatch, sequences: Sequences, targets: np.ndarray) -> float:
    """Mean NDCG@10 of target events in the ranking of all items, seen ones removed; 0 where there are none.

    Args:
        model: on the device of the items, put into training mode at the end.
        items: the vocabulary.
        sequences: the histories.
        targets: int64 [T], positions in the sequences.

    Returns:
        A share from 0 to 1.
    """
    vectors = encode_all_items(model.items, items)
    table = padded(vectors)
    model.eval()
    ranks = []
    for start, stop in batching.in_blocks(len(targets), EVALUATION_BLOCK):
        part = targets[start:stop]
        windows = batching.windows_before(sequences, part, model.sequence.sizes.window)
        rows = torch.as_tensor(windows.items.astype(np.int64), device=table.device)
        batch = sequence_batch(
            table[rows], windows.types, windows.times, windows.values, windows.items > 0, windows.users
        )
        with torch.no_grad():
            scores = (model.sequence.last(batch) @ vectors.T).cpu().numpy()
        wanted = sequences.items[part].astype(np.int64) - 1
        own = scores[np.arange(len(part)), wanted].copy()
        exclude(scores, windows.seen, windows.seen_offsets)
        scores[np.arange(len(part)), wanted] = own
        ranks.append(ranking_metrics.score_ranks(scores, wanted))
    model.train()
    return ranking_metrics.ndcg(np.concatenate(ranks), 10) if ranks else 0.0
