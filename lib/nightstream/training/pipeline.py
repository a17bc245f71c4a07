"""From sequences to a model: encoders, ranker, refit. The caller supplies data, a launcher and a directory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file as load_tensors

from nightstream.errors import ArtifactError
from nightstream.files import write_json
from nightstream.models import ranking_metrics
from nightstream.models.array_files import save_item_features, save_sequences
from nightstream.models.arrays import RANK, TRAIN, VALID, Catalogue, ItemFeatures, Sequences
from nightstream.models.artifacts import load_encoders
from nightstream.models.model import Member, Model
from nightstream.models.ranking.candidate_sources import SourceSizes, fit_sources
from nightstream.models.ranking.candidates import candidates, score_block
from nightstream.models.ranking.rank_features import RankerFeatures, features
from nightstream.models.ranking.ranker import LabelledGroups, RankerSizes, train_ranker
from nightstream.models.ranking.sources.registry import SOURCES
from nightstream.models.ranking.topk import BLOCK
from nightstream.training import batching
from nightstream.training.hyperparameters import encoder_sizes, valid_limit

# The refit goes on from the weights of the first training, since the ranker must keep meeting cosines of the kind that
# it was trained on, and for a share of its epochs between these.
REFIT_SHARES = (0.2, 0.5)

Launcher = Callable[[dict[str, Any]], Any]


@dataclass(frozen=True)
class LearnSpec:
    """What learn() may be told.

    encoders: members of the ensemble, names of encoders/factory.ENCODERS. weights: of their cosines, equal if empty.
    options: sizes for every encoder (see hyperparameters), each absent or "auto" unless given. seed: of everything.
    threads: of torch in each training process. device: of those processes, cpu or cuda. parallel: encoders trained side
    by side. use_ranker: whether to train one. refit: whether to train on with the ranker's and the validation's events
    too before handing out the model.
    """

    encoders: tuple[str, ...] = ("gru", "cnn")
    weights: tuple[float, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    threads: int = 2
    device: str = "cpu"
    parallel: int = 1
    use_ranker: bool = True
    refit: bool = True
    sources: SourceSizes = field(default_factory=SourceSizes)
    ranker: RankerSizes = field(default_factory=RankerSizes)

    def __post_init__(self) -> None:
        if not self.encoders or len(set(self.encoders)) != len(self.encoders):
            raise ValueError("encoders must be named, each of them once")
        if self.weights and (len(self.weights) != len(self.encoders) or min(self.weights) <= 0):
            raise ValueError("weights must be positive, one per encoder")


def learn(
    sequences: Sequences,
    item_features: ItemFeatures,
    item_ids: Sequence[str],
    event_types: Sequence[str],
    spec: LearnSpec,
    train: Launcher,
    work_dir: str | Path,
    note: Callable[[str, dict[str, Any]], None] | None = None,
    before_refit: Callable[[Model], None] | None = None,
) -> Model:
    """Trains encoders on TRAIN targets, a ranker on RANK targets, then the encoders further on everything.

    Args:
        sequences: events with roles, in rows of the vocabulary.
        item_features: of the vocabulary, in the order of these rows.
        item_ids: likewise.
        event_types: names, in the order of the 1-based type indices.
        spec: what to learn.
        train: runs training.trainer.train_encoder(spec) in one or more processes and returns when all are done.
        work_dir: seen by those processes too; what was finished there with the same inputs is not done again.
        note: called with each stage and its facts, when the stage is over.
        before_refit: called with the model as it stands before the refit, when it has learnt from TRAIN and RANK
            targets alone.

    Returns:
        The model; validation figures stand in its metrics.

    Raises:
        ValueError: The inputs do not fit together, or two columns of the ranker would have one name.
        SettingsError: The options do not fit together.
    """
    if len(item_features) != len(item_ids):
        raise ValueError("item_features and item_ids must have one row per item each")
    if len(sequences.items) and int(sequences.items.max()) > len(item_ids):
        raise ValueError("sequences refer to items beyond item_ids")
    work = Path(work_dir)
    save_sequences(work / "sequences.safetensors", sequences)
    save_item_features(work / "items.safetensors", item_features)
    print_of = _fingerprint(work, item_ids)
    for name in spec.encoders:
        # What does not fit together is refused here, not by a process that Spark started, nor after hours.
        encoder_sizes({**spec.options, "encoder": name}, sequences, len(event_types))
    reads = RankerFeatures(spec.encoders, tuple(SOURCES))
    say = note or (lambda stage, facts: None)
    facts: dict[str, Any] = {}

    epochs: dict[str, int] = {}

    def trained(stage: str, roles: tuple[int, ...]) -> list[tuple[Member, dict[str, Any]]]:
        def one(name: str) -> tuple[Member, dict[str, Any]]:
            again = refit_epochs(epochs[name], sequences.roles) if name in epochs else None
            job = _job(spec, work, name, event_types, stage, roles, again)
            return _train(job, print_of, train, spec, item_features, sequences, roles)

        with ThreadPoolExecutor(spec.parallel) as pool:
            return list(pool.map(one, spec.encoders))

    members: list[Member] = []
    for name, (member, history) in zip(spec.encoders, trained("first", (TRAIN,)), strict=True):
        members.append(member)
        epochs[name] = history["epoch"]
        say("encoder", {"name": name, "stage": "first", "epoch": history["epoch"]})
    sources = fit_sources(sequences, len(item_ids), (TRAIN,), spec.sources)
    first = Model(item_ids, event_types, members, sources, None, False)
    catalogue = _catalogue(first, item_features, item_ids)
    valid = batching.sampled_targets(sequences, VALID, valid_limit(spec.options), spec.seed)
    facts["without_ranker"] = _measure(first, sequences, catalogue, valid)
    for name in spec.encoders:
        alone = first.only(name)
        facts[name] = _measure(alone, sequences, _catalogue(alone, item_features, item_ids), valid)

    ranker = None
    if spec.use_ranker:
        labels = batching.sampled_targets(sequences, RANK, spec.ranker.label_limit, spec.seed)
        groups = labelled_groups(first, sequences, catalogue, labels)
        held_out = labelled_groups(first, sequences, catalogue, valid)
        ranker = train_ranker(groups, held_out, reads, spec.ranker, spec.seed)
        if ranker is not None:
            ranked = Model(item_ids, event_types, members, sources, ranker)
            facts["with_ranker"] = _measure(ranked, sequences, catalogue, valid)
            # A ranker that does not help on the held-out targets must not reorder the lists.
            if facts["with_ranker"]["ndcg@10"] < facts["without_ranker"]["ndcg@10"]:
                ranker = None
        say("ranker", facts)

    about = {"validation": facts, "epochs": epochs}
    if before_refit is not None:
        before_refit(Model(item_ids, event_types, members, sources, ranker, True, about))
    if spec.refit:
        everything = (TRAIN, RANK, VALID)
        members = [member for member, _ in trained("refit", everything)]
        say("refit", {"encoders": list(spec.encoders)})
        sources = fit_sources(sequences, len(item_ids), everything, spec.sources)
    return Model(item_ids, event_types, members, sources, ranker, True, about)


def labelled_groups(model: Model, sequences: Sequences, catalogue: Catalogue, targets: np.ndarray) -> LabelledGroups:
    """The candidates of each target's user as they stood just before it, with features and the target's label."""
    rows, labels, sizes = [], [], []
    for start in range(0, len(targets), BLOCK):
        part = targets[start : start + BLOCK]
        windows = batching.windows_before(sequences, part, model.window_length)
        vectors = model.encode_users(windows, catalogue)
        table = model.table(catalogue)
        scores = score_block(windows, vectors, table, model.sources, True)
        columns = candidates(scores, table, model.sources, 0)
        values = features(scores, table, windows, model.sources, columns)
        valid = columns >= 0
        rows.append(values[valid])
        labels.append((columns == sequences.items[part][:, None] - 1)[valid])
        sizes.append(valid.sum(1))
    if not rows:
        return LabelledGroups(np.zeros((0, 0), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
    return LabelledGroups(np.concatenate(rows), np.concatenate(labels).astype(np.float32), np.concatenate(sizes))


def measure_targets(
    model: Model, sequences: Sequences, catalogue: Catalogue, targets: np.ndarray, k: int
) -> np.ndarray:
    """int64 [T]: each target event's rank in the list that its user would have had just before it, 0 = not in it."""
    windows = batching.windows_before(sequences, targets, model.window_length)
    lists = model.recommend(windows, catalogue, k, torch.get_num_threads())
    return ranking_metrics.target_ranks(lists.rows, sequences.items[targets])


