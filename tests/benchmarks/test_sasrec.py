"""SASRec on histories whose next item is known, and what it must not see."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from baselines import Histories, best_rows, popularity
from learning_data import ring_sequences
from nightstream.models.arrays import RANK, TRAIN, VALID
from sasrec import WINDOW, Network, SASRec

ITEMS = 30


@pytest.fixture
def few(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr("sasrec.POSITIONS", 128)
    monkeypatch.setattr("sasrec.LEARNING_RATE", 0.01)


def test_it_learns_a_cycle(few):
    log = ring_sequences(items=ITEMS)
    model = SASRec(dropout=0.1, epochs=8, seed=1)
    model.fit(log, ITEMS, (TRAIN, RANK))
    offsets = np.arange(ITEMS + 1) * 3
    start = np.arange(ITEMS)[:, None]
    items = ((start + 7 * np.arange(3)) % ITEMS + 1).ravel()
    rows, _ = best_rows(model, Histories(items, offsets, items, offsets), popularity(log, ITEMS, (TRAIN,)), 1)
    assert (rows[:, 0] == (np.arange(ITEMS) + 21) % ITEMS + 1).mean() > 0.9


def test_early_stopping_settles_the_epochs(few, monkeypatch):
    monkeypatch.setattr("sasrec.EPOCHS", 12)
    monkeypatch.setattr("sasrec.PATIENCE", 2)
    scores = iter([0.1, 0.3, 0.2, 0.25, 0.9])
    monkeypatch.setattr("sasrec.validated", lambda *_: next(scores))
    log = ring_sequences(users=20, items=ITEMS)
    model = SASRec(seed=1)
    model.fit(log, ITEMS, (TRAIN, RANK), np.flatnonzero(log.roles == VALID))
    assert model.settled() == {"epochs": 2}
    again = SASRec(seed=1, epochs=2)
    again.fit(log, ITEMS, (TRAIN, RANK))
    for a, b in zip(model.network.parameters(), again.network.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_place_sees_nothing_later_and_nothing_of_the_padding():
    torch.manual_seed(0)
    network = Network(9, 0.5).eval()
    short = torch.tensor([[1, 2, 3]])
    padded = torch.nn.functional.pad(short, (WINDOW - 3, 0))
    torch.testing.assert_close(network(padded)[:, -3:], network(short))
    other = torch.tensor([[1, 2, 7]])
    torch.testing.assert_close(network(other)[:, :2], network(short)[:, :2])
    assert not torch.allclose(network(other)[:, 2], network(short)[:, 2])
