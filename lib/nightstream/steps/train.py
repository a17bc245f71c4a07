"""Train the encoders and the ranker on the events so far, write the model's artifacts and its item embeddings."""

from __future__ import annotations

import logging
from datetime import datetime
from typing import Any

from pyspark.sql import SparkSession

from nightstream.errors import TableError
from nightstream.evaluation import gate
from nightstream.ingest import rejections
from nightstream.ingest.history import entering, live
from nightstream.models.bundle import Bundle
from nightstream.monitoring import measurements
from nightstream.runtime.settings import Settings
from nightstream.serving import catalogue
from nightstream.store import registry
from nightstream.store.storage import Storage
from nightstream.store.tables import EVENTS, ITEM_EMBEDDINGS, ITEMS, MODELS, USERS
from nightstream.training import spark_job, splits

log = logging.getLogger(__name__)


def run(spark: SparkSession, settings: Settings, as_of: datetime) -> dict[str, Any]:
    """Train version `as_of`; nothing that serves changes until that version is published.

    Raises TableError where there are no events. Killed and run again with the same as_of, it resumes. A version that is
    complete is not trained again: it may serve, and what serves must not change under its name.
    """
    storage = Storage(spark, settings.storage)
    version = registry.version_name(as_of, settings.training.seed)
    complete = registry.newest(storage, version=version) if storage.exists(MODELS) else None
    if complete is not None:
        log.warning("model %s is trained already; to train anew, name another time or seed", version)
        return {"model_version": version, "metrics": complete.metrics}
    events = live(storage.read(EVENTS), settings.events.retraction_type)
    consumed = entering(events, settings.events.window_types)
    if consumed.isEmpty():
        rejected = rejections.summary(storage)
        remedy = "ingest some" if rejected is None else f"{rejected}; mend the source, or the settings that read it"
        raise TableError(f"the table events has no event that enters a window (events.window_types); {remedy}")
    roles = splits.by_time(consumed, settings.training.validation_fraction, settings.training.ranking_fraction)
    items = catalogue.known_items(storage.read_or_empty(ITEMS), events)
    fitted = spark_job.fit(settings, roles, items, storage.read_or_empty(USERS), "training")
    kept = gate.artifacts(fitted.before_refit, *splits.held_out_after(roles))
    registry.save_artifacts(storage, version, fitted.files | kept)
    bundle = Bundle(version, "", fitted.files, catalogue.NO_ITEMS)
    embedded = catalogue.embed(items, bundle)
    # A running stream may replace the embeddings of updated items at the same time.
    storage.with_retries(
        lambda: storage.overwrite(ITEM_EMBEDDINGS, embedded, where=f"model_version = '{version}'"),
        settings.serving.merge_attempts,
        ITEM_EMBEDDINGS.name,
    )
    measurements.write(storage, fitted.metrics, version, as_of, {})
    registry.record(
        storage, version, registry.TRAINED, as_of, settings.model_dump(mode="json"), fitted.metrics, fitted.history
    )
    return {"model_version": version, "metrics": fitted.metrics}
