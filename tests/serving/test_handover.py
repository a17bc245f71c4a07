"""A model handed over, and taken back, under a running stream: what a reader finds at every version of the tables."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime
from types import SimpleNamespace

import pyarrow as pa
import pytest
import refreshes
import world
from deltalake import DeltaTable
from nightstream.ingest.ledger import check
from nightstream.runtime.settings import Settings, validate
from nightstream.serving import commits, handover
from nightstream.steps import nightly, publish, serve
from nightstream.store import registry
from nightstream.store.materialize import Cut
from nightstream.store.storage import Storage
from nightstream.store.tables import EVENTS, RECOMMENDATIONS, REFRESHES, USER_VECTORS, arrow_schema
from states import assert_merged, assert_same, recomputed

LONGEST_WAIT = 400.0  # seconds


class Reader(threading.Thread):
    """Reads each version of `recommendations` as soon as it is there, with another reader's eyes: delta-rs.

    errors: what was wrong. mixed: how many versions had users under either model.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(name="reader", daemon=True)
        self.root, self.top_k = settings.storage.root, settings.serving.top_k
        self.version, self.mixed, self.models = 0, 0, set[str]()
        self.errors: list[str] = []
        self.done = threading.Event()
        self._revisions: dict[str, int] = {}
        self._committed: dict[tuple[str, int], dict] = {}
        self._commits_read = -1

    def run(self) -> None:
        while True:
            ending = self.done.is_set()
            newest = DeltaTable(f"{self.root}/recommendations").version()
            while self.version < newest:
                self.version += 1
                try:
                    self._look()
                except Exception as error:
                    self.errors.append(f"version {self.version}: {error!r}")
            if ending:
                return
            time.sleep(0.05)

    def _look(self) -> None:
        lists: dict[str, list[dict]] = {}
        for row in DeltaTable(f"{self.root}/recommendations", version=self.version).to_pyarrow_table().to_pylist():
            lists.setdefault(row["user_id"], []).append(row)
        self._read_commits()
        models = DeltaTable(f"{self.root}/models").to_pyarrow_table().to_pylist()
        published = {row["model_version"] for row in models if row["status"] == registry.PUBLISHED}
        self.models = {rows[0]["model_version"] for rows in lists.values()}
        self.mixed += len(self.models) > 1
        for user, rows in lists.items():
            rows.sort(key=lambda row: row["rank"])
            revision, model = rows[0]["revision"], rows[0]["model_version"]
            committed = self._committed[user, revision]
            eligible = world.ITEMS - len(committed["seen"])
            for what, holds in {
                "ranks": [row["rank"] for row in rows] == list(range(1, min(self.top_k, eligible) + 1)),
                "one commit": {(row["revision"], row["model_version"]) for row in rows} == {(revision, model)},
                "as committed": [row["item_id"] for row in rows] == [entry["item_id"] for entry in committed["items"]],
                "published": model in published,
                "never back": revision >= self._revisions.get(user, 0),
            }.items():
                if not holds:
                    self.errors.append(f"version {self.version}, {user}: {what}: {rows}")
            self._revisions[user] = revision
        if missing := self._revisions.keys() - lists.keys():
            self.errors.append(f"version {self.version}: {missing} have no list")

    def _read_commits(self) -> None:
        """A list is merged after its commit, so the newest `refreshes` knows it."""
        table = DeltaTable(f"{self.root}/refreshes")
        if table.version() > self._commits_read:
            self._commits_read = table.version()
            columns = ["user_id", "revision", "seen", "items"]
            rows = table.to_pyarrow_table(columns=columns).to_pylist()
            self._committed = {(row["user_id"], row["revision"]): row for row in rows}


def hurried(settings: Settings) -> Settings:
    """The hand-over in several slices, soon after the publishing commit; a night of one short epoch."""
    document = settings.model_dump(mode="json")
    document["stream"] |= {"max_per_trigger": 1, "snapshot_seconds": 0.5, "handover_slice": 6}
    document["serving"]["lease_seconds"] = 60
    document["training"]["epochs"] = 1
    document["gate"]["margin"] = None
    return validate(document)


def event(number: int) -> dict:
    """Of each user in turn; one user consumes one item after the other, until fewer are left than a list has."""
    told = {"event_id": f"live{number}", "event_time": world.START + 10**6 + number, "event_type": "view"}
    if number % 4 == 0 and number < 88:
        return {**told, "user_id": "u000", "item_id": f"i{number // 4:02}"}
    return {**told, "user_id": f"u{number % 44:03}", "item_id": f"i{number * 7 % world.ITEMS:02}"}


