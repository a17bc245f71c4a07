"""Training inputs as files: what one process writes and every training process reads. safetensors and JSON only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from nightstream.errors import ArtifactError
from nightstream.files import write_atomically
from nightstream.models.arrays import ItemFeatures, Sequences, UserFeatures


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of one safetensors file; ArtifactError if it is missing or damaged."""
    try:
        arrays: dict[str, np.ndarray] = load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} is not a readable safetensors file: {error}") from error
    return arrays


def pack_arrays(arrays: dict[str, np.ndarray]) -> bytes:
    data: bytes = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    return data


def pack_users(users: UserFeatures) -> dict[str, np.ndarray]:
    arrays = {"users.numbers": users.numbers, "users.sizes": np.asarray(users.category_sizes, np.int64)}
    return arrays | {f"users.category.{i}": values for i, values in enumerate(users.categories)}


def unpack_users(arrays: dict[str, np.ndarray]) -> UserFeatures:
    sizes = tuple(int(n) for n in arrays["users.sizes"])
    categories = tuple(arrays[f"users.category.{i}"] for i in range(len(sizes)))
    return UserFeatures(arrays["users.numbers"], categories, sizes)


def save_sequences(path: str | Path, sequences: Sequences) -> None:
    """Writes sequences as one safetensors file, atomically."""
    arrays = {name: getattr(sequences, name) for name in ("offsets", "items", "types", "times", "values", "roles")}
    write_atomically(path, pack_arrays(arrays | pack_users(sequences.users)))


def load_sequences(path: str | Path) -> Sequences:
    """What save_sequences wrote; ArtifactError if the file is missing, damaged or incomplete."""
    arrays = read_arrays(path)
    try:
        plain = {name: arrays[name] for name in ("offsets", "items", "types", "times", "values", "roles")}
        return Sequences(**plain, users=unpack_users(arrays))
    except KeyError as error:
        raise ArtifactError(f"{path} has no array {error}: it does not hold sequences") from error


def save_item_features(path: str | Path, features: ItemFeatures) -> None:
    """Writes item features as one safetensors file, atomically."""
    arrays = {"numbers": features.numbers, "tokens": features.tokens}
    arrays["sizes"] = np.asarray([features.vocabulary_size, *features.category_sizes], np.int64)
    arrays |= {f"category.{i}": values for i, values in enumerate(features.categories)}
    write_atomically(path, pack_arrays(arrays))


def load_item_features(path: str | Path) -> ItemFeatures:
    """What save_item_features wrote; ArtifactError if the file is missing, damaged or incomplete."""
    arrays = read_arrays(path)
    try:
        words, *sizes = (int(n) for n in arrays["sizes"])
        categories = tuple(arrays[f"category.{i}"] for i in range(len(sizes)))
        return ItemFeatures(arrays["numbers"], categories, tuple(sizes), arrays["tokens"], words)
    except KeyError as error:
        raise ArtifactError(f"{path} has no array {error}: it does not hold item features") from error
