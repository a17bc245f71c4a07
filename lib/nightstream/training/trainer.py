"""Training of one encoder, in one or several processes, from files to files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load as load_tensors
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nightstream.files import write_atomically, write_json
from nightstream.models.array_files import load_item_features, load_sequences
from nightstream.models.arrays import VALID
from nightstream.models.encoders import ItemEncoder, build_sequence_encoder
from nightstream.models.encoders.tensors import CPU, item_batch
from nightstream.training import batching, device
from nightstream.training.checkpoint import Checkpoint, TrainingState
from nightstream.training.hyperparameters import TrainingSizes, encoder_sizes, item_sizes, training_sizes
from nightstream.training.objective import Objective
from nightstream.training.recommender import Recommender, moving_average
from nightstream.training.validation import target_ndcg

# What a training run may change without becoming another one.
NOT_IN_SPEC = ("output", "sequences", "items", "threads", "device", "start")


class Trainer:
    """One training run's loop; see train_encoder."""

    def __init__(self, spec: dict[str, Any], place: torch.device = CPU) -> None:
        self.spec = spec
        self.device = place
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.seed = int(spec["seed"])
        self.out = Path(spec["output"])
        self.sequences = load_sequences(spec["sequences"])
        features = load_item_features(spec["items"])
        options = {**spec.get("options", {}), "encoder": spec["encoder"]}
        self.sizes: TrainingSizes = training_sizes(options, self.sequences, len(features))
        torch.manual_seed(self.seed)
        model = Recommender(
            ItemEncoder(item_sizes(options, features)),
            build_sequence_encoder(encoder_sizes(options, self.sequences, int(spec["event_types"]))),
            self.sizes.scale,
        )
        if spec.get("start"):
            model.load_state_dict(load_tensors(Path(spec["start"]).read_bytes()))
        model.to(place)
        self.is_target = np.isin(self.sequences.roles, np.asarray(spec["roles"], np.int8)) & (self.sequences.items > 0)
        # An id that no training event carries would keep its random vector: such an item counts as one without an id.
        counts = np.bincount(self.sequences.items[self.is_target], minlength=len(features) + 1)[1:]
        self.is_known = counts > 0
        self.items = item_batch(features, np.where(self.is_known, np.arange(1, len(features) + 1), 0), place)
        limit = self.sizes.valid_limit if spec.get("validate", True) else 0
        self.valid = batching.sampled_targets(self.sequences, VALID, limit, self.seed) if limit else np.zeros(0, int)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=self.sizes.learning_rate, weight_decay=self.sizes.weight_decay
        )
        self.state = TrainingState(model, moving_average(model, warm_up=not spec.get("start")), optimizer)
        self.objective: nn.Module = Objective(model, self.items, self.sequences.users, counts, self.sizes.negatives)
        if self.world > 1:
            self.objective = DistributedDataParallel(self.objective)
        kept = {k: v for k, v in spec.items() if k not in NOT_IN_SPEC}
        self.checkpoint = Checkpoint(self.out, json.dumps([kept, asdict(self.sizes), self.world], sort_keys=True))

    def run(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self.checkpoint.restore(self.state)
        while len(self.state.history) < self.sizes.epochs and not self._is_enough():
            self._epoch(len(self.state.history))
            if self.rank == 0:
                self.checkpoint.save(self.state, self.best_epoch())
        if self.rank == 0:
            self._finish()

    def best_epoch(self) -> int:
        """Number of epochs (from 1) at which validation was best; the last one where there is no validation."""
        history = self.state.history
        if not len(self.valid) or not history:
            return len(history)
        return int(np.argmax([h["ndcg@10"] for h in history])) + 1

    def _is_enough(self) -> bool:
        return bool(len(self.valid)) and len(self.state.history) - self.best_epoch() >= self.sizes.patience

    def _epoch(self, epoch: int) -> None:
        """One pass over this rank's users. All randomness comes from (seed, epoch, rank), so a restart repeats it."""
        model, average, optimizer = self.state.model, self.state.average, self.state.optimizer
        rng = np.random.default_rng([self.seed, epoch, self.rank])
        torch.manual_seed(int(rng.integers(2**62)))
        mine = np.arange(self.rank, len(self.sequences), self.world)
        chunks = batching.cut_chunks(self.sequences, mine, model.sequence.sizes.window, self.is_target, rng)
        parts = batching.batches(chunks, max(1, self.sizes.positions // self.world), rng)
        # Every process takes as many steps as the one that has most, since gradients are averaged over all of them.
        steps = int(self._largest(len(parts)))
        model.train()
        total = 0.0
        for step in range(steps):
            rows = parts[step % len(parts)] if parts else None
            examples = None if rows is None else batching.examples(self.sequences, chunks, rows, self.is_target)
            optimizer.zero_grad(set_to_none=False)
            loss = self.objective(examples)
            loss.backward()
            total += float(loss.detach())
            optimizer.step()
            average.update_parameters(model)
            if step + 1 == steps or step % max(1, steps // 10) == 0:
                self._progress(epoch + 1, step + 1, steps, total / (step + 1), None, False)
        score = target_ndcg(self.state.averaged, self.items, self.sequences, self.valid) if self.rank == 0 else 0.0
        score = self._largest(score)
        loss = total / max(1, steps)
        self.state.history.append({"epoch": epoch + 1, "loss": loss, "ndcg@10": score})
        self._progress(epoch + 1, steps, steps, loss, score if len(self.valid) else None, True)

    def _largest(self, value: float) -> float:
        """The largest of the values that the processes have."""
        if self.world == 1:
            return value
        tensor = torch.tensor([float(value)], dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return float(tensor)

    def _progress(self, epoch: int, step: int, steps: int, loss: float, score: float | None, whole: bool) -> None:
        if self.rank != 0:
            return
        line = {
            "encoder": self.spec.get("name", self.spec["encoder"]),
            "epoch": epoch,
            "epochs": self.sizes.epochs,
            "whole": whole,
            "step": step,
            "steps": steps,
            "loss": loss,
            "ndcg@10": score,
        }
        with open(self.out / "progress.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    def _finish(self) -> None:
        best, model = self.best_epoch(), self.state.model
        write_atomically(self.out / "weights.safetensors", self.checkpoint.best_path(best).read_bytes())
        result = {
            "name": self.spec.get("name", self.spec["encoder"]),
            "epoch": best,
            "history": self.state.history,
            "item_sizes": asdict(model.items.sizes),
            "encoder_sizes": asdict(model.sequence.sizes),
            "training_sizes": asdict(self.sizes),
            "known_items": int(self.is_known.sum()),
        }
        write_json(self.out / "history.json", result)


def train_encoder(spec: dict[str, Any], on_start: Callable[[], None] | None = None) -> str:
    """Trains one encoder and returns its output directory; to be called once in each process of a TorchDistributor.

    RANK, LOCAL_RANK and WORLD_SIZE come from the environment; users are shared out over the ranks, gradients averaged.
    Writes progress.jsonl (lines with encoder, epoch, epochs, step, steps, loss, ndcg@10), a checkpoint per epoch, and
    at the end weights.safetensors and history.json. Killed and called again with the same spec it goes on after the
    last whole epoch and ends in the weights of an undisturbed run.

    Args:
        spec: "encoder" (gru, cnn, transformer), "name", "sequences" and "items" (paths of save_sequences and
            save_item_features), "output" (a directory that all processes share), "seed", "event_types" (their number),
            "roles" (which events may be targets), "validate" (early stopping on VALID targets), "start" (weights to
            begin with, absent: random ones), "threads" (of torch, per process), "device" (cpu or cuda, absent: cpu) and
            "options" (sizes by name, see hyperparameters; "auto" or absent follows its rules).
        on_start: called first, in this process.

    Returns:
        The output directory.

    Raises:
        ArtifactError: an input file is unreadable.
        MachineError: there is no GPU for this process.
    """
    if on_start is not None:
        on_start()
    if "threads" in spec:
        torch.set_num_threads(int(spec["threads"]))
    place = device.of_process(spec.get("device", "cpu"))
    distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if distributed:
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        Trainer(spec, place).run()
        if distributed:
            dist.barrier()
    finally:
        # Without this the exit barrier of TorchDistributor can hang for minutes.
        if distributed:
            dist.destroy_process_group()
    return str(spec["output"])
