"""Training of one encoder, in one or several processes, from files to files."""

from __future__ import annotations

import copy
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
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from nightstream.files import write_atomically, write_json
from nightstream.models import ranking_metrics
from nightstream.models.array_files import load_item_features, load_sequences, save_item_features, save_sequences
from nightstream.models.arrays import VALID, ItemFeatures, Sequences
from nightstream.models.encoders import Batch, ItemEncoder, SequenceEncoder, build_sequence_encoder
from nightstream.models.encoders.base import gap_buckets
from nightstream.models.encoders.item import ItemBatch
from nightstream.models.ranking.topk import exclude
from nightstream.training import batching
from nightstream.training.hyperparameters import TrainingSizes, encoder_sizes, item_sizes, training_sizes
from nightstream.training.losses import full_softmax, sampled_softmax

__all__ = ["load_item_features", "load_sequences", "save_item_features", "save_sequences", "train_encoder"]

EVALUATION_BLOCK = 256
AVERAGE_DECAY = 0.99
ITEM_BLOCK = 8192


class Recommender(nn.Module):
    """An item encoder and a sequence encoder that share one space, and the temperature of their softmax."""

    def __init__(self, items: ItemEncoder, sequence: SequenceEncoder, scale: float) -> None:
        super().__init__()
        self.items = items
        self.sequence = sequence
        self.log_scale = nn.Parameter(torch.tensor(float(np.log(scale))))


def item_batch(features: ItemFeatures, ids: np.ndarray) -> ItemBatch:
    """Item features as tensors; ids: [M] 1-based vocabulary rows, 0 = without an id."""
    return ItemBatch(
        torch.from_numpy(np.asarray(ids, np.int64)),
        torch.from_numpy(np.asarray(features.numbers, np.float32)),
        tuple(torch.from_numpy(np.asarray(c, np.int64)) for c in features.categories),
        torch.from_numpy(np.asarray(features.tokens, np.int64)),
    )


def encode_all_items(encoder: ItemEncoder, items: ItemBatch) -> Tensor:
    """float32 [M, D] unit vectors, without gradients, in blocks of ITEM_BLOCK items."""
    was_training = encoder.training
    encoder.eval()
    with torch.no_grad():
        parts = [encoder(items.take(torch.arange(a, b))) for a, b in batching.in_blocks(len(items.ids), ITEM_BLOCK)]
    encoder.train(was_training)
    return torch.cat(parts) if parts else torch.zeros(0, encoder.sizes.width)


def _users(sequences: Sequences, rows: np.ndarray) -> tuple[Tensor, tuple[Tensor, ...]]:
    users = sequences.users
    numbers = torch.from_numpy(np.asarray(users.numbers[rows], np.float32))
    return numbers, tuple(torch.from_numpy(np.asarray(c[rows], np.int64)) for c in users.categories)


def _validate(model: Recommender, items: ItemBatch, sequences: Sequences, targets: np.ndarray) -> float:
    """NDCG@10 of the targets in the full ranking, seen items removed."""
    vectors = encode_all_items(model.items, items)
    table = torch.cat([torch.zeros(1, vectors.shape[1]), vectors])
    model.eval()
    ranks = []
    for start, stop in batching.in_blocks(len(targets), EVALUATION_BLOCK):
        part = targets[start:stop]
        windows = batching.windows_before(sequences, part, model.sequence.sizes.window)
        rows = torch.from_numpy(windows.items.astype(np.int64))
        mask = rows > 0
        owner = np.searchsorted(sequences.offsets, part, side="right") - 1
        numbers, categories = _users(sequences, owner)
        batch = Batch(
            table[rows],
            torch.from_numpy(windows.types.astype(np.int64)),
            gap_buckets(torch.from_numpy(windows.times), mask),
            torch.from_numpy(windows.values),
            mask,
            numbers,
            categories,
        )
        with torch.no_grad():
            scores = (model.sequence.last(batch) @ vectors.T).numpy()
        wanted = sequences.items[part].astype(np.int64) - 1
        own = scores[np.arange(len(part)), wanted].copy()
        exclude(scores, windows.seen, windows.seen_offsets)
        scores[np.arange(len(part)), wanted] = own
        ranks.append(ranking_metrics.score_ranks(scores, wanted))
    model.train()
    return ranking_metrics.ndcg(np.concatenate(ranks), 10) if ranks else 0.0


