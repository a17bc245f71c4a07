"""The draw of a short share of the faults."""

from __future__ import annotations

import os
import random

import pytest

SEED = "NIGHTSTREAM_FAULT_SEED"


@pytest.fixture
def drawn(capsys) -> random.Random:
    """By another seed in each run, which is printed; the variable SEED draws the same again."""
    seed = int(os.environ.get(SEED) or random.SystemRandom().randrange(10**6))
    with capsys.disabled():
        print(f"\n{SEED}={seed}")
    return random.Random(seed)