def committed(spark, model: str, **items: str) -> Cut:
    """Commits of users with a list of one item each, under that model."""
    rows = refreshes.rows(((user, 1) for user in items), length=1).to_pylist()
    for row in rows:
        row["model_version"], row["items"][0]["item_id"] = model, items[row["user_id"]]
    return Cut.of(spark, pa.Table.from_pylist(rows, arrow_schema(REFRESHES.schema)), REFRESHES.schema)


def test_users_of_another_model_and_holders_of_withdrawn_items_are_behind_as_their_newest_commit_says(spark, settings):
    storage = Storage(spark, settings.storage)
    for model, users in {"old": {"a": "i", "b": "i", "c": "i"}, "new": {"d": "i", "e": "gone", "f": "gone"}}.items():
        commits.merge(storage, committed(spark, model, **users), commits.Layout(1), 1)
    loaded = SimpleNamespace(withdrawn=lambda: pa.array(["gone", "gone too"]))
    bundle = SimpleNamespace(model_version="new", load=lambda: loaded)

    def found(pending: list[Cut], most: int = 10) -> list[str] | None:
        some = handover.some_behind(storage, bundle, pending, most)
        return None if some is None else sorted(r.user_id for r in some.rows.collect())

    assert found([]) == ["a", "b", "c", "e", "f"]
    assert len(found([], most=2)) == 2
    newer = committed(spark, "new", a="i", e="i", g="gone too", h="i")
    older = committed(spark, "old", h="i", k="i")
    # Of h both have revision 1, as of two commits of one user only the newer has.
    older.table = older.table.set_column(1, "revision", pa.array([0, 0], pa.int64()))
    assert found([older, newer]) == ["b", "c", "f", "g", "k"]
    # One that would be behind but for its commit leaves room for another one.
    assert found([committed(spark, "new", a="i", b="i", e="i", f="i")], most=1) == ["c"]
    rest = committed(spark, "new", **dict.fromkeys("abcef", "i"))
    assert found([rest]) is None
    assert found([rest, Cut(committed(spark, "old", z="i").rows, {})]) == []


@pytest.mark.faults
def test_a_model_is_handed_over_and_taken_back_under_the_eyes_of_a_reader(spark, night, tmp_path):
    storage, settings = night("watched")
    settings = hurried(settings)
    first = registry.published(storage).model_version
    stop, started, outcome, dropped = threading.Event(), threading.Event(), [], []
    batches = threading.Semaphore(3)

    def stream() -> None:
        running = {"stop": stop.is_set, "on_start": started.set, "on_batch": lambda report: batches.release()}
        try:
            outcome.append(serve.run(spark, settings, **running))
        except Exception as error:
            outcome.append(error)

    def feed() -> None:
        """As fast as the stream takes them: there are always files waiting."""
        while not stop.is_set():
            if batches.acquire(timeout=0.2):
                rows = [event(len(dropped) + n) for n in range(4)]
                dropped.extend(rows)
                world.drop(settings.stream.path, f"f{len(dropped):06}", rows)

    def until_all_are_under(version: str) -> None:
        deadline = time.monotonic() + LONGEST_WAIT
        while reader.models != {version}:
            assert time.monotonic() < deadline, f"{reader.models} after {LONGEST_WAIT} s; {outcome}"
            assert not outcome, outcome
            time.sleep(0.2)

    reader = Reader(settings)
    threads = [threading.Thread(target=stream), threading.Thread(target=feed), reader]
    for thread in threads:
        thread.start()
    try:
        assert started.wait(LONGEST_WAIT)
        told = nightly.run(spark, settings, datetime(2024, 1, 2, tzinfo=UTC))
        assert "stream" in told["apply"].get("left_to", ""), (told["apply"], outcome)
        second = told["train"]["model_version"]
        until_all_are_under(second)
        handed_over = reader.mixed
        publish.run(spark, settings, datetime(2024, 1, 3, tzinfo=UTC), first)
        until_all_are_under(first)
    finally:
        stop.set()
        for thread in threads[:2]:
            thread.join()
        reader.done.set()
        reader.join()
    assert isinstance(outcome[0], dict), outcome
    assert not reader.errors, reader.errors[:5]
    assert 0 < handed_over < reader.mixed
    serve.run(spark, settings, until_idle=True)
    check(storage)
    stored = {r.event_id for r in storage.read(EVENTS).select("event_id").collect()}
    assert {row["event_id"] for row in dropped} <= stored
    for spec in (USER_VECTORS, RECOMMENDATIONS):
        assert {r.model_version for r in storage.read(spec).collect()} == {first}
    assert_merged(storage)
    assert_same(storage, recomputed(storage, settings, tmp_path / "copy"))
