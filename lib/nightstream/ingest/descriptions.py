"""Items and users, as their sources describe them, in their tables."""

from __future__ import annotations

import logging

from pyspark.sql import DataFrame

from nightstream.ingest import dimensions, formats
from nightstream.runtime.settings import Settings
from nightstream.store.storage import Storage
from nightstream.store.tables import ITEMS, TableSpec

log = logging.getLogger(__name__)


def merge(storage: Storage, spec: TableSpec, rows: DataFrame, attempts: int) -> None:
    """Take the rows up into ITEMS or USERS by id: new descriptions replace old ones, what the rows lack stays."""
    (key,) = spec.keys
    # Maps cannot be compared, their JSON can: rows that did not change are not written again.
    columns = ", ".join(f"old.{c} AS {c}" for c in spec.schema.names)
    changed = f"to_json(struct({columns})) <> to_json(struct({columns.replace('old.', 'new.')}))"

    def run() -> None:
        merge = storage.table(spec).alias("old").merge(rows.alias("new"), f"old.{key} = new.{key}")
        merge.whenMatchedUpdateAll(condition=changed).whenNotMatchedInsertAll().execute()

    storage.with_retries(run, attempts, spec.name)


class ItemsSource:
    """The items source of a running stream, read again whenever its files or its table have changed."""

    def __init__(self, storage: Storage, settings: Settings) -> None:
        self.storage, self.settings = storage, settings
        self._taken_up: str | None = None

    def take_up(self) -> None:
        """Merge the source into ITEMS where it has changed since the last call.

        A source that cannot be read is no reason to stop the events: it is logged and tried again at the next call.
        """
        source, spark = self.settings.sources.items, self.storage.spark
        if source is None:
            return
        try:
            # Before it is read: what changes meanwhile is read at the next call.
            state = formats.fingerprint(spark, source.format, source.path)
            if state == self._taken_up:
                return
            found = dimensions.items(spark, source, self.settings.events.max_id_length)
            merge(self.storage, ITEMS, found.rows, self.settings.serving.merge_attempts)
            self._taken_up = state
        except Exception as error:
            log.warning("the items stay as they were until their source can be read", extra={"error": str(error)[:300]})
