from __future__ import annotations

import contextlib
import json
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from learning_data import plain_items, ring_sequences
from nightstream.errors import ArtifactError
from nightstream.models.array_files import save_item_features, save_sequences
from nightstream.models.arrays import RANK, TRAIN, VALID, ItemFeatures
from nightstream.models.encoders.factory import ENCODERS
from nightstream.models.encoders.tensors import item_batch
from nightstream.training import trainer
from nightstream.training.trainer import Trainer, train_encoder
from nightstream.training.validation import target_ndcg
from safetensors.torch import load_file

SMALL = {"width": 16, "window": 6, "positions": 128, "epochs": 12, "learning_rate": 0.02, "dropout": 0.1}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def spec_in(folder: Path, encoder: str = "gru", **changes: Any) -> dict[str, Any]:
    if not (folder / "s").exists():
        save_sequences(folder / "s", ring_sequences())
        save_item_features(folder / "i", plain_items(30))
    spec = {
        "encoder": encoder, "name": encoder, "sequences": str(folder / "s"), "items": str(folder / "i"), "seed": 1,
        "output": str(folder / "out"), "event_types": 1, "roles": [TRAIN], "threads": 1, "options": dict(SMALL),
    }  # fmt: skip
    return spec | changes


def weights(folder: Path, name: str = "out") -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(str(folder / name / "weights.safetensors"))
    return tensors


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_encoder_learns_the_ring(encoder: str, tmp_path: Path) -> None:
    train_encoder(spec_in(tmp_path, encoder))
    history = json.loads((tmp_path / "out" / "history.json").read_text())
    # The step of 7 is the rule of all histories; chance is about 0.15.
    assert max(h["ndcg@10"] for h in history["history"]) > 0.9


def test_the_sampled_softmax_learns_the_ring_too(tmp_path: Path) -> None:
    train_encoder(spec_in(tmp_path, "cnn", options=SMALL | {"negatives": 15}))
    history = json.loads((tmp_path / "out" / "history.json").read_text())
    assert max(h["ndcg@10"] for h in history["history"]) > 0.8


def test_progress_lines_have_what_a_bar_needs(tmp_path: Path) -> None:
    train_encoder(spec_in(tmp_path, options=SMALL | {"epochs": 2}))
    lines = [json.loads(line) for line in (tmp_path / "out" / "progress.jsonl").read_text().splitlines()]
    expected = {"encoder", "epoch", "epochs", "whole", "step", "steps", "loss", "ndcg@10"}
    assert all(set(line) == expected for line in lines)
    assert (lines[-1]["epoch"], lines[-1]["step"]) == (2, lines[-1]["steps"])
    assert lines[-1]["ndcg@10"] is not None


def test_killed_after_an_epoch_and_restarted_it_ends_in_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_encoder(spec_in(tmp_path, options=SMALL | {"epochs": 4}))
    undisturbed = weights(tmp_path)
    epoch = Trainer._epoch

    def dying(self: Trainer, number: int) -> None:
        if number == 2:
            raise KeyboardInterrupt
        epoch(self, number)

    again = spec_in(tmp_path, options=SMALL | {"epochs": 4}, output=str(tmp_path / "again"))
    monkeypatch.setattr(Trainer, "_epoch", dying)
    with pytest.raises(KeyboardInterrupt):
        train_encoder(again)
    assert not (tmp_path / "again" / "weights.safetensors").exists()
    done: list[int] = []
    monkeypatch.setattr(Trainer, "_epoch", lambda self, number: (done.append(number), epoch(self, number))[1])
    train_encoder(again)
    assert done == [2, 3]
    for name, value in weights(tmp_path, "again").items():
        torch.testing.assert_close(value, undisturbed[name], rtol=0, atol=0)


def test_a_checkpoint_of_another_spec_is_not_continued(tmp_path: Path) -> None:
    train_encoder(spec_in(tmp_path, options=SMALL | {"epochs": 2}))
    train_encoder(spec_in(tmp_path, options=SMALL | {"epochs": 1}, seed=2))
    history = json.loads((tmp_path / "out" / "history.json").read_text())
    assert len(history["history"]) == 1


def test_the_seed_decides(tmp_path: Path) -> None:
    short = SMALL | {"epochs": 1}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train_encoder(spec_in(tmp_path, options=short, output=str(tmp_path / name), seed=seed))
    a, b, c = (weights(tmp_path, n)["items.ids.weight"] for n in "abc")
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_early_stopping_hands_out_the_best_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.1, 0.5, 0.4, 0.3, 0.2, 0.1])
    monkeypatch.setattr(trainer, "target_ndcg", lambda *_: next(scores))
    train_encoder(spec_in(tmp_path, options=SMALL | {"patience": 2}))
    history = json.loads((tmp_path / "out" / "history.json").read_text())
    assert (history["epoch"], len(history["history"])) == (2, 4)
    assert (tmp_path / "out" / "best.2.safetensors").read_bytes() == (
        tmp_path / "out" / "weights.safetensors"
    ).read_bytes()


