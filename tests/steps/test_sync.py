"""The command sync, on a real PostgreSQL and a real Redis; tables are written without Spark, but in the last tests."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import psycopg
import pytest
import redis
import refreshes
import yaml
from nightstream import cli
from nightstream.runtime.settings import Settings, validate
from nightstream.serving import key_value, targets
from nightstream.serving.key_value import Record
from nightstream.steps.sync import run
from servers import Postgres, Redis

ROOT = Path(__file__).parents[2]
BASE = str(ROOT / "conf" / "base.yaml")
KINDS = ("postgresql", "redis")
PATIENCE = 90.0  # seconds until a copy is complete, or a process has ended


class Copy:
    """A server, and one copy on it under a name of its own."""

    def __init__(self, kind: str, server: Postgres | Redis, name: str) -> None:
        self.kind, self.server, self.name = kind, server, name

    def settings(self, settings: Settings, **sync: Any) -> Settings:
        document = settings.model_dump(mode="json")
        document["sync"] |= {"target": self.kind, "url": self.server.url, "table": self.name, "prefix": f"{self.name}:"}
        document["sync"] |= sync
        return validate(document)

    def target(self) -> key_value.Target:
        target = targets.target_of(self.kind, self.server.url, self.name, f"{self.name}:")
        target.connect()
        return target

    def rows(self) -> dict[str, tuple[Any, ...]]:
        """As refreshes.newest, read as a service would."""
        if isinstance(self.server, Postgres):
            columns = ", ".join(refreshes.VALUE)
            found = self.server.rows(f"SELECT user_id, {columns} FROM {self.name} WHERE user_id <> ''")
            return {user: (*value[:2], *(t.astimezone(UTC) for t in value[2:4]), value[4]) for user, *value in found}
        client = self.server.client()
        values = {key.partition(":")[2]: client.hgetall(key) for key in client.scan_iter(f"{self.name}:?*", 1000)}
        return {user: _decoded(value) for user, value in values.items()}

    def revision(self, user: str) -> int:
        """Of one user, 0 where there is none; one lookup."""
        if isinstance(self.server, Postgres):
            found = self.server.rows(f"SELECT revision FROM {self.name} WHERE user_id = '{user}'")
            return found[0][0] if found else 0
        return int(self.server.client().hget(f"{self.name}:{user}", "revision") or 0)

    def equals(self, root: str) -> bool:
        """Whether it holds what the tables do; False also while the server is away."""
        with suppress(psycopg.Error, redis.RedisError):
            return self.rows() == refreshes.newest(root)
        return False


def _decoded(value: dict[str, str]) -> tuple[Any, ...]:
    times = (datetime.fromisoformat(value[name]) for name in ("as_of", "refreshed_at"))
    return int(value["revision"]), value["model_version"], *times, json.loads(value["items"])


@pytest.fixture(scope="module", params=KINDS)
def server(request) -> Iterator[tuple[str, Postgres | Redis]]:
    with Postgres() if request.param == "postgresql" else Redis() as running:
        yield request.param, running


@pytest.fixture
def copy(server, request) -> Copy:
    return Copy(*server, name=request.node.originalname[:50])


class Process:
    """`nightstream sync` in a process of its own, where no Java could be started."""

    def __init__(self, settings: Settings, folder: Path, *more: str) -> None:
        file = folder / "sync.yaml"
        file.write_text(yaml.safe_dump(settings.model_dump(mode="json")), encoding="utf-8")
        self.log = folder / f"sync-{len(list(folder.glob('sync-*.log')))}.log"
        command = [str(Path(sys.executable).with_name("nightstream")), "sync", "--settings", BASE]
        command += ["--settings", str(file), *more]
        environment = {name: value for name, value in os.environ.items() if name != "SPARK_REMOTE"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, env={**environment, "JAVA_HOME": "/nowhere"}
            )

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def follows(self) -> bool:
        return "following refreshes" in self.said()

    def wait_until(self, reached: Callable[[], bool]) -> None:
        """Wait while it runs."""
        deadline = time.monotonic() + PATIENCE
        while not reached():
            assert self.process.poll() is None, self.said()[-3000:]
            assert time.monotonic() < deadline, self.said()[-3000:]
            time.sleep(0.02)

    def ended(self, number: int = signal.SIGTERM) -> dict[str, Any]:
        """End it as an operator does; what it prints."""
        self.process.send_signal(number)
        return self.printed()

    def printed(self) -> dict[str, Any]:
        out, _ = self.process.communicate(timeout=PATIENCE)
        assert self.process.returncode == 0, self.said()[-3000:]
        return json.loads(out)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextmanager
def running(settings: Settings, folder: Path, *more: str) -> Iterator[Process]:
    process = Process(settings, folder, *more)
    try:
        yield process
    finally:
        if process.process.poll() is None:
            process.kill()


def commits(root: str, numbers: range, users: int = 40, seed: int = 5) -> None:
    """Append so many commits of 10 users each, whose revisions are in no order."""
    for number in numbers:
        rng = random.Random(seed * 1000 + number)
        chosen = rng.sample(range(users), 10)
        refreshes.append(root, refreshes.rows((f"u{user}", rng.randrange(1, 10_000)) for user in chosen))


@pytest.mark.slow
def test_only_a_higher_revision_is_written(copy):
    def record(user: str, revision: int) -> Record:
        return Record(
            user, revision, f"v{revision}", refreshes.START, None, f'[{{"rank": 1, "item_id": "{revision}"}}]'
        )

    def lists() -> dict[str, str]:
        return {user: value[-1][0]["item_id"] for user, value in rows().items()}

    def rows() -> dict[str, Any]:
        if copy.kind == "redis":
            client = copy.server.client()
            found = {key.partition(":")[2]: client.hgetall(key) for key in client.scan_iter(f"{copy.name}:?*")}
            return {user: (int(v["revision"]), json.loads(v["items"])) for user, v in found.items()}
        return {user: tuple(v) for user, *v in copy.server.rows(f"SELECT user_id, revision, items FROM {copy.name}")}

    target = copy.target()
    big = 2**53  # beyond which a double is not exact
    assert target.write([record("a", 9), record("b", big), record("ü'\"\\*", 1)]).users == {"a", "b", "ü'\"\\*"}
    assert target.write([record("a", 9), record("b", big - 1), record("c", 1)]).users == {"c"}
    assert target.write([record("a", 10), record("b", big + 1), record("c", 0)]).users == {"a", "b"}
    assert lists() == {"a": "10", "b": str(big + 1), "c": "1", "ü'\"\\*": "1"}
    assert {user: revision for user, (revision, _) in rows().items()} == {"a": 10, "b": big + 1, "c": 1, "ü'\"\\*": 1}


@pytest.mark.slow
def test_the_position_moves_only_from_where_it_is(copy):
    target, other = copy.target(), copy.target()
    assert target.position() is None
    assert [target.move(None, "[1]"), other.move(None, "[2]"), target.position()] == [True, False, "[1]"]
    assert [target.move("[0]", "[3]"), target.move("[1]", "[3]"), other.position()] == [False, True, "[3]"]
    assert copy.rows() == {}


@pytest.mark.slow
def test_what_a_target_cannot_hold_keeps_nothing_else_back(copy):
    target = copy.target()
    if copy.kind == "redis":
        copy.server.client().set(f"{copy.name}:bad", "another application's")
    bad = "bad" if copy.kind == "redis" else "b\x00d"
    made = [Record(user, 1, "v", refreshes.START, refreshes.START, "[]") for user in ("a", bad, "c", "d", "e")]
    done = target.write(made)
    assert (done.users, done.refused) == ({"a", "c", "d", "e"}, 1)


@pytest.mark.slow
def test_killed_anywhere_and_started_again_it_ends_in_the_same(copy, settings, tmp_path):
    settings = copy.settings(settings, batch_rows=4, poll_seconds=0.02)
    root, rng = settings.storage.root, random.Random(11)
    commits(root, range(100), users=400)
    in_the_midst = 0
    # While it reads everything, and while it follows.
    for attempt, longest in enumerate((0.3, 1.5, 0.3, 1.5, 1.5, 0.3)):
        with running(settings, tmp_path) as process:
            process.wait_until(process.follows)
            commits(root, range(100 + 10 * attempt, 110 + 10 * attempt), users=400)
            time.sleep(rng.uniform(0, longest))
            process.kill()
        in_the_midst += not copy.equals(root)
    assert in_the_midst
    with running(settings, tmp_path, "--until-idle") as process:
        progress = process.printed()
    assert copy.equals(root)
    with running(settings, tmp_path, "--until-idle") as process:
        assert process.printed()["rows"] == 0
    print(
        f"{copy.kind}: killed 6 times, {in_the_midst} of them in the midst; the last start read {progress['rows']} rows"
    )


@pytest.mark.slow
@pytest.mark.parametrize("server", [Postgres, Redis, lambda: Redis(keeps=False)], ids=["postgresql", "redis", "cache"])
def test_a_server_that_is_started_anew_lacks_nothing(server, settings, tmp_path):
    """The cache comes back empty."""
    with server() as store:
        copy = Copy("postgresql" if isinstance(store, Postgres) else "redis", store, "lists")
        settings = copy.settings(settings, batch_rows=5)
        root = settings.storage.root
        commits(root, range(20))
        with running(settings, tmp_path) as process:
            process.wait_until(lambda: copy.equals(root))
            writing = threading.Thread(target=commits, args=(root, range(20, 80)))
            writing.start()
            time.sleep(1)
            store.stop()
            writing.join()
            process.wait_until(lambda: "waiting for the server" in process.said())
            store.start()
            begun = time.monotonic()
            process.wait_until(lambda: copy.equals(root))
            print(f"{copy.kind}: complete {time.monotonic() - begun:.1f} s after the server was back")
            # While nothing is new.
            store.stop()
            store.start()
            process.wait_until(lambda: copy.equals(root))
            commits(root, range(80, 81))
            process.wait_until(lambda: copy.equals(root))
            assert process.ended()["written"] > 0


@pytest.mark.slow
def test_the_time_from_a_commit_to_the_copy(copy, settings, tmp_path):
    settings = copy.settings(settings)
    root = settings.storage.root
    refreshes.append(root, refreshes.rows((f"u{n}", 1) for n in range(2000)))
    begun, times = time.monotonic(), []
    with running(settings, tmp_path) as process:
        process.wait_until(process.follows)
        started = time.monotonic() - begun
        process.wait_until(lambda: copy.equals(root))
        complete = time.monotonic() - begun
        for revision in range(2, 42):
            refreshes.append(root, refreshes.rows([(f"u{revision % 7}", revision)], datetime.now(UTC), length=20))
            committed = time.monotonic()
            while copy.revision(f"u{revision % 7}") != revision:
                assert time.monotonic() < committed + PATIENCE, process.said()[-3000:]
            times.append(time.monotonic() - committed)
        progress = process.ended()
    print(
        f"{copy.kind}: following after {started:.2f} s, 2000 users complete after {complete:.2f} s; commit -> readable "
        f"p50 {median(times) * 1000:.0f} ms, max {max(times) * 1000:.0f} ms; the command says p50 "
        f"{progress['delay_p50_s'] * 1000:.0f} ms, max {progress['delay_max_s'] * 1000:.0f} ms"
    )
    assert (progress["rows"], progress["written"]) == (2040, 2040)
    assert median(times) < 1
    assert progress["delay_p50_s"] >= min(times)


@pytest.mark.slow
def test_a_password_with_any_character_stays_out_of_log_and_settings(settings, tmp_path, monkeypatch):
    password = "h@u/s?h#:%41 é"
    with Redis(password=password) as store:
        copy = Copy("redis", store, "lists")
        url = "redis://:${env:NIGHTSTREAM_TEST_PASSWORD}" + f"@127.0.0.1:{store.port}/0"
        settings = copy.settings(settings, url=url)
        refreshes.append(settings.storage.root, refreshes.rows([("a", 1)]))
        monkeypatch.setenv("NIGHTSTREAM_TEST_PASSWORD", password)
        with running(settings, tmp_path, "--until-idle") as process:
            assert process.printed()["written"] == 1
        assert copy.equals(settings.storage.root)
        monkeypatch.setenv("NIGHTSTREAM_TEST_PASSWORD", "wr@ng")
        with running(settings, tmp_path, "--until-idle") as process:
            assert process.process.wait(PATIENCE) == 2
        said = process.said()
        assert said.splitlines()[-1].startswith(f"nightstream: Redis at 127.0.0.1:{store.port} does not answer (")
        assert not [part for part in ("h@u", "wr@ng", "%40") if part in said]


@pytest.mark.slow
@pytest.mark.usefixtures("restored_logging")
def test_what_is_wrong_in_postgresql_is_one_sentence(settings, capsys):
    with Postgres() as store:
        refreshes.append(settings.storage.root, refreshes.rows([("a", 1)]))
        store.rows("CREATE TABLE other (user_id text, list text)")
        store.rows("CREATE ROLE reader LOGIN")

        def progress(database: str = "postgres", user: str = "postgres", table: str = "lists") -> str:
            url = f"postgresql://{user}@127.0.0.1:{store.port}/{database}"
            return sentence(settings, capsys, f"sync.url={url}", "sync.target=postgresql", f"sync.table={table}")

        assert 'database "nowhere" does not exist' in progress(database="nowhere")
        assert "the table other in PostgreSQL" in (shown := progress(table="other"))
        assert "drop it or name another in sync.table" in shown
        assert 'schema "nowhere" does not exist' in progress(table="nowhere.lists")
        assert "permission denied" in (shown := progress(user="reader"))
        assert "grant the user of sync.url" in shown


def sentence(settings: Settings, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """The one sentence with which the command ends, with exit code 2."""
    chosen = [f"storage.root={settings.storage.root}", *overrides]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["sync", "--settings", BASE, "--until-idle", *(p for each in chosen for p in ("--set", each))])
    shown = [line for line in capsys.readouterr().err.splitlines() if "following refreshes" not in line]
    assert stopped.value.code == 2
    assert len(shown) == 1, shown
    return shown[0]


@pytest.mark.usefixtures("restored_logging")
@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ([], "sync.target: write postgresql or redis"),
        (["sync.target=redis"], "sync.url: write its address"),
        (["sync.target=mongodb"], "sync.target"),
        (["sync.target=redis", "sync.url=redis://:hush@h"], "write ${env:NAME} in its place"),
        (["sync.target=redis", "sync.url='redis://:${env:NIGHTSTREAM_NOT_SET}@h'"], "NIGHTSTREAM_NOT_SET"),
        (["sync.target=redis", "sync.url=postgresql://h/d"], "sync.url is no address for sync.target redis"),
        (["sync.target=redis", "sync.url=redis://127.0.0.1:1"], "Redis at 127.0.0.1:1 does not answer"),
        (["sync.target=postgresql", "sync.url=postgresql://127.0.0.1:1/d"], "PostgreSQL at 127.0.0.1:1, database d"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(overrides, named, settings, capsys):
    refreshes.append(settings.storage.root, refreshes.rows([("a", 1)]))
    shown = sentence(settings, capsys, *overrides)
    assert named in shown
    assert "hush" not in shown


@pytest.mark.usefixtures("restored_logging")
def test_a_missing_table_is_one_sentence_and_exit_code_2(settings, capsys):
    shown = sentence(settings, capsys, "sync.target=redis", "sync.url=redis://127.0.0.1:1")
    assert "table refreshes is missing at " in shown


@pytest.mark.usefixtures("restored_logging")
@pytest.mark.parametrize(
    ("overrides", "variable", "by_spark"),
    [
        ([], "", False),
        (["storage.root=s3://bucket/tables"], "", True),
        (["storage.kind=catalog", "storage.root=main.lists"], "", True),
        (["spark.remote=sc://host"], "", True),
        ([], "sc://host", True),
    ],
)
def test_spark_starts_only_where_tables_lie_elsewhere(overrides, variable, by_spark, monkeypatch):
    seen = {}
    monkeypatch.setattr("nightstream.steps.sync.run", lambda **options: seen.update(options))
    monkeypatch.setattr("nightstream.runtime.session.build", lambda *options: Session())
    monkeypatch.setattr(cli, "_stop_on_signals", lambda stopping: None)
    monkeypatch.setenv("SPARK_REMOTE", variable)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["sync", "--settings", BASE, *(part for each in overrides for part in ("--set", each))])
    assert stopped.value.code == 0
    assert isinstance(seen["spark"], Session) == by_spark
    assert (seen["until_idle"], seen["stop"]()) == (False, False)


class Session:
    def stop(self) -> None:
        pass


@pytest.mark.slow
def test_spark_copies_the_same_once_and_again_where_the_server_has_lost_it(spark, settings, tmp_path):
    with Redis() as store:
        copy = Copy("redis", store, "lists")
        by_path = copy.settings(settings, checkpoint=str(tmp_path / "sync"), batch_rows=7)
        root = by_path.storage.root
        commits(root, range(6))
        catalog = {"kind": "catalog", "root": "spark_catalog.lists"}
        settings = by_path.model_copy(update={"storage": by_path.storage.model_copy(update=catalog)})
        spark.sql("CREATE SCHEMA lists")
        spark.sql(f"CREATE TABLE lists.refreshes USING DELTA LOCATION '{root}/refreshes'")
        first = run(settings, spark, until_idle=True)
        assert copy.equals(root)
        assert (first["rows"], first["written"] >= 40, first["refused"]) == (60, True, 0)
        refreshes.append(root, refreshes.rows([("u1", 20_000), ("new", 1), ("u2", 0)], datetime.now(UTC)))
        again = run(settings, spark, until_idle=True)
        assert (again["rows"], again["written"]) == (3, 2)
        assert copy.equals(root)
        # It comes back as it was long ago.
        client = store.client()
        place = key_value.Position.of(client.get("lists:"))
        client.flushall()
        client.set("lists:", key_value.Position(place.table, place.reader, place.at - 1).text())
        commits(root, range(6, 7))
        assert run(settings, spark, until_idle=True)["rows"] == 73
        assert copy.equals(root)
        assert key_value.Position.of(client.get("lists:")).reader != place.reader
        # It comes back empty.
        client.flushall()
        commits(root, range(7, 8))
        assert run(settings, spark, until_idle=True)["rows"] == 83
        assert copy.equals(root)
        # It is emptied while nothing is new.
        polls = []

        def stop() -> bool:
            polls.append(1)
            assert len(polls) < PATIENCE, "nobody has noticed"
            if len(polls) == 3:
                client.flushall()
            return len(polls) > 3 and copy.equals(root)

        assert run(settings, spark, stop)["rows"] == 83
        assert copy.equals(root)
        spark.sql("DROP SCHEMA lists CASCADE")
        # The same tables, followed without Spark from now on.
        commits(root, range(9, 10))
        assert run(by_path, until_idle=True)["rows"] == 93
        assert copy.equals(root)
