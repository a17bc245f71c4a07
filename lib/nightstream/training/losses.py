"""Softmax cross-entropy over a whole catalogue, and over a sample of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_CHUNK = 512
_LARGEST_BOUND = 30.0


class _FullSoftmax(torch.autograd.Function):
    """Mean cross-entropy computed in chunks: loss and gradients in one pass, and no [P, M] array is ever kept."""

    @staticmethod
    def forward(ctx: Any, users: Tensor, items: Tensor, targets: Tensor, excluded: Tensor) -> Tensor:
        count = len(users)
        # Row 0 is where the padding of `excluded` goes, so that rows keep their 1-based numbers.
        table = torch.cat([items.new_zeros(1, items.shape[1]), items])
        user_grad = torch.empty_like(users)
        table_grad = torch.zeros_like(table)
        # An upper bound of the logits serves as well as their maximum, unless it is so far off that exp underflows.
        bound = users.norm(dim=1, keepdim=True) * items.norm(dim=1).max()
        exact = bool(bound.max() > _LARGEST_BOUND)
        buffer = table.new_empty(min(_CHUNK, count), len(table))
        losses = []
        for start in range(0, count, _CHUNK):
            part, top = users[start : start + _CHUNK], bound[start : start + _CHUNK]
            target = targets[start : start + _CHUNK].unsqueeze(1)
            logits = buffer[: len(part)]
            if exact:
                torch.mm(part, table.T, out=logits)
                top = logits.amax(1, keepdim=True)
                logits.sub_(top)
            else:
                torch.addmm(-top, part, table.T, out=logits)
            hit = logits.gather(1, target)
            logits.scatter_(1, excluded[start : start + _CHUNK], -torch.inf)
            logits.scatter_(1, target, hit)
            logits[:, 0] = -torch.inf
            logits.exp_()
            mass = logits.sum(1, keepdim=True)
            losses.append((mass.log() - hit).sum())
            user_grad[start : start + _CHUNK] = torch.mm(logits, table).div_(mass).sub_(table[target[:, 0]])
            table_grad.addmm_(logits.T, part / mass)
            table_grad.index_add_(0, target[:, 0], part, alpha=-1)
        item_grad = table_grad[1:]
        ctx.save_for_backward(user_grad.div_(count), item_grad.div_(count))
        # Read at the end alone: a GPU would wait at each chunk.
        return users.new_tensor(sum(torch.stack(losses).tolist()) / count)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        user_grad, item_grad = ctx.saved_tensors
        return user_grad * grads[0], item_grad * grads[0], None, None


def full_softmax(users: Tensor, items: Tensor, targets: Tensor, excluded: Tensor) -> Tensor:
    """Mean of −log softmax(users · items)[target] over P positions.

    users: float32 [P, D], already divided by the temperature. items: float32 [M, D]. targets: int64 [P], 1-based.
    excluded: int64 [P, X], 1-based rows left out of the softmax (0 = none; a position's own target always stays in).
    """
    loss: Tensor = _FullSoftmax.apply(users, items, targets, excluded)
    return loss


def sampled_softmax(users: Tensor, positives: Tensor, negatives: Tensor, log_expected: Tensor, same: Tensor) -> Tensor:
    """Mean cross-entropy with the softmax's sum estimated from S sampled items (Bengio & Senécal, 2008).

    users: [P, D], already divided by the temperature. positives: [P, D], the targets' vectors. negatives: [S, D].
    log_expected: [S], log of the expected number of draws of each sampled item, which makes the sum unbiased.
    same: bool [P, S], true where a sampled item must not count for a position (its target, or one excluded).
    """
    positive = (users * positives).sum(1, keepdim=True)
    negative = (users @ negatives.T - log_expected).masked_fill(same, -torch.inf)
    logits = torch.cat([positive, negative], 1)
    return functional.cross_entropy(logits, torch.zeros(len(users), dtype=torch.int64, device=users.device))
