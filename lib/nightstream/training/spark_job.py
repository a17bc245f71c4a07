"""From Spark to the learner and back: events with roles become arrays on disk, a model comes out as files."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from pyspark.ml.torch.distributor import TorchDistributor
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from nightstream.errors import SettingsError
from nightstream.models.arrays import Sequences, UserFeatures
from nightstream.models.arrow import combined, rows_of
from nightstream.models.artifacts import to_artifacts
from nightstream.models.bundle import FEATURES_FILE
from nightstream.models.encoders.content import NO_TEXT
from nightstream.models.encoders.factory import CONTENT_ENCODERS, ENCODERS
from nightstream.models.features import FeatureStatistics, transform_items, transform_users
from nightstream.models.model import Model
from nightstream.models.ranking.ranker import RankerSizes
from nightstream.models.ranking.sources.base import SourceSizes
from nightstream.runtime import console
from nightstream.runtime.settings import Settings
from nightstream.training import device, splits
from nightstream.training.feature_statistics import fit as fit_statistics
from nightstream.training.pipeline import LearnSpec, learn
from nightstream.training.trainer import train_encoder

TAIL_SECONDS = 0.3

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fitted:
    """A model as files, its validation metrics, one history entry per encoder and epoch, and the files of the model as
    it stood before the refit, when it had not learnt from the validation events."""

    files: dict[str, bytes]
    metrics: dict[str, float]
    history: list[dict[str, Any]]
    before_refit: dict[str, bytes]


def fit(settings: Settings, events: DataFrame, items: DataFrame, users: DataFrame, name: str) -> Fitted:
    """Learn a model from events with `role` (see splits); those of role TEST must have been taken out.

    events: live EVENTS rows of the types that enter a window. items: ITEMS rows of the whole catalogue.
    name: of the scratch folder below storage.work_dir; it is removed at the end and resumed from after a crash.
    MachineError if training.device is cuda and there is no GPU for each process.
    """
    spark = events.sparkSession
    spec = replace(learn_spec(settings), device=_device(settings, spark))
    work = settings.storage.scratch(name)
    work.mkdir(parents=True, exist_ok=True)
    events = _newest(events, settings.training.max_events)
    statistics = fit_statistics(items, users, events, settings.events.window_types, settings.features)
    # The catalogue must fit into every worker, so it fits here.
    catalogue = items.select("item_id", "title", "text", "categories", "numbers").toArrow().sort_by("item_id")
    item_ids = catalogue["item_id"].combine_chunks()
    _write(events, users, work)
    sequences = _sequences(work, item_ids, statistics)
    earlier: list[Model] = []
    with console.training_bar() as update:
        model = learn(
            sequences,
            transform_items(catalogue, statistics),
            item_ids.to_pylist(),
            list(statistics.event_types),
            spec,
            _launcher(settings, _uses_spark_gpus(settings, spec.device, spark), update),
            work / "learning",
            before_refit=earlier.append,
        )
    history = _history(work / "learning")
    shutil.rmtree(work)
    features = {FEATURES_FILE: statistics.to_json().encode()}
    before_refit = to_artifacts(earlier[0]) | features
    return Fitted(to_artifacts(model) | features, _flat(model.metrics), history, before_refit)


def learn_spec(settings: Settings) -> LearnSpec:
    """What the settings tell the learner; on the CPU, whatever they say of GPUs.

    Raises SettingsError for an encoder, of sequences or of text, that nobody has registered.
    """
    training, retrieval, ranking = settings.training, settings.retrieval, settings.ranking
    unknown = [name for name in training.encoders if name not in ENCODERS]
    problems = []
    if unknown:
        problems.append(f"training.encoders: {', '.join(unknown)} not known; choose among {', '.join(ENCODERS)}")
    texts = ("auto", *CONTENT_ENCODERS, NO_TEXT)
    if training.options.text not in texts:
        problems.append(f"training.options.text: {training.options.text} not known; choose among {', '.join(texts)}")
    if problems:
        raise SettingsError(problems)
    return LearnSpec(
        encoders=training.encoders,
        options=_options(settings),
        seed=training.seed,
        threads=training.threads,
        parallel=training.parallel_encoders,
        sources=SourceSizes(
            reach=retrieval.reach,
            neighbours=retrieval.neighbours,
            shrink=retrieval.shrink,
            history=retrieval.history,
            half_life_days=retrieval.half_life_days,
            trend_half_life_days=retrieval.trend_half_life_days,
            prior_events=retrieval.prior_events,
            recency=retrieval.recency,
        ),
        ranker=RankerSizes(
            depth=ranking.depth,
            learning_rate=ranking.learning_rate,
            trees=ranking.trees,
            patience=ranking.patience,
            min_child_weight=ranking.min_child_weight,
            column_share=ranking.column_share,
            row_share=ranking.row_share,
            l2=ranking.l2,
            label_limit=ranking.label_limit,
            threads=ranking.threads,
        ),
    )


def _options(settings: Settings) -> dict[str, Any]:
    """The sizes that hyperparameters reads, by name; "auto" where its rules choose."""
    given = settings.training.options
    return {
        "window": settings.window.length,
        "epochs": settings.training.epochs,
        "width": given.width,
        "hidden": given.hidden,
        "layers": given.layers,
        "heads": given.heads,
        "span": given.span,
        "dropout": given.dropout,
        "text": given.text,
        "id_dropout": given.id_dropout,
        "learning_rate": given.learning_rate,
        "weight_decay": given.weight_decay,
        "positions": given.positions,
        "negatives": given.negatives,
        "scale": given.scale,
        "patience": given.patience,
        "valid_limit": given.valid_limit,
    }


def _history(work: Path) -> list[dict[str, Any]]:
    """One entry per training run and epoch: encoder, stage (the folder's name), epoch, loss, validation NDCG@10."""
    entries: list[dict[str, Any]] = []
    for path in sorted(work.glob("**/history.json")):
        encoder_run = json.loads(path.read_text())
        entries += [
            {"encoder": encoder_run["name"], "stage": path.parent.name, **epoch} for epoch in encoder_run["history"]
        ]
    return entries


def _flat(metrics: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested figures -> dotted names."""
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": float(value)}
    return flat


def _newest(events: DataFrame, limit: int) -> DataFrame:
    """The newest `limit` events, by a time threshold: what one training process can hold."""
    count = events.count()
    if count <= limit:
        return events
    since = splits.quantile_time(events, 1 - limit / count) or 0
    return events.where(F.unix_micros("event_time") > since)


def _write(events: DataFrame, users: DataFrame, work: Path) -> None:
    columns = ["user_id", "item_id", "event_type", "event_time", "value", "role"]
    ordered = events.select(*columns, "event_id").orderBy("user_id", "event_time", "event_id").select(*columns)
    ordered.write.mode("overwrite").parquet(str(work / "events"))
    known = users.join(events.select("user_id").distinct(), "user_id", "left_semi")
    known.select("user_id", "categories", "numbers").write.mode("overwrite").parquet(str(work / "users"))


def _read(folder: Path) -> pa.Table:
    """The Parquet files that Spark wrote, in their order, which is the order of a global sort."""
    return pa.concat_tables([pq.read_table(f) for f in sorted(folder.glob("part-*.parquet"))]).combine_chunks()


def _sequences(work: Path, item_ids: pa.Array, statistics: FeatureStatistics) -> Sequences:
    table = _read(work / "events")
    users = table["user_id"].combine_chunks()
    starts = np.concatenate([[0], np.flatnonzero(np.asarray(pc.not_equal(users[1:], users[:-1]))) + 1])
    types = pa.array(statistics.event_types, pa.string())
    return Sequences(
        offsets=np.concatenate([starts, [len(users)]]).astype(np.int64),
        items=rows_of(combined(table["item_id"]), item_ids).astype(np.int32),
        types=rows_of(combined(table["event_type"]), types).astype(np.int32),
        times=np.asarray(table["event_time"].cast(pa.timestamp("us")).cast(pa.int64())),
        values=statistics.scale_values(table["value"].combine_chunks()),
        roles=np.asarray(table["role"], dtype=np.int8),
        users=_user_features(work, users.take(pa.array(starts)), statistics),
    )


def _user_features(work: Path, user_ids: pa.Array, statistics: FeatureStatistics) -> UserFeatures:
    described = _read(work / "users")
    place = pc.index_in(user_ids, value_set=described["user_id"].combine_chunks())
    return transform_users(described.select(["categories", "numbers"]).take(place), statistics)


def _device(settings: Settings, spark: SparkSession) -> str:
    """cpu or cuda, by training.device and the GPUs that there are. Raises MachineError where cuda is set in vain."""
    training = settings.training
    if not training.local_mode:
        # A task gets as many GPUs as Spark was told to give it.
        gpus = training.processes if _gpus(spark, "task") else 0
    else:
        gpus = torch.cuda.device_count()
        if _gpus(spark, "driver"):
            gpus = min(gpus, _gpus(spark, "driver"))
    chosen = device.choose(training.device, gpus, training.processes)
    if chosen == "cpu" and gpus and training.device == "auto":
        log.warning("training on the CPU: there are %d GPUs for %d processes", gpus, training.processes)
    return chosen


def _uses_spark_gpus(settings: Settings, chosen: str, spark: SparkSession) -> bool:
    """Whether Spark hands out the GPUs; on a driver that it gave none, each process takes the one of its rank."""
    return chosen == "cuda" and (not settings.training.local_mode or _gpus(spark, "driver") > 0)


def _gpus(spark: SparkSession, owner: str) -> int:
    return int(float(spark.conf.get(f"spark.{owner}.resource.gpu.amount", "0") or 0))


def _launcher(
    settings: Settings, use_gpu: bool, update: Callable[[dict[str, Any]], None]
) -> Callable[[dict[str, Any]], Any]:
    training = settings.training

    def train(spec: dict[str, Any]) -> Any:
        """One encoder, trained through Spark; what the processes write to progress.jsonl is shown as it comes."""
        done = threading.Event()
        path = Path(spec["output"]) / "progress.jsonl"
        watcher = threading.Thread(target=_follow, args=(path, update, done), daemon=True)
        watcher.start()
        # Spinning at OpenMP's barriers makes two threads slower than one on a machine that does anything else.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        try:
            distributor = TorchDistributor(
                num_processes=training.processes, local_mode=training.local_mode, use_gpu=use_gpu
            )
            # It sets its own level when it is made.
            logging.getLogger("TorchDistributor").setLevel(logging.WARNING)
            return distributor.run(train_encoder, spec)
        finally:
            done.set()
            watcher.join()

    return train


def _follow(path: Path, update: Callable[[dict[str, Any]], None], done: threading.Event) -> None:
    position = path.stat().st_size if path.exists() else 0
    while True:
        last = done.wait(TAIL_SECONDS)
        if path.exists():
            with path.open() as lines:
                lines.seek(position)
                for line in iter(lines.readline, ""):
                    if not line.endswith("\n"):
                        break
                    position += len(line)
                    update(json.loads(line))
        if last:
            return
