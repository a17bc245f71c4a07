"""Publish a trained model version in one commit, unless the gate rejects it; naming an older one rolls back to it."""

from __future__ import annotations

import logging
from datetime import datetime
from typing import Any

from pyspark.sql import SparkSession

from nightstream.errors import RejectedError, TableError
from nightstream.evaluation import gate
from nightstream.monitoring import measurements
from nightstream.runtime.settings import Settings
from nightstream.serving import catalogue
from nightstream.store import registry
from nightstream.store.storage import Storage

log = logging.getLogger(__name__)


def run(spark: SparkSession, settings: Settings, as_of: datetime, version: str | None = None) -> dict[str, Any]:
    """Publish `version` without asking the gate, whatever it has said of it before: a person decides. Without a
    version, publish the newest trained one that is not rejected, through the gate (see through_gate).

    The version's artifacts and embeddings are read first, so that one that cannot serve is never published. Raises
    TableError or ArtifactError, and then nothing has changed.
    """
    storage = Storage(spark, settings.storage)
    if version is not None:
        return _published(storage, version, as_of)
    trained = registry.candidate(storage)
    if trained is None:
        raise TableError("no trained model to publish that is not rejected; run the train job first")
    return through_gate(storage, settings, as_of, trained.model_version)


def through_gate(storage: Storage, settings: Settings, as_of: datetime, version: str) -> dict[str, Any]:
    """Publish a trained version unless it is worse than the published one (see gate); the numbers go to `metrics`.

    Raises RejectedError: the version then has a row `rejected` with the numbers, and what serves has not changed.
    """
    verdict = gate.judge(storage, settings, version)
    measurements.write(storage, verdict.numbers, version, as_of, {"outcome": verdict.outcome})
    if verdict.outcome == gate.REJECTED:
        registry.reject(storage, version, as_of, verdict.numbers)
        raise RejectedError(
            f"model {version} was not published: {verdict.reason}; it is kept as rejected, "
            f"publish --version {version} would let it serve all the same"
        )
    log.info("the gate lets the model pass: %s", verdict.reason, extra={"model": version, "outcome": verdict.outcome})
    return _published(storage, version, as_of) | {"gate": {"outcome": verdict.outcome, "reason": verdict.reason}}


def _published(storage: Storage, version: str, as_of: datetime) -> dict[str, Any]:
    catalogue.load_bundle(storage, version).load()
    row = registry.publish(storage, version, as_of)
    return {"model_version": row.model_version, "metrics": row.metrics}