class Trainer:
    """The state of one training run; see train_encoder."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.seed = int(spec["seed"])
        self.out = Path(spec["output"])
        self.sequences = load_sequences(spec["sequences"])
        features = load_item_features(spec["items"])
        options = {**spec.get("options", {}), "encoder": spec["encoder"]}
        self.sizes: TrainingSizes = training_sizes(options, self.sequences, len(features))
        torch.manual_seed(self.seed)
        self.model = Recommender(
            ItemEncoder(item_sizes(options, features)),
            build_sequence_encoder(encoder_sizes(options, self.sequences, int(spec["event_types"]))),
            self.sizes.scale,
        )
        self.is_target = np.isin(self.sequences.roles, np.asarray(spec["roles"], np.int8)) & (self.sequences.items > 0)
        # An id that no training event carries would keep its random vector: such an item counts as one without an id.
        counts = np.bincount(self.sequences.items[self.is_target], minlength=len(features) + 1)
        counts[0] = 0
        self.ids = np.where(counts[1:] > 0, np.arange(1, len(features) + 1), 0)
        self.items = item_batch(features, self.ids)
        share = counts[1:] ** 0.75 + 1.0
        self.draw = torch.from_numpy(share / share.sum())
        limit = self.sizes.valid_limit if spec.get("validate", True) else 0
        self.valid = batching.sampled_targets(self.sequences, VALID, limit, self.seed) if limit else np.zeros(0, int)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self.sizes.learning_rate, weight_decay=self.sizes.weight_decay
        )
        self.history: list[dict[str, float]] = []
        if spec.get("start"):
            self.model.load_state_dict(load_tensors(Path(spec["start"]).read_bytes()))
        # Validated and handed out is a moving average of the weights: it ends where a falling learning rate would,
        # without having to know beforehand when the end comes (Polyak & Juditsky, 1992).
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.steps_done = 0

    def run(self) -> None:
        done = self._restore()
        while done < self.sizes.epochs and not self._is_enough():
            self._epoch(done)
            done += 1
            if self.rank == 0:
                self._checkpoint(done)
        if self.rank == 0:
            self._finish()

    def best_epoch(self) -> int:
        """Number of epochs (from 1) at which validation was best; the last one where there is no validation."""
        if not len(self.valid) or not self.history:
            return len(self.history)
        return int(np.argmax([h["ndcg@10"] for h in self.history])) + 1

    def _is_enough(self) -> bool:
        return bool(len(self.valid)) and len(self.history) - self.best_epoch() >= self.sizes.patience

    def _epoch(self, epoch: int) -> None:
        """One pass over this rank's users. All randomness comes from (seed, epoch, rank), so a restart repeats it."""
        rng = np.random.default_rng([self.seed, epoch, self.rank])
        torch.manual_seed(int(rng.integers(2**62)))
        mine = np.arange(self.rank, len(self.sequences), self.world)
        chunks = batching.cut_chunks(self.sequences, mine, self.model.sequence.sizes.window, self.is_target, rng)
        parts = batching.batches(chunks, max(1, self.sizes.positions // self.world), rng)
        steps = int(self._agree(len(parts), dist.ReduceOp.MAX if self.world > 1 else None))
        self.model.train()
        total = 0.0
        for step in range(steps):
            self.optimizer.zero_grad(set_to_none=False)
            if parts:
                loss = self._loss(chunks, parts[step % len(parts)])
                loss.backward()
                total += float(loss.detach())
            self._average_gradients()
            self.optimizer.step()
            self.steps_done += 1
            share = (
                max(1 - AVERAGE_DECAY, 9 / (9 + self.steps_done)) if not self.spec.get("start") else 1 - AVERAGE_DECAY
            )
            for mean, now in zip(self.average.parameters(), self.model.parameters(), strict=True):
                mean.lerp_(now.detach(), share)
            if self.rank == 0 and (step + 1 == steps or step % max(1, steps // 10) == 0):
                self._progress(epoch + 1, step + 1, steps, total / (step + 1), None, False)
        score = _validate(self.average, self.items, self.sequences, self.valid) if self.rank == 0 else 0.0
        score = self._agree(score, dist.ReduceOp.MAX if self.world > 1 else None)
        self.history.append({"epoch": epoch + 1, "loss": total / max(1, steps), "ndcg@10": score})
        if self.rank == 0:
            self._progress(epoch + 1, steps, steps, total / max(1, steps), score if len(self.valid) else None, True)

    def _loss(self, chunks: batching.Chunks, rows: np.ndarray) -> Tensor:
        sequences = self.sequences
        index, mask = batching.chunk_indices(chunks, rows)
        following = np.minimum(index + 1, len(sequences.items) - 1)
        wanted = mask & (index + 1 >= chunks.target_from[rows][:, None]) & self.is_target[following]
        items = torch.from_numpy(np.where(mask, sequences.items[index], 0).astype(np.int64))
        where, place = np.nonzero(wanted)
        targets = torch.from_numpy(sequences.items[following[where, place]].astype(np.int64))
        # What a user has consumed is not recommended again, so it is no rival of the target either.
        later = torch.arange(items.shape[1]) > torch.from_numpy(place).unsqueeze(1)
        excluded = items[torch.from_numpy(where)].masked_fill(later, 0)
        if self.sizes.negatives:
            return self._sampled_loss(chunks, rows, index, mask, items, wanted, targets, excluded)
        vectors = self.model.items(self.items)
        table = torch.cat([vectors.new_zeros(1, vectors.shape[1]), vectors])
        users = self._encode(chunks, rows, index, mask, table[items])[torch.from_numpy(wanted)]
        return full_softmax(users * self.model.log_scale.exp(), vectors, targets, excluded)

    def _sampled_loss(
        self,
        chunks: batching.Chunks,
        rows: np.ndarray,
        index: np.ndarray,
        mask: np.ndarray,
        items: Tensor,
        wanted: np.ndarray,
        targets: Tensor,
        excluded: Tensor,
    ) -> Tensor:
        count = self.sizes.negatives
        drawn, repeats = torch.multinomial(self.draw, count, replacement=True).add(1).unique(return_counts=True)
        needed = torch.cat([items.flatten(), targets, drawn]).unique()
        needed = needed[needed > 0]
        vectors = self.model.items(self.items.take(needed - 1))
        table = torch.cat([vectors.new_zeros(1, vectors.shape[1]), vectors])
        place = torch.zeros(len(self.ids) + 1, dtype=torch.int64)
        place[needed] = torch.arange(1, len(needed) + 1)
        users = self._encode(chunks, rows, index, mask, table[place[items]])[torch.from_numpy(wanted)]
        log_expected = (self.draw[drawn - 1] * count).log() - repeats.log()
        column = torch.full((len(self.ids) + 1,), len(drawn), dtype=torch.int64)
        column[drawn] = torch.arange(len(drawn))
        same = torch.zeros(len(targets), len(drawn) + 1, dtype=torch.bool)
        same.scatter_(1, column[torch.cat([excluded, targets.unsqueeze(1)], 1)], True)
        return sampled_softmax(
            users * self.model.log_scale.exp(),
            table[place[targets]],
            table[place[drawn]],
            log_expected.to(torch.float32),
            same[:, :-1],
        )

    def _encode(
        self, chunks: batching.Chunks, rows: np.ndarray, index: np.ndarray, mask: np.ndarray, vectors: Tensor
    ) -> Tensor:
        sequences = self.sequences
        present = torch.from_numpy(mask & (sequences.items[index] > 0))
        numbers, categories = _users(sequences, chunks.users[rows])
        out: Tensor = self.model.sequence(
            Batch(
                vectors,
                torch.from_numpy(np.where(mask, sequences.types[index], 0).astype(np.int64)),
                gap_buckets(torch.from_numpy(np.where(mask, sequences.times[index], 0)), present),
                torch.from_numpy(np.where(mask, sequences.values[index], 0).astype(np.float32)),
                present,
                numbers,
                categories,
            )
        )
        return out

    def _agree(self, value: float, operation: Any) -> float:
        if self.world == 1:
            return value
        tensor = torch.tensor([float(value)], dtype=torch.float64)
        dist.all_reduce(tensor, operation)
        return float(tensor)

    def _average_gradients(self) -> None:
        if self.world == 1:
            return
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.model.parameters()]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        flat /= self.world
        start = 0
        for parameter in self.model.parameters():
            parameter.grad = flat[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()

    def _progress(self, epoch: int, step: int, steps: int, loss: float, score: float | None, whole: bool) -> None:
        name = self.spec.get("name", self.spec["encoder"])
        line = {
            "encoder": name,
            "epoch": epoch,
            "epochs": self.sizes.epochs,
            "whole": whole,
            "step": step,
            "steps": steps,
            "loss": loss,
        }
        with open(self.out / "progress.jsonl", "a") as file:
            file.write(json.dumps(line | {"ndcg@10": score}) + "\n")

    def _checkpoint(self, done: int) -> None:
        """Weights, optimizer and history in one file, so that a restart never meets parts of two epochs."""
        weights = {k: v.detach().clone() for k, v in self.average.state_dict().items()}
        tensors = {f"average.{k}": v for k, v in weights.items()}
        tensors |= {f"model.{k}": v.detach().clone() for k, v in self.model.state_dict().items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{k}": torch.as_tensor(v).detach().clone() for k, v in state.items()}
        meta = {"history": json.dumps(self.history), "spec": self._fingerprint(), "steps": str(self.steps_done)}
        if self.best_epoch() == done:
            write_atomically(self.out / f"best.{done}.safetensors", save_tensors(weights))
        write_atomically(self.out / "checkpoint.safetensors", save_tensors(tensors, meta))
        for old in self.out.glob("best.*.safetensors"):
            if old.name != f"best.{self.best_epoch()}.safetensors":
                old.unlink()

    def _fingerprint(self) -> str:
        kept = {k: v for k, v in self.spec.items() if k not in ("output", "sequences", "items", "threads", "start")}
        return json.dumps([kept, asdict(self.sizes), self.world], sort_keys=True)

    def _restore(self) -> int:
        """Epochs already done, by a checkpoint of the same spec; every rank reads it."""
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / "checkpoint.safetensors"
        if not path.exists():
            return 0
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        meta = json.loads(data[8 : 8 + length]).get("__metadata__", {})
        if meta.get("spec") != self._fingerprint():
            return 0
        tensors = load_tensors(data)
        self.model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
        self.average.load_state_dict({k[8:]: v for k, v in tensors.items() if k.startswith("average.")})
        self.steps_done = int(meta["steps"])
        state = self.optimizer.state_dict()
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, number, key = name.split(".")
                state["state"].setdefault(int(number), {})[key] = value
        self.optimizer.load_state_dict(state)
        self.history = json.loads(meta["history"])
        return len(self.history)

    def _finish(self) -> None:
        best = self.best_epoch()
        weights = (self.out / f"best.{best}.safetensors").read_bytes()
        write_atomically(self.out / "weights.safetensors", weights)
        known = self.ids > 0
        result = {
            "name": self.spec.get("name", self.spec["encoder"]),
            "epoch": best,
            "history": self.history,
            "item_sizes": asdict(self.model.items.sizes),
            "encoder_sizes": asdict(self.model.sequence.sizes),
            "training_sizes": asdict(self.sizes),
            "known_items": int(known.sum()),
        }
        write_json(self.out / "history.json", result)


def train_encoder(spec: dict[str, Any], on_start: Callable[[], None] | None = None) -> str:
    """Trains one encoder and returns its output directory; to be called once in each process of a TorchDistributor.

    spec: "encoder" (gru, cnn, transformer), "name", "sequences" and "items" (paths of save_sequences and
    save_item_features), "output" (a directory that all processes share), "seed", "event_types" (their number), "roles"
    (which events may be targets), "validate" (early stopping on VALID targets), "start" (weights to begin with, absent:
    random ones), "threads" (of torch, per process) and "options" (sizes by name, see sizing; "auto" or absent follows
    its rules).

    RANK and WORLD_SIZE come from the environment; users are shared out over the ranks and gradients averaged by gloo.
    Writes progress.jsonl (lines with encoder, epoch, epochs, step, steps, loss, ndcg@10), a checkpoint per epoch, and
    at the end weights.safetensors and history.json. Killed and called again with the same spec it goes on after the
    last whole epoch and ends in the weights of an undisturbed run. ArtifactError if an input file is unreadable.
    """
    if on_start is not None:
        on_start()
    if "threads" in spec:
        torch.set_num_threads(int(spec["threads"]))
    distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if distributed:
        dist.init_process_group("gloo")
    try:
        Trainer(spec).run()
        if distributed:
            dist.barrier()
    finally:
        # Without this the exit barrier of TorchDistributor can hang for minutes.
        if distributed:
            dist.destroy_process_group()
    return str(spec["output"])
