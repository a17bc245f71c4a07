"""A model as files and back: model.json, one safetensors per encoder and for the sources, ranker.ubj."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from nightstream.errors import ArtifactError
from nightstream.models.array_files import pack_arrays
from nightstream.models.encoders import (
    EncoderSizes,
    ItemEncoder,
    ItemSizes,
    SequenceEncoder,
    build_sequence_encoder,
)
from nightstream.models.model import Member, Model
from nightstream.models.ranking.candidate_sources import Sources
from nightstream.models.ranking.rank_features import RankerFeatures
from nightstream.models.ranking.ranker import Ranker
from nightstream.models.ranking.sources.registry import SOURCES

FORMAT = 1
MODEL_FILE = "model.json"


def to_artifacts(model: Model) -> dict[str, bytes]:
    """Files by name: model.json, one safetensors per encoder and for the sources, and ranker.ubj."""
    files = {"sources.safetensors": pack_arrays(model.sources.to_arrays())}
    members = []
    for member in model.members:
        parts = (("items", member.items), ("sequence", member.sequence))
        weights = {f"{p}.{k}": v.contiguous() for p, module in parts for k, v in module.state_dict().items()}
        weights["trained"] = torch.from_numpy(np.asarray(member.trained, np.uint8))
        files[f"encoder.{member.name}.safetensors"] = save_tensors(weights)
        sizes = {"items": asdict(member.items.sizes), "sequence": asdict(member.sequence.sizes)}
        members.append({"name": member.name, "weight": member.weight, **sizes})
    if model.ranker is not None:
        files["ranker.ubj"] = model.ranker.to_bytes()
    about = {
        "format": FORMAT,
        "item_ids": model.item_ids,
        "event_types": model.event_types,
        "members": members,
        "sources": list(model.sources.names),
        "ranker_enabled": model.ranker_enabled,
        "metrics": model.metrics,
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }
    return {MODEL_FILE: json.dumps(about).encode(), **files}


def from_artifacts(files: Mapping[str, bytes]) -> Model:
    """The model that to_artifacts wrote. Raises ArtifactError for a missing, damaged or unknown part."""
    try:
        about = json.loads(files[MODEL_FILE])
        if about["format"] != FORMAT:
            raise ArtifactError(f"model format {about['format']} is not known here")
        for name, digest in about["sha256"].items():
            if hashlib.sha256(files[name]).hexdigest() != digest:
                raise ArtifactError(f"{name} is damaged: its checksum is not the one in model.json")
        members = [_member(m, files[f"encoder.{m['name']}.safetensors"]) for m in about["members"]]
        arrays = load_arrays(files["sources.safetensors"])
        sources = Sources.from_arrays(arrays, about.get("sources") or _registered(arrays))
        ranker = None
        if "ranker.ubj" in about["sha256"]:
            reads = RankerFeatures(tuple(m.name for m in members), sources.names)
            ranker = Ranker.from_bytes(files["ranker.ubj"], reads)
        return Model(
            about["item_ids"],
            about["event_types"],
            members,
            sources,
            ranker,
            about["ranker_enabled"],
            about["metrics"],
        )
    except KeyError as error:
        raise ArtifactError(f"the model lacks {error}") from error
    except (ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise ArtifactError(f"the model can't be read: {error}") from error


def load_encoders(
    item_sizes: Mapping[str, Any], sequence_sizes: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[ItemEncoder, SequenceEncoder]:
    """One encoder pair from its sizes and its weights, on the CPU.

    Args:
        item_sizes: the fields of ItemSizes, as JSON gives them.
        sequence_sizes: the fields of EncoderSizes, likewise.
        tensors: weights by name, those of the item encoder with the prefix "items.", of the sequence encoder with
            "sequence."; others are left alone.

    Returns:
        The item encoder and the sequence encoder.

    Raises:
        RuntimeError: a weight is missing or has another shape than the sizes say.
    """
    items = ItemEncoder(ItemSizes(**{**item_sizes, "category_sizes": tuple(item_sizes["category_sizes"])}))
    sizes = {**sequence_sizes, "user_categories": tuple(sequence_sizes["user_categories"])}
    sequence = build_sequence_encoder(EncoderSizes(**sizes))
    for prefix, encoder in (("items.", items), ("sequence.", sequence)):
        encoder.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    return items, sequence


def _registered(arrays: Mapping[str, np.ndarray]) -> list[str]:
    """Names of the sources whose arrays are there, in the registry's order: for files that name no sources."""
    return [name for name, kind in SOURCES.items() if any(array in arrays for array in kind.arrays)]


def _member(about: Mapping[str, Any], data: bytes) -> Member:
    tensors = load_tensors(data)
    items, sequence = load_encoders(about["items"], about["sequence"], tensors)
    return Member(about["name"], items, sequence, float(about["weight"]), tensors["trained"].numpy().astype(bool))
