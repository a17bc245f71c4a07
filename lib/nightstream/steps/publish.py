"""Publish a trained model version in one commit; naming an older version rolls back to it."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pyspark.sql import SparkSession

from nightstream import catalogue, registry
from nightstream.errors import TableError
from nightstream.settings import Settings
from nightstream.storage import Storage


def run(spark: SparkSession, settings: Settings, as_of: datetime, version: str | None = None) -> dict[str, Any]:
    """Publish `version`, or the newest trained one. Its artifacts and embeddings are read first, so that a version
    that cannot serve is never published. Raises TableError or ArtifactError, and then nothing has changed."""
    storage = Storage(spark, settings.storage)
    if version is None:
        trained = registry.newest(storage, registry.TRAINED)
        if trained is None:
            raise TableError("no trained model to publish; run the train job first")
        version = trained.model_version
    catalogue.load_payload(storage, version).load()
    row = registry.publish(storage, version, as_of)
    return {"model_version": row.model_version, "metrics": row.metrics}
