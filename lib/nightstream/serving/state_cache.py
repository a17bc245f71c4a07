"""What the tables know of the users of a micro-batch, for the one process that writes the serving tables."""

from __future__ import annotations

import logging
import shutil
import threading
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import functions as F

from nightstream.serving.commits import newest_rows
from nightstream.serving.refresh import OVERFLOW_COLUMNS, STATE_COLUMNS, USER_COLUMNS
from nightstream.serving.user_state import STATES, states_of
from nightstream.store.materialize import Cut
from nightstream.store.row_store import RowStore
from nightstream.store.storage import Storage
from nightstream.store.tables import SEEN_OVERFLOW, USER_VECTORS, USERS, TableSpec, arrow_schema

log = logging.getLogger(__name__)

# Some 5 kB of local disk each. Tables with more users are asked in each micro-batch.
MOST_USERS = 10_000_000
_ATTRIBUTES = pa.schema([f for f in arrow_schema(USERS.schema) if f.name in USER_COLUMNS])


class StateCache:
    """States and attributes of all users in local files, which fill up in the background after `start`. Until they are
    full, or where there are too many users, the tables are asked.

    scratch: a folder for driver and executors that nobody else uses; what an earlier process left there is deleted.
    """

    def __init__(self, storage: Storage, scratch: Path) -> None:
        self.storage, self.scratch = storage, scratch
        self._is_new = True
        self._folder = TemporaryDirectory(prefix="nightstream-known-", ignore_cleanup_errors=True)
        self._files = 0
        self._states, self._attributes = self._rows(STATES), self._rows(_ATTRIBUTES)
        self._pool = ThreadPoolExecutor(1, "fill")
        self._users_version: int | None = None
        self._given_up = False
        self._closed = threading.Event()

    def start(self) -> Future[None]:
        """Begin to fill, from nothing: a query that broke off may have left out what it had committed. To be called
        when all that is committed is merged, and before the next commit, by the one process that may write."""
        if self._is_new:
            shutil.rmtree(self.scratch, ignore_errors=True)
            self._is_new = False
        self._states.delete()
        self._attributes.delete()
        self._states, self._attributes = self._rows(STATES), self._rows(_ATTRIBUTES)
        self._users_version = self.storage.version(USERS)
        users = self.storage.query("SELECT count(*) AS users FROM {user_vectors}", USER_VECTORS)["users"][0].as_py()
        self._given_up = users > MOST_USERS
        if self._given_up:
            return self._pool.submit(lambda: None)
        self._pool.submit(self._fill, self._states, USER_VECTORS, "states")
        return self._pool.submit(self._fill_attributes)

    def look_again(self) -> None:
        """Take up attributes that have changed; until they are read anew, the tables are asked."""
        version = self.storage.version(USERS)
        if version != self._users_version and not self._given_up:
            self._users_version = version
            self._attributes.delete()
            self._attributes = self._rows(_ATTRIBUTES)
            self._pool.submit(self._fill_attributes)

    def committed(self, commit: Cut) -> None:
        """Take up committed states; before anybody asks for them."""
        if self._given_up:
            return
        if commit.table is not None:
            self._states.put(states_of(commit.table))
        else:
            self._states.put_all(commit.rows, self._part())

    def of(self, users: pa.Array, pending: Sequence[Cut], room: int) -> tuple[pa.Table, pa.Table, pa.Table | None]:
        """The newest states, the USERS rows, and where a state has overflowed or may do so the SEEN_OVERFLOW rows.

        users: string [B], distinct. pending: commits that USER_VECTORS may lack, from before this is called. room: seen
        items up to which a state can't overflow.
        """
        if self._states.is_complete and self._attributes.is_complete:
            names = users.to_pylist()
            states, described = self._states.get(names), self._attributes.get(names)
        else:
            states, described = _asked(self.storage, users, pending)
        older = None
        full = pc.or_(states["seen_overflowed"], pc.greater(pc.list_value_length(states["seen"]), room))
        if pc.any(full).as_py() and self.storage.exists(SEEN_OVERFLOW):
            columns = ", ".join(OVERFLOW_COLUMNS)
            sql = f"SELECT DISTINCT {columns} FROM {{seen_overflow}} WHERE user_id IN (:users)"
            older = self.storage.query(sql, SEEN_OVERFLOW, users=users.to_pylist())
        return states, described, older

    def close(self) -> None:
        """Stop filling and delete the files."""
        self._closed.set()
        self._pool.shutdown(cancel_futures=True)
        self._states.delete()
        self._attributes.delete()
        self._folder.cleanup()

    def _rows(self, schema: pa.Schema) -> RowStore:
        self._files += 1
        return RowStore(Path(self._folder.name) / f"{self._files}.sqlite", schema)

    def _part(self) -> Path:
        return self.scratch / uuid.uuid4().hex

    def _fill_attributes(self) -> None:
        self._fill(self._attributes, USERS, "attributes")

    def _fill(self, known: RowStore, spec: TableSpec, what: str) -> None:
        begun = time.monotonic()
        storage = self.storage
        try:
            storage.create(spec)
            if storage.local is not None:
                known.put_batches(storage.local.batches(spec, known.schema.names), self._closed.is_set)
            else:
                known.put_all(storage.read(spec), self._part(), self._closed.is_set)
        except Exception:
            if known.is_deleted:
                return
            # The stream goes on without: the tables have it all.
            self._given_up = True
            if not self._closed.is_set():
                log.exception("the users could not be read ahead, the tables are asked in each micro-batch")
        else:
            known.is_complete = not self._closed.is_set()
            if known.is_complete:
                log.info("read ahead", extra={"rows": what, "seconds": round(time.monotonic() - begun, 1)})


def _asked(storage: Storage, users: pa.Array, pending: Sequence[Cut]) -> tuple[pa.Table, pa.Table]:
    """States and USERS rows by a look into the tables and into commits that are not merged yet."""
    names = users.to_pylist()

    def of_users(spec: TableSpec, columns: Sequence[str]) -> pa.Table:
        storage.create(spec)
        quoted = ", ".join(f"u.{name}" for name in columns)
        return storage.query(f"SELECT {quoted} FROM {{{spec.name}}} u WHERE u.user_id IN (:users)", spec, users=names)

    parts = [states_of(of_users(USER_VECTORS, STATE_COLUMNS))]
    for commit in pending:
        if commit.table is not None:
            rows = commit.table.filter(pc.is_in(commit.table["user_id"], value_set=users))
        else:
            wanted = F.broadcast(storage.spark.createDataFrame(pa.table({"user_id": users})))
            rows = commit.rows.select(*STATE_COLUMNS).join(wanted, "user_id", "left_semi").toArrow()
        parts.append(states_of(rows))
    return newest_rows(parts), of_users(USERS, USER_COLUMNS)