def _measure(model: Model, sequences: Sequences, catalogue: Catalogue, targets: np.ndarray) -> dict[str, float]:
    ranks = measure_targets(model, sequences, catalogue, targets, 10)
    return {
        "hr@10": ranking_metrics.hit_rate(ranks, 10),
        "ndcg@10": ranking_metrics.ndcg(ranks, 10),
        "targets": len(ranks),
    }


def _catalogue(model: Model, item_features: ItemFeatures, item_ids: Sequence[str]) -> Catalogue:
    return Catalogue(list(item_ids), model.encode_items(item_features, item_ids), np.ones(len(item_ids), bool))


def refit_epochs(best: int, roles: np.ndarray) -> int:
    """Epochs of the refit after a first training that was best after `best`: the share of them is twice that of the
    events (roles: [E]) that the first training did not have as targets, within REFIT_SHARES."""
    return max(1, round(best * float(np.clip(2 * (roles != TRAIN).mean(), *REFIT_SHARES))))


def _fingerprint(work: Path, item_ids: Sequence[str]) -> str:
    digest = hashlib.sha256(json.dumps(list(item_ids)).encode())
    for name in ("sequences.safetensors", "items.safetensors"):
        digest.update((work / name).read_bytes())
    return digest.hexdigest()


def _job(
    spec: LearnSpec,
    work: Path,
    name: str,
    event_types: Sequence[str],
    stage: str,
    roles: tuple[int, ...],
    refit: int | None,
) -> dict[str, Any]:
    options = dict(spec.options)
    if refit is not None:
        options["epochs"] = refit
    job = {
        "encoder": name,
        "name": f"{name}-{stage}",
        "sequences": str(work / "sequences.safetensors"),
        "items": str(work / "items.safetensors"),
        "output": str(work / f"{stage}-{name}"),
        "seed": spec.seed,
        "event_types": len(event_types),
        "roles": list(roles),
        "validate": refit is None,
        "threads": spec.threads,
        "device": spec.device,
        "options": options,
    }
    if refit is not None:
        job["start"] = str(work / f"first-{name}" / "weights.safetensors")
    return job


