"""What a running stream takes up beside its events: a newly published model, and new, updated and withdrawn items."""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor

from nightstream.ingest.dimensions import ItemsSource
from nightstream.models.bundle import Bundle
from nightstream.runtime.settings import Settings
from nightstream.serving import catalogue
from nightstream.store import registry
from nightstream.store.storage import Storage
from nightstream.store.tables import ITEMS, MODELS

log = logging.getLogger(__name__)


class Snapshots:
    """Looks at the items source and at the tables models and items, every `stream.snapshot_seconds`.

    It looks while micro-batches run, so that none waits for it; where the setting is 0, each micro-batch waits. The
    night may merge the items source at the same time: both write the same rows, and a MERGE that meets the other is
    tried again.
    """

    def __init__(self, storage: Storage, settings: Settings) -> None:
        self.storage, self.settings = storage, settings
        self._items_source = ItemsSource(storage, settings)
        self._seen_commits: tuple[int | None, int | None] | None = None
        self._looked_at = time.monotonic()
        self._pool = ThreadPoolExecutor(1, "snapshot")
        # What serves when it begins, and what it finds.
        self._look: tuple[Bundle, Future[Bundle | None]] | None = None

    def first(self) -> Bundle:
        """The published model with its catalogue as it is. Raises TableError where none is published."""
        return catalogue.load_bundle(self.storage, registry.published(self.storage).model_version)

    def take(self, bundle: Bundle) -> tuple[bool, Bundle | None]:
        """Whether a look has ended since the last call, and what it found, see `newer`. Begins one where it is time.

        Raises what the look has met.
        """
        waits = self.settings.stream.snapshot_seconds
        if self._look is None and time.monotonic() - self._looked_at >= waits:
            self._look = bundle, self._pool.submit(self._newer_at_hand, bundle)
        if self._look is None or (waits and not self._look[1].done()):
            return False, None
        (served, look), self._look, self._looked_at = self._look, None, time.monotonic()
        newer = look.result()
        if served is not bundle:
            # Another one serves since, from which to a later look may have to lead.
            self._seen_commits = None
            return True, None
        return True, newer

    def close(self) -> None:
        """Look no more, and wait for the look that runs."""
        self._pool.shutdown(cancel_futures=True)

    def _newer_at_hand(self, bundle: Bundle) -> Bundle | None:
        newer = self.newer(bundle)
        if newer is not None:
            newer.load()
        return newer

    def newer(self, bundle: Bundle) -> Bundle | None:
        """What should serve from now on instead of `bundle`; None where that is up to date.

        Items that are new, or that have another content than before, are encoded under the published model first.
        """
        storage = self.storage
        self._items_source.take_up()
        commits = (storage.version(MODELS), storage.version(ITEMS))
        if commits == self._seen_commits:
            return None
        version = registry.published(storage).model_version
        model = bundle if version == bundle.model_version else catalogue.load_bundle(storage, version)
        attempts = self.settings.serving.merge_attempts
        catalogue.embed_changed(storage, storage.read_or_empty(ITEMS), model, attempts)
        newest = catalogue.load_bundle(storage, version, model.files)
        # What was committed while this ran is looked at next time.
        self._seen_commits = commits
        if _versions(newest) == _versions(bundle):
            return None
        log.info("new snapshot", extra={"model": newest.model_version, "catalogue": newest.catalogue_version})
        return newest


def _versions(bundle: Bundle) -> tuple[str, str]:
    return bundle.model_version, bundle.catalogue_version
