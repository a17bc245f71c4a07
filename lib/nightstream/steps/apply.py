"""Bring every user's vector and list to the published model, unless a running stream does that itself."""

from __future__ import annotations

import logging
from datetime import datetime
from typing import Any

from pyspark.sql import SparkSession

from nightstream.errors import WriterBusyError
from nightstream.ingest import changes
from nightstream.runtime import clock
from nightstream.runtime.settings import Settings
from nightstream.serving import batch_layer, catalogue, commits
from nightstream.store import registry
from nightstream.store.lease import Lease, this_process
from nightstream.store.storage import Storage
from nightstream.store.tables import ITEMS

log = logging.getLogger(__name__)
KIND = "nightly"


def run(spark: SparkSession, settings: Settings, as_of: datetime) -> dict[str, Any]:
    """Refresh all known users under the published model and merge.

    One process at a time writes the serving tables. While a stream holds the lease, this step leaves the work to it:
    the stream takes over `stream.handover_slice` users with each micro-batch.
    """
    storage = Storage(spark, settings.storage)
    serving_settings = settings.serving
    attempts = serving_settings.merge_attempts
    held = Lease(storage, this_process(), KIND, serving_settings.lease_seconds, attempts, wait=True)
    try:
        with held:
            commits.merge_tail(storage, commits.Layout.of(storage, serving_settings.top_k), attempts)
            version = registry.published(storage).model_version
            bundle = catalogue.load_bundle(storage, version)
            # A model that goes on serving, or serves again, has not met what is newer than it among the items.
            if catalogue.embed_changed(storage, storage.read_or_empty(ITEMS), bundle, attempts):
                bundle = catalogue.load_bundle(storage, version, bundle.files)
            writer = f"nightly {as_of:%Y%m%dT%H%M%S} {version}"
            users = batch_layer.apply_all(storage, settings, bundle, writer, 0, clock.utc_now())
            changes.unmark(storage)
    except WriterBusyError as busy:
        log.info("another process writes the serving tables and will apply the model", extra={"reason": str(busy)})
        return {"users": 0, "left_to": str(busy)}
    return {"users": users, "model_version": version}