def _train(
    job: dict[str, Any],
    fingerprint: str,
    train: Launcher,
    spec: LearnSpec,
    item_features: ItemFeatures,
    sequences: Sequences,
    roles: tuple[int, ...],
) -> tuple[Member, dict[str, Any]]:
    out = Path(job["output"])
    job = {**job, "data": fingerprint}
    mark = out / "done.json"
    kept = {k: v for k, v in job.items() if k not in ("threads", "device")}
    if not (mark.exists() and json.loads(mark.read_text()) == kept):
        train(job)
        write_json(mark, kept)
    try:
        history = json.loads((out / "history.json").read_text())
        tensors = load_tensors(str(out / "weights.safetensors"))
    except OSError as error:
        raise ArtifactError(f"training of {job['name']} left no result in {out}: {error}") from error
    items, sequence = load_encoders(history["item_sizes"], history["encoder_sizes"], tensors)
    used = np.isin(sequences.roles, np.asarray(roles, np.int8))
    trained = np.bincount(sequences.items[used], minlength=len(item_features) + 1)[1:] > 0
    weights = spec.weights or (1.0,) * len(spec.encoders)
    weight = weights[spec.encoders.index(job["encoder"])] / sum(weights)
    return Member(job["encoder"], items, sequence, weight, trained), history
