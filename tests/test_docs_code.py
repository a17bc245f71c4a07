"""The examples in docs/code.md do what the page says: each registers, learns, and is used."""

from __future__ import annotations

import json
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learning_data import catalogue_of, make_windows, plain_items, ring_sequences, untrained_model
from nightstream.models.array_files import save_item_features, save_sequences
from nightstream.models.arrays import RANK, TRAIN, VALID, Catalogue, ItemFeatures, Sequences
from nightstream.models.artifacts import from_artifacts, to_artifacts
from nightstream.models.encoders import Batch, EncoderSizes, ItemEncoder, ItemSizes, build_sequence_encoder
from nightstream.models.encoders.content import ItemBatch
from nightstream.models.encoders.factory import CONTENT_ENCODERS, ENCODERS
from nightstream.models.model import Model
from nightstream.models.ranking.rank_features import RankerFeatures
from nightstream.models.ranking.ranker import RankerSizes, train_ranker
from nightstream.models.ranking.sources.registry import SOURCES
from nightstream.models.ranking.strategies import STRATEGIES, reason_text
from nightstream.training.batching import sampled_targets
from nightstream.training.pipeline import labelled_groups
from nightstream.training.trainer import train_encoder
from safetensors.torch import load_file

PAGE = Path(__file__).parent.parent / "docs" / "code.md"
ITEMS, WIDTH = 30, 8


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    """What an example registers is gone after its test."""
    torch.set_num_threads(1)
    before = [(registry, dict(registry)) for registry in (SOURCES, ENCODERS, CONTENT_ENCODERS)]
    yield
    for registry, entries in before:
        registry.clear()
        registry.update(entries)


def run_example(heading: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Executes the Python blocks of one section, in order and in one namespace."""
    section = PAGE.read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 2
    module = types.ModuleType(f"example_{heading.replace(' ', '_')}")
    # A dataclass looks its module up by name.
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for block in blocks:
        exec(compile(block, str(PAGE), "exec", dont_inherit=True), vars(module))


def with_ranker(model: Model, sequences: Sequences, catalogue: Catalogue) -> Model:
    parts = [
        labelled_groups(model, sequences, catalogue, sampled_targets(sequences, role, 80, 0)) for role in (RANK, VALID)
    ]
    reads = RankerFeatures(("gru",), model.sources.names)
    ranker = train_ranker(*parts, reads, RankerSizes(trees=5, threads=1, min_child_weight=0.5), 0)
    assert ranker is not None
    return Model(model.item_ids, model.event_types, model.members, model.sources, ranker)


def test_a_source_puts_items_forward_with_its_own_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = ring_sequences(items=ITEMS)
    older = untrained_model(sequences)
    catalogue = catalogue_of(older.encode_items(plain_items(ITEMS), older.item_ids))
    older = with_ranker(older, sequences, catalogue)
    windows = make_windows([[1, 8, 15], [4, 11], []])
    without = older.recommend(windows, catalogue, 5)

    run_example("A source of candidates", monkeypatch)
    assert list(SOURCES)[-1] == "next_item"
    model = with_ranker(untrained_model(sequences), sequences, catalogue)
    model = from_artifacts(to_artifacts(model))
    lists = model.recommend(windows, catalogue, 5)
    # The step of 7 is the rule of all histories.
    assert lists.rows[:2, 0].tolist() == [22, 18]
    names = [STRATEGIES[s] for s in lists.strategies[:2, 0]]
    assert names == ["next_item", "next_item"]
    assert lists.because[:2, 0].tolist() == [15, 11]
    assert reason_text(names[0], "Dune") == "Often comes right after “Dune”"
    assert "next_item" not in {STRATEGIES[s] for s in lists.strategies[2]}

    # A model that was trained before the source came serves as it did.
    again = from_artifacts(to_artifacts(older))
    assert "next_item" not in again.sources.names
    now = again.recommend(windows, catalogue, 5)
    for name in ("rows", "scores", "strategies", "because"):
        np.testing.assert_array_equal(getattr(now, name), getattr(without, name))


def train(folder: Path, features: ItemFeatures, encoder: str, **options: Any) -> dict[str, torch.Tensor]:
    """The weights after training on the ring; history.json lies beside them."""
    save_sequences(folder / "sequences", ring_sequences(items=ITEMS))
    save_item_features(folder / "items", features)
    sizes = {"width": 16, "window": 6, "positions": 128, "epochs": 1, "learning_rate": 0.02}
    train_encoder(
        {
            "encoder": encoder, "name": encoder, "sequences": str(folder / "sequences"), "items": str(folder / "items"),
            "seed": 1, "output": str(folder / "out"), "event_types": 1, "roles": [TRAIN], "threads": 1,
            "options": sizes | options,
        }
    )  # fmt: skip
    tensors: dict[str, torch.Tensor] = load_file(str(folder / "out" / "weights.safetensors"))
    return tensors


def test_an_encoder_of_sequences_trains_and_encodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_example("An encoder of sequences", monkeypatch)
    weights = train(tmp_path, plain_items(ITEMS), "mean", epochs=4)
    history = json.loads((tmp_path / "out" / "history.json").read_text())
    assert history["encoder_sizes"]["kind"] == "mean"
    # Chance is about 0.15.
    assert max(h["ndcg@10"] for h in history["history"]) > 0.3
    sizes = EncoderSizes(**{**history["encoder_sizes"], "user_categories": ()})
    encoder = build_sequence_encoder(sizes).eval()
    encoder.load_state_dict({k[9:]: v for k, v in weights.items() if k.startswith("sequence.")})
    mask = torch.tensor([[False, True, True, True]])
    items = torch.nn.functional.normalize(torch.randn(1, 4, 16), dim=2) * mask.unsqueeze(2)
    nothing = torch.zeros(1, 4, dtype=torch.int64)
    batch = Batch(items, nothing, nothing, torch.zeros(1, 4), mask, torch.zeros(1, 0), ())
    out = encoder(batch)
    torch.testing.assert_close(out.norm(dim=2), mask.float())
    items[:, -1] = -items[:, -1]
    torch.testing.assert_close(encoder(batch)[:, :-1], out[:, :-1])


def test_an_encoder_of_content_trains_and_tells_items_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_example("An encoder of items' content", monkeypatch)
    words = np.zeros((ITEMS, 3), np.int32)
    words[1:, 0] = np.arange(2, ITEMS + 1)
    none = np.zeros((ITEMS, 0), np.float32)
    weights = train(tmp_path, ItemFeatures(none, (), (), words, ITEMS + 2), "gru", text="bag")
    encoder = ItemEncoder(ItemSizes(ITEMS, 16, 0, (), ITEMS + 2, "bag", 0.1)).eval()
    encoder.load_state_dict({k[6:]: v for k, v in weights.items() if k.startswith("items.")})
    assert encoder.text is not None
    batch = ItemBatch(torch.zeros(ITEMS, dtype=torch.int64), torch.zeros(ITEMS, 0), (), torch.from_numpy(words).long())
    parts = encoder.text(batch)
    assert not parts[0].any()
    vectors = encoder(batch).detach()
    assert (vectors[1:] @ vectors[1:].T - torch.eye(ITEMS - 1)).abs().max() < 0.99
