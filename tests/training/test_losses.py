from __future__ import annotations

import pytest
import torch
from nightstream.training.losses import _CHUNK, full_softmax, sampled_softmax


def reference(users: torch.Tensor, items: torch.Tensor, targets: torch.Tensor, excluded: torch.Tensor) -> torch.Tensor:
    losses = []
    for user, target, out in zip(users, targets.tolist(), excluded.tolist(), strict=True):
        kept = [i for i in range(len(items)) if i + 1 == target or i + 1 not in out]
        losses.append(torch.logsumexp(items[kept] @ user, 0) - items[target - 1] @ user)
    return torch.stack(losses).mean()


@pytest.mark.parametrize(("count", "scale"), [(5, 1.0), (_CHUNK + 3, 1.0), (5, 12.0)])
def test_full_softmax_has_the_value_and_the_gradients_of_the_obvious_formula(count: int, scale: float) -> None:
    torch.manual_seed(0)
    users = (scale * torch.randn(count, 6)).requires_grad_()
    items = torch.randn(11, 6, requires_grad=True)
    targets = torch.randint(1, 12, (count,))
    excluded = torch.randint(0, 12, (count, 3))
    loss = full_softmax(users, items, targets, excluded)
    mine = torch.autograd.grad(loss * 2, [users, items])
    expected = reference(users, items, targets, excluded)
    theirs = torch.autograd.grad(expected * 2, [users, items])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_sampled_softmax_estimates_the_full_one_without_bias() -> None:
    torch.manual_seed(0)
    users, items = torch.randn(4, 6), torch.randn(200, 6)
    targets = torch.tensor([1, 50, 100, 200])
    share = torch.rand(200) + 0.1
    share /= share.sum()
    full = full_softmax(users, items, targets, torch.zeros(4, 1, dtype=torch.int64)).item()
    draws = torch.multinomial(share, 200_000, replacement=True)
    drawn, repeats = draws.unique(return_counts=True)
    log_expected = (share[drawn] * 200_000).log() - repeats.log()
    same = (drawn + 1).unsqueeze(0) == targets.unsqueeze(1)
    sampled = sampled_softmax(users, items[targets - 1], items[drawn], log_expected, same).item()
    uncorrected = sampled_softmax(users, items[targets - 1], items[drawn], -repeats.log(), same).item()
    assert sampled == pytest.approx(full, abs=0.05)
    assert abs(uncorrected - full) > 1.0
