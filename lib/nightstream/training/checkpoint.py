"""A training run's state on disk, whole epochs at a time, so that a killed run goes on where it was."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from nightstream.files import write_atomically
from nightstream.training.recommender import Recommender


@dataclass
class TrainingState:
    """All that an epoch changes. history: one entry per epoch with its number, loss and validation NDCG@10."""

    model: Recommender
    average: AveragedModel
    optimizer: Optimizer
    history: list[dict[str, float]] = field(default_factory=list)

    @property
    def averaged(self) -> Recommender:
        """The model at the averaged weights: what is validated and handed out."""
        return cast(Recommender, self.average.module)


class Checkpoint:
    """The newest state and the best epoch's weights in a folder.

    spec: what the run is, as text. A state of another spec is not gone on with.
    """

    def __init__(self, folder: Path, spec: str) -> None:
        self.folder = folder
        self.spec = spec

    @property
    def path(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def best_path(self, epoch: int) -> Path:
        """The weights handed out if this epoch stays the best: those of the moving average."""
        return self.folder / f"best.{epoch}.safetensors"

    def save(self, state: TrainingState, best: int) -> None:
        """Writes the state in one file, so that a restart never meets parts of two epochs.

        best: the best epoch so far. Its weights are written if it is the newest one; those of others are removed.
        """
        tensors = {f"model.{k}": v for k, v in state.model.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in state.average.state_dict().items()}
        for number, values in state.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{k}": v for k, v in values.items()}
        if best == len(state.history):
            write_atomically(self.best_path(best), save_tensors(state.averaged.state_dict()))
        meta = {"history": json.dumps(state.history), "spec": self.spec}
        write_atomically(self.path, save_tensors(tensors, meta))
        for old in self.folder.glob("best.*.safetensors"):
            if old != self.best_path(best):
                old.unlink()

    def restore(self, state: TrainingState) -> None:
        """Fills the state in from the folder's file, if there is one of the same spec; every process reads it."""
        if not self.path.exists():
            return
        data = self.path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        meta = json.loads(data[8 : 8 + length]).get("__metadata__", {})
        if meta.get("spec") != self.spec:
            return
        parts: dict[str, dict[str, torch.Tensor]] = {"model": {}, "average": {}, "optimizer": {}}
        for name, value in load_tensors(data).items():
            part, _, rest = name.partition(".")
            parts[part][rest] = value
        state.model.load_state_dict(parts["model"])
        state.average.load_state_dict(parts["average"])
        optimizer = state.optimizer.state_dict()
        for name, value in parts["optimizer"].items():
            number, _, key = name.partition(".")
            optimizer["state"].setdefault(int(number), {})[key] = value
        state.optimizer.load_state_dict(optimizer)
        state.history = json.loads(meta["history"])
