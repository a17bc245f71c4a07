"""A real PostgreSQL and a real Redis for tests, each at a free port, with its data in a folder of its own."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import psycopg
import redis

PATIENCE = 60.0  # seconds until a server answers


class Server:
    """Runs inside a `with` block, and may be stopped and started again in it. url: its address."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="nightstream-"))
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None
        self.url = ""
        self._user: dict[str, Any] = {}

    def start(self) -> None:
        """Start it, and wait until it answers."""
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                self._command(), stdout=log, stderr=log, cwd=self.folder, env=_environment(), **self._user
            )
        deadline = time.monotonic() + PATIENCE
        while not self._answers():
            said = (self.folder / "server.log").read_text(errors="replace")[-2000:]
            assert self.process.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.05)

    def stop(self, number: int = signal.SIGINT) -> None:
        """End it by a signal, by default as a person does; what it has stored is there at the next start."""
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(PATIENCE)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process is not None and self.process.poll() is None:
            self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _command(self) -> list[str]:
        raise NotImplementedError

    def _answers(self) -> bool:
        raise NotImplementedError


class Postgres(Server):
    """PostgreSQL with one database, `postgres`, whose superuser needs no password."""

    def __enter__(self) -> Postgres:
        self.binaries = _postgres_binaries()
        self.url = f"postgresql://postgres@127.0.0.1:{self.port}/postgres"
        if os.geteuid() == 0:
            # It refuses to run as root.
            owner = pwd.getpwnam("postgres")
            os.chown(self.folder, owner.pw_uid, owner.pw_gid)
            self._user = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}
        init = [self.binaries / "initdb", "-D", self.folder / "data", "-U", "postgres", "-A", "trust", "-E", "UTF8"]
        made = subprocess.run(
            [*init, "--no-sync"], capture_output=True, text=True, cwd=self.folder, env=_environment(), **self._user
        )
        assert made.returncode == 0, made.stdout + made.stderr
        self.start()
        return self

    def rows(self, statement: str) -> list[tuple[Any, ...]]:
        """What a statement gives, over a connection of its own; none of one that gives no rows."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            done = connection.execute(statement)  # type: ignore[call-overload]
            return done.fetchall() if done.description else []

    def _command(self) -> list[str]:
        options = {"listen_addresses": "127.0.0.1", "fsync": "off"}
        command = [str(self.binaries / "postgres"), "-D", str(self.folder / "data"), "-p", str(self.port)]
        command += ["-k", str(self.folder)]
        return [*command, *(part for name, value in options.items() for part in ("-c", f"{name}={value}"))]

    def _answers(self) -> bool:
        return _without_error(psycopg.Error, lambda: self.rows("SELECT 1"))


class Redis(Server):
    """Redis. keeps: whether what it has stored is there again after it was stopped."""

    def __init__(self, keeps: bool = True, password: str = "") -> None:
        super().__init__()
        self.keeps, self.password = keeps, password

    def __enter__(self) -> Redis:
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()
        return self

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, password=self.password or None, decode_responses=True)

    def _command(self) -> list[str]:
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self.folder)]
        options += ["--appendonly", "yes" if self.keeps else "no"]
        if self.password:
            options += ["--requirepass", self.password]
        return ["redis-server", *options]

    def _answers(self) -> bool:
        return _without_error(redis.RedisError, lambda: self.client().ping())


def _without_error(kind: type[Exception], action: Callable[[], Any]) -> bool:
    try:
        action()
    except kind:
        return False
    return True


def _postgres_binaries() -> Path:
    """Debian keeps them off the PATH, by version."""
    if (found := shutil.which("initdb")) is not None:
        return Path(found).parent
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    assert places, "PostgreSQL is missing: .ci/install-servers installs it"
    return places[-1].parent


def _environment() -> dict[str, str]:
    """The environment without what would lead clients and servers elsewhere."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PG")} | {"LC_ALL": "C.UTF-8"}
