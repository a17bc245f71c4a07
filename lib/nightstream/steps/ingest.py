"""Ingest: the batch sources' events, items and users into their tables."""

from __future__ import annotations

import logging
from typing import Any

from pyspark.sql import SparkSession

from nightstream.errors import WriterBusyError
from nightstream.ingest import changes, dimensions, formats, ledger, rejections, sources
from nightstream.runtime import clock
from nightstream.runtime.settings import Settings
from nightstream.store.lease import Lease, this_process
from nightstream.store.storage import Storage
from nightstream.store.tables import ITEMS, USERS

log = logging.getLogger(__name__)
KIND = "ingest"


def run(spark: SparkSession, settings: Settings, beside_stream: bool = False) -> dict[str, Any]:
    """Ingest all sources; running it again over the same sources adds nothing.

    One process at a time records events: two could both take one for new. beside_stream: where another process records,
    leave the batch source's events for a later run, and say so under "left_to", rather than fail.

    Items and users are merged by id: new descriptions replace old ones, and what left the source stays (an item goes
    out of service by available = false). No table is touched before every source has proved readable.
    Returns {"events": rows by table name, "added": likewise, of this run, "items": {"rows", "left_out"}, "users": …}.
    Raises SourceError for a bad source, TableError unless raw_events = events + quarantine + duplicates afterwards,
    WriterBusyError where another process writes (items and users are merged then; their rows do not depend on it).
    """
    storage = Storage(spark, settings.storage)
    rules = settings.events
    arrived = ledger.parsed(sources.read_events(spark, settings.sources.events), settings)
    items = users = None
    if settings.sources.items is not None:
        items = dimensions.items(spark, settings.sources.items, rules.max_id_length)
    if settings.sources.users is not None:
        users = dimensions.users(spark, settings.sources.users, rules.max_id_length, settings.serving.default_user)
    for name, file in formats.recbole_siblings(settings.sources.events.path).items():
        if getattr(settings.sources, name) is None:
            log.warning("%s lies beside the events but is not used; add --set sources.%s.path=%s", file, name, file)
    storage.create(ITEMS, USERS)
    described: dict[str, Any] = {}
    for name, spec, dimension in (("items", ITEMS, items), ("users", USERS, users)):
        if dimension is not None:
            dimensions.merge(storage, spec, dimension.rows, settings.serving.merge_attempts)
        described[name] = {
            "rows": storage.read(spec).count(),
            "left_out": {} if dimension is None else dimension.left_out,
        }
    attempts, seconds = settings.serving.merge_attempts, settings.serving.lease_seconds
    try:
        with Lease(storage, this_process(), KIND, seconds, attempts, wait=True):
            # First, so that a crash between the two loses nothing.
            changes.mark(storage, settings.sources.events.path, clock.utc_now())
            recorded = ledger.record(storage, arrived, settings)
            recorded.release()
            if rejected := recorded.added["quarantine"]:
                log.warning(
                    "%d of %d new payloads were rejected; in all, %s",
                    *(rejected, recorded.added["raw_events"], rejections.summary(storage)),
                )
            return {"events": ledger.check(storage), "added": recorded.added, **described}
    except WriterBusyError as busy:
        if not beside_stream:
            raise
        log.warning("the events of %s are left for a later night: %s", settings.sources.events.path, busy)
        return {"left_to": str(busy), **described}
