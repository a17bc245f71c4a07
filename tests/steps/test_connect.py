"""A night and a stream over Spark Connect: the server is a process of its own, and the commands are its clients."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pyspark
import pytest
import world
import yaml
from deltalake import DeltaTable
from nightstream.errors import NightstreamError
from nightstream.runtime.settings import Settings
from nightstream.steps import demo, serve

PATIENCE = 300.0  # seconds until the server answers
_CATALOG = "org.apache.spark.sql.delta.catalog.DeltaCatalog"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def server(settings: Settings, folder: Path) -> Iterator[str]:
    """A Spark Connect server with Delta; its address."""
    port, home = free_port(), Path(pyspark.__file__).parent
    options = {
        "spark.connect.grpc.binding.address": "127.0.0.1",
        "spark.connect.grpc.binding.port": str(port),
        "spark.driver.host": "127.0.0.1",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.ui.enabled": "false",
        "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
        "spark.sql.catalog.spark_catalog": _CATALOG,
        "spark.sql.warehouse.dir": str(folder / "warehouse"),
        "spark.sql.codegen.wholeStage": "false",
    }
    command = [str(home / "bin" / "spark-submit"), "--master", "local[3]", "--driver-memory", "2g"]
    command += ["--class", "org.apache.spark.sql.connect.service.SparkConnectServer"]
    command += ["--packages", ",".join(settings.spark.packages)]
    command += [part for key, value in options.items() for part in ("--conf", f"{key}={value}")]
    own = {"SPARK_HOME": str(home), "PYSPARK_PYTHON": sys.executable, "PYSPARK_DRIVER_PYTHON": sys.executable}
    with (folder / "server.log").open("w") as log:
        # In its folder: no relative path of the client leads anywhere there.
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **own}, cwd=folder)
    try:
        deadline = time.monotonic() + PATIENCE
        while True:
            assert process.poll() is None, (folder / "server.log").read_text()[-3000:]
            assert time.monotonic() < deadline, "the server did not start"
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.5)
        yield f"sc://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def told(*arguments: str) -> dict:
    """What a command prints."""
    command = [str(Path(sys.executable).with_name("nightstream")), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout[done.stdout.index("{\n") :])


def rows(settings_file: Path, table: str) -> list[dict]:
    """As another reader finds them."""
    root = yaml.safe_load(settings_file.read_text())["storage"]["root"]
    return DeltaTable(f"{root}/{table}").to_pyarrow_table().to_pylist()


def event(number: int) -> dict:
    return {"event_id": f"live{number}", "user_id": f"new{number}", "item_id": "i01", "event_time": world.START}


class ServerSession:
    """What a session over Spark Connect is told by."""

    __module__ = "pyspark.sql.connect.session"


def test_what_follows_a_stream_in_this_process_is_refused_before_anything_is_touched(settings):
    with pytest.raises(NightstreamError, match=r"the demo follows .* run it with spark\.remote: null"):
        demo.run(ServerSession(), settings, datetime(2024, 1, 1, tzinfo=UTC))
    with pytest.raises(NightstreamError, match=r"run this command with spark\.remote: null"):
        serve.run(ServerSession(), settings, on_batch=print)
    assert not Path(settings.storage.root).parent.joinpath("demo").exists()


@pytest.mark.slow
def test_a_night_and_a_stream_on_a_server(settings, tmp_path):
    for name, made in (("events", world.events()), ("items", world.items()), ("users", world.users())):
        world.write_lines(tmp_path / f"{name}.jsonl", made)
    document = world.placed(settings.model_dump(mode="json"), tmp_path) | {"sources": world.sources(tmp_path)}
    document["training"] |= {"encoders": ["gru"], "epochs": 1}
    document["stream"] |= {"max_per_trigger": 1, "metrics_seconds": 1.0}
    document["serving"] |= {"top_k": 5}
    file = tmp_path / "base.yaml"
    with server(settings, tmp_path) as address:
        document["spark"]["remote"] = address
        file.write_text(yaml.safe_dump(document), encoding="utf-8")
        night = told("nightly", "--settings", str(file))
        assert night["apply"]["users"] == len({r["user_id"] for r in rows(file, "user_vectors")}) > 40
        for number in range(3):
            world.drop(document["stream"]["path"], f"{number}", [event(number)])
        assert told("serve", "--until-idle", "--settings", str(file)) == {"batches": 3, "input_rows": 3}
        # Started again, it goes on where it ended, as the same writer.
        world.drop(document["stream"]["path"], "later", [event(3), "no json"])
        assert told("serve", "--until-idle", "--settings", str(file)) == {"batches": 1, "input_rows": 2}
    listed = [r["user_id"] for r in rows(file, "recommendations") if r["user_id"].startswith("new")]
    assert sorted(listed) == sorted([f"new{n}" for n in range(4)] * 5)
    assert {r["event_id"] for r in rows(file, "events")} >= {f"live{n}" for n in range(4)}
    assert [r["reason"] for r in rows(file, "quarantine")] == ["not_json"]
    committed = [r for r in rows(file, "refreshes") if r["writer"].startswith("stream")]
    assert len({r["writer"] for r in committed}) == 1
    assert sorted(r["batch_id"] for r in committed) == [0, 1, 2, 3]
    assert {r["name"] for r in rows(file, "metrics")} >= {"stream_events", "stream_users_refreshed"}
