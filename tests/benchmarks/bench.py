"""One data set under one protocol, and what each model reaches on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import recbole_client
from als import SparkALS
from baselines import Baseline, Fusion, Histories, ItemKNN, Popular, best_rows, popularity, tuned
from measuring import VALID_LIMIT, BaselineLister, Log, log_of, records
from nightstream.evaluation import offline, protocol
from nightstream.models.arrays import RANK, TRAIN, VALID
from nightstream.models.artifacts import from_artifacts, to_artifacts
from nightstream.models.bundle import FEATURES_FILE
from nightstream.runtime import console
from nightstream.runtime.settings import Settings
from nightstream.training import batching
from pyspark.sql import DataFrame, SparkSession
from sasrec import SASRec

BASELINES = ("popular", "item-knn", "als", "sasrec", "fusion")
FUSED = ("item-knn", "als", "sasrec")
ENCODERS = ("cnn", "gru", "transformer")
NAMES = (*BASELINES, *recbole_client.MODELS, *ENCODERS, "default")
# What no seed changes is measured once.
WITHOUT_SEED = ("popular", "item-knn")
EVERYTHING = (TRAIN, RANK, VALID)
GRIDS: dict[str, dict[str, tuple[Any, ...]]] = {
    "popular": {},
    "item-knn": {"decay": (0.9, 1.0, 0.8, 0.6, 0.4), "neighbours": (200, 50, 1000), "shrink": (0.0, 10.0, 30.0)},
    "als": {"alpha": (1.0, 0.3, 10.0), "regularisation": (0.1, 0.01, 0.001), "rank": (32, 64, 128)},
    "sasrec": {"dropout": (0.5, 0.2)},
}


@dataclass
class Bench:
    """One data set under one protocol, with everything that its models share."""

    spark: SparkSession
    settings: Settings
    data: str
    protocol: protocol.Protocol
    delays_s: Sequence[float]
    predictions: Path | None = None
    recbole: str | None = None
    results: list[dict[str, Any]] = field(default_factory=list)
    by_users: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.parts = protocol.split(self.spark, self.settings, self.protocol)
        self.catalogue_size = self.parts.items.count()
        self._log: Log | None = None
        self._options: dict[str, dict[str, Any]] = {}
        self._fitted: dict[tuple[str, int], Baseline] = {}

    @property
    def log(self) -> Log:
        """The history as arrays; only baselines need it."""
        if self._log is None:
            self._log = log_of(self.parts)
        return self._log

    def run(self, name: str, seed: int) -> None:
        """Measures one model, one encoder with and without the ranker, or the default."""
        if name not in (*ENCODERS, "default"):
            self._baseline(name, seed)
        else:
            self._ours(name, seed)

    def _baseline(self, name: str, seed: int) -> None:
        log = self.log
        start = time.monotonic()
        fallback = popularity(log.events, log.size, EVERYTHING)

        def best(user_ids: pa.Array, histories: Histories) -> tuple[np.ndarray, np.ndarray]:
            if name in recbole_client.MODELS:
                return recbole_client.best_rows(str(self.recbole), name, seed, log, fallback, user_ids, histories)
            return best_rows(self.fitted(name, seed), histories, fallback, offline.LIST_LENGTH)

        types = self.settings.events.window_types
        lister = BaselineLister(self.spark, best, log.item_ids, self.parts.users, types)
        self._judge(protocol.judged(self.parts, lister, self.delays_s), name, False, seed, start)

    def fitted(self, name: str, seed: int) -> Baseline:
        """The baseline, its options tuned with the first seed, fitted to the whole history with this one."""
        if (name, seed) not in self._fitted:
            log = self.log
            if name == "fusion":
                models = [self.fitted(n, seed) for n in FUSED]
                return Fusion(models, popularity(log.events, log.size, EVERYTHING))
            make = self._maker(name, seed)
            if name not in self._options:
                targets = batching.sampled_targets(log.events, VALID, VALID_LIMIT, seed)
                self._options[name] = tuned(make, GRIDS[name], log.events, log.size, targets, console.say)
                console.say(f"{name}: {self._options[name] or 'nothing to tune'}")
            model = make(**self._options[name])
            model.fit(log.events, log.size, EVERYTHING)
            self._fitted[name, seed] = model
        return self._fitted[name, seed]

    def _maker(self, name: str, seed: int) -> Callable[..., Baseline]:
        if name == "als":
            return lambda **options: SparkALS(self.spark, seed=seed, **options)
        if name == "sasrec":
            return lambda **options: SASRec(seed=seed, **options)
        return {"popular": Popular, "item-knn": ItemKNN}[name]

    def _ours(self, name: str, seed: int) -> None:
        start = time.monotonic()
        training = self.settings.training.model_copy(update={"seed": seed})
        if name != "default":
            # One encoder gets the cores that the default shares out.
            threads = training.threads * training.parallel_encoders
            training = training.model_copy(update={"encoders": (name,), "threads": threads})
        own = self.settings.model_copy(update={"training": training})
        fitted = protocol.fit(own, self.parts)
        files = fitted.files
        trained = time.monotonic()
        console.say(f"{name} trained in {trained - start:.0f} s: {told(fitted.metrics)}")
        self._judge(self._served(own, files), name, True, seed, start)
        model = from_artifacts({n: data for n, data in files.items() if n != FEATURES_FILE})
        if model.ranker is None:
            console.say(f"{name}: the ranker was no better on validation, so the lists are the encoders' own")
        if name != "default":
            bare = to_artifacts(model.only(name)) | {FEATURES_FILE: files[FEATURES_FILE]}
            # Both rows share one training, and the time of each counts it.
            self._judge(self._served(own, bare), name, False, seed, time.monotonic() - (trained - start))

    def _served(self, own: Settings, files: dict[str, bytes]) -> DataFrame:
        return protocol.judged(self.parts, protocol.served(own, self.parts, files), self.delays_s)

    def _judge(self, rows: DataFrame, name: str, ranker: bool, seed: int, start: float) -> None:
        rows = rows.persist()
        found = offline.scores(rows, self.catalogue_size)
        elapsed = time.monotonic() - start
        if self.predictions is not None:
            file = f"{name}{'-ranker' if ranker and name != 'default' else ''}-{seed}.parquet"
            protocol.write_predictions(offline.predictions(rows), str(self.predictions / file))
        rows.unpersist()
        self.results += records(found, self.data, self.protocol, name, ranker, seed, elapsed)
        self.by_users += [{**row, "model": name, "ranker": ranker, "seed": seed} for row in found]
        for row in (r for r in found if r["users"] == "all"):
            figures = f"HR@10 {row['hr@10']:.4f}, NDCG@10 {row['ndcg@10']:.4f}"
            label = f"{name}{' with ranker' if ranker else ''}, seed {seed}, {delay_text(row['delay_s'])}"
            console.say(f"{label}: {figures} ({elapsed:.0f} s)")


def delay_text(delay_s: float | None) -> str:
    return "frozen" if delay_s is None else f"{delay_s:g} s"


def told(metrics: Mapping[str, float]) -> str:
    """The validation NDCG@10 of a fitted model's parts."""
    parts = {key.split(".")[1]: value for key, value in metrics.items() if key.endswith(".ndcg@10")}
    return "validation NDCG@10 " + ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in parts.items())
