"""What a Spark worker needs to encode and rank: one model version with its catalogue, as bytes that travel in a task.

A bundle is plain bytes so that it reaches workers the same way on a laptop, a cluster and over Spark Connect; a worker
decodes it once and keeps it until another version comes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from nightstream.errors import ArtifactError
from nightstream.models.arrays import Catalogue
from nightstream.models.arrow import combined
from nightstream.models.artifacts import MODEL_FILE, from_artifacts
from nightstream.models.features import FeatureStatistics
from nightstream.models.model import Model

FEATURES_FILE = "features.json"
KEPT_IN_A_WORKER = 2

_LOADED: dict[tuple[str, str, str], Loaded] = {}


@dataclass(frozen=True)
class Bundle:
    """One model version and one version of its catalogue.

    files: the model's artifacts, features.json among them.
    catalogue: Arrow IPC stream of (item_id, title, available, vector).
    """

    model_version: str
    catalogue_version: str
    files: dict[str, bytes]
    catalogue: bytes

    @cached_property
    def fingerprint(self) -> str:
        """Hex sha256 of model.json, which holds the other files' checksums, and features.json: two installations may
        give their versions one name."""
        digests = (hashlib.sha256(self.files.get(name, b"")).digest() for name in (MODEL_FILE, FEATURES_FILE))
        return hashlib.sha256(b"".join(digests)).hexdigest()

    def load(self) -> Loaded:
        """Decode, or take what this process decoded earlier."""
        key = (self.model_version, self.catalogue_version, self.fingerprint)
        if key not in _LOADED:
            while len(_LOADED) >= KEPT_IN_A_WORKER:
                del _LOADED[next(iter(_LOADED))]
            _LOADED[key] = Loaded.from_bundle(self)
        return _LOADED[key]


@dataclass(frozen=True)
class Loaded:
    """A decoded bundle: what a worker keeps between micro-batches."""

    model: Model
    statistics: FeatureStatistics
    catalogue: Catalogue
    item_ids: pa.Array

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> Loaded:
        files = dict(bundle.files)
        if FEATURES_FILE not in files:
            raise ArtifactError(
                f"model {bundle.model_version} lacks {FEATURES_FILE}; publish an older version or train anew"
            )
        statistics = FeatureStatistics.from_json(files.pop(FEATURES_FILE).decode())
        catalogue, item_ids = decode_catalogue(bundle.catalogue)
        return cls(from_artifacts(files), statistics, catalogue, item_ids)

    @cached_property
    def titles(self) -> pa.Array:
        """string [M]: the catalogue's display texts."""
        return pa.array(self.catalogue.titles, pa.string())

    def withdrawn(self) -> pa.Array:
        """item_id (string [W]) of the items that are not to be recommended."""
        return self.item_ids.filter(pa.array(~self.catalogue.available))


def encode_catalogue(table: pa.Table) -> bytes:
    """Arrow table (item_id, title, available, vector list<float>) -> Arrow IPC stream, rows in ascending item_id."""
    table = table.select(["item_id", "title", "available", "vector"]).sort_by("item_id").combine_chunks()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def decode_catalogue(content: bytes) -> tuple[Catalogue, pa.Array]:
    """The Catalogue, and its item ids as an Arrow array for look-ups. Raises ArtifactError for damaged bytes."""
    try:
        table = pa.ipc.open_stream(content).read_all()
    except pa.ArrowInvalid as error:
        raise ArtifactError("the catalogue of the published model cannot be read; train anew") from error
    ids = combined(table["item_id"])
    vectors = combined(table["vector"])
    width = len(vectors.flatten()) // max(len(vectors), 1)
    # A copy, because torch takes none but writable arrays.
    matrix = np.array(vectors.flatten(), dtype=np.float32).reshape(len(vectors), width)
    titles = [title or item for title, item in zip(table["title"].to_pylist(), ids.to_pylist(), strict=True)]
    available = np.asarray(combined(table["available"]).to_numpy(zero_copy_only=False), dtype=bool)
    return Catalogue(ids.to_pylist(), matrix, available, titles), ids
