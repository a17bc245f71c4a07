from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from learning_data import ring_sequences
from nightstream.errors import ArtifactError
from nightstream.files import write_atomically
from nightstream.models.array_files import load_item_features, load_sequences, save_item_features, save_sequences
from nightstream.models.arrays import ItemFeatures, UserFeatures


def test_sequences_there_and_back(tmp_path: Path) -> None:
    sequences = ring_sequences(users=4)
    users = UserFeatures(np.ones((4, 2), np.float32), (np.full((4, 1), 2, np.int32),), (5,))
    sequences = type(sequences)(**{**vars(sequences), "users": users})
    save_sequences(tmp_path / "s", sequences)
    again = load_sequences(tmp_path / "s")
    for name in ("offsets", "items", "types", "times", "values", "roles"):
        np.testing.assert_array_equal(getattr(again, name), getattr(sequences, name))
    np.testing.assert_array_equal(again.users.categories[0], users.categories[0])
    np.testing.assert_array_equal(again.users.numbers, users.numbers)
    assert again.users.category_sizes == (5,)


def test_item_features_there_and_back(tmp_path: Path) -> None:
    features = ItemFeatures(
        np.ones((3, 2), np.float32),
        (np.full((3, 2), 4, np.int32), np.full((3, 1), 1, np.int32)),
        (7, 3),
        np.full((3, 5), 6, np.int32),
        9,
    )
    save_item_features(tmp_path / "i", features)
    again = load_item_features(tmp_path / "i")
    np.testing.assert_array_equal(again.tokens, features.tokens)
    np.testing.assert_array_equal(again.categories[1], features.categories[1])
    assert (again.category_sizes, again.vocabulary_size) == ((7, 3), 9)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    save_sequences(tmp_path / "s", ring_sequences(users=4))
    with pytest.raises(ArtifactError, match="item features"):
        load_item_features(tmp_path / "s")
    with pytest.raises(ArtifactError, match="nowhere"):
        load_sequences(tmp_path / "nowhere")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "f", b"old")

    def broken(fd: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", broken)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"old"