def test_targets_of_other_roles_teach_nothing(tmp_path: Path) -> None:
    # Only the last step of each history, which has another role, leads to row 30.
    sequences = ring_sequences(items=29)
    sequences.items[sequences.roles == VALID] = 30
    save_sequences(tmp_path / "s", sequences)
    save_item_features(tmp_path / "i", plain_items(30))
    train_encoder(spec_in(tmp_path, options=SMALL | {"epochs": 5}))
    held_back = json.loads((tmp_path / "out" / "history.json").read_text())["history"][-1]["ndcg@10"]
    train_encoder(
        spec_in(tmp_path, options=SMALL | {"epochs": 5}, roles=[TRAIN, RANK, VALID], output=str(tmp_path / "b"))
    )
    told = json.loads((tmp_path / "b" / "history.json").read_text())["history"][-1]["ndcg@10"]
    assert held_back < 0.5 < told


def test_content_alone_finds_the_place_of_a_new_item(tmp_path: Path) -> None:
    # Each item's category is its number; half of all trained steps see the content only.
    sequences = ring_sequences()
    features = ItemFeatures(
        np.zeros((30, 0), np.float32),
        (np.arange(2, 32, dtype=np.int32)[:, None],),
        (32,),
        np.zeros((30, 0), np.int32),
        2,
    )
    save_sequences(tmp_path / "s", sequences)
    save_item_features(tmp_path / "i", features)
    train_encoder(spec_in(tmp_path, "cnn", options=SMALL | {"id_dropout": 0.5}))
    run = Trainer(spec_in(tmp_path, "cnn", options=SMALL | {"id_dropout": 0.5}))
    run.state.model.load_state_dict(weights(tmp_path))
    assert target_ndcg(run.state.model, item_batch(features, np.zeros(30)), sequences, run.valid) > 0.8


class Killed(Exception):
    pass


def _two_processes(rank: int, folder: Path, ports: list[int]) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    free = iter(ports)

    def train(spec: dict[str, Any]) -> None:
        # Under the port of a run that has just ended, one process could meet what is left of it, and wait for ever.
        os.environ["MASTER_PORT"] = str(next(free))
        train_encoder(spec)

    short = SMALL | {"epochs": 3}
    train(spec_in(folder, "cnn", output=str(folder / "whole")))
    train(spec_in(folder, "cnn", output=str(folder / "undisturbed"), options=short))
    killed = spec_in(folder, "cnn", output=str(folder / "killed"), options=short)
    epoch = Trainer._epoch

    def dying(self: Trainer, number: int) -> None:
        if number == 2:
            raise Killed
        epoch(self, number)

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(Trainer, "_epoch", dying)
        train(killed)
    assert not (folder / "killed" / "weights.safetensors").exists()
    train(killed)
    # The only user falls to the first process; no item has text, though there are words.
    lonely = {"sequences": str(folder / "lonely"), "items": str(folder / "wordless"), "options": short}
    train(spec_in(folder, "gru", output=str(folder / "alone"), **lonely))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what _two_processes trained in two processes."""
    folder = tmp_path_factory.mktemp("two")
    spec_in(folder)
    save_sequences(folder / "lonely", ring_sequences(users=1))
    wordless = replace(plain_items(30), tokens=np.zeros((30, 3), np.int32), vocabulary_size=9)
    save_item_features(folder / "wordless", wordless)
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(5)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        ports = [each.getsockname()[1] for each in sockets]
    mp.spawn(_two_processes, (folder, ports), nprocs=2)
    return folder


def test_two_processes_learn_the_ring_together(two_processes: Path) -> None:
    history = json.loads((two_processes / "whole" / "history.json").read_text())
    assert max(h["ndcg@10"] for h in history["history"]) > 0.9


def test_two_processes_that_were_killed_and_restarted_end_in_the_same_weights(two_processes: Path) -> None:
    undisturbed = weights(two_processes, "undisturbed")
    for name, value in weights(two_processes, "killed").items():
        torch.testing.assert_close(value, undisturbed[name], rtol=0, atol=0)
    lines = [json.loads(line) for line in (two_processes / "killed" / "progress.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if line["whole"]] == [1, 2, 3]


def test_a_process_without_a_target_keeps_step_with_the_other(two_processes: Path) -> None:
    history = json.loads((two_processes / "alone" / "history.json").read_text())
    assert (len(history["history"]), history["item_sizes"]["text"]) == (3, "cnn")
    assert weights(two_processes, "alone")["items.ids.weight"].isfinite().all()


def test_an_unreadable_input_is_named(tmp_path: Path) -> None:
    spec = spec_in(tmp_path)
    (tmp_path / "s").write_bytes(b"nonsense")
    with pytest.raises(ArtifactError, match="safetensors"):
        train_encoder(spec)
