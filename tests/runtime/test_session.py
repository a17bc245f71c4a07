"""What a person reads where no session can be had."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from nightstream.errors import MachineError
from nightstream.runtime import session
from nightstream.runtime.settings import load
from pyspark.sql import SparkSession

BASE = Path(__file__).parents[2] / "conf" / "base.yaml"


def test_a_server_that_does_not_answer_is_named_without_its_token(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"sc://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setattr(session, "getproxies", dict)
        with pytest.raises(MachineError, match="no Spark Connect server answers at") as raised:
            session._connected(f"{address}/;token=hush", "nobody")
    assert f"at {address} (" in str(raised.value)
    assert "hush" not in str(raised.value)


def test_the_environment_names_the_server_before_the_settings_do(monkeypatch):
    asked = []

    def connected(remote: str, app_name: str):
        asked.append(remote)
        raise MachineError("as far as this test goes")

    monkeypatch.setattr(session, "_connected", connected)
    monkeypatch.setattr(SparkSession, "getActiveSession", classmethod(lambda cls: None))
    monkeypatch.delenv("SPARK_REMOTE", raising=False)
    monkeypatch.delenv("DATABRICKS_RUNTIME_VERSION", raising=False)
    settings = load([BASE], ["spark.remote=sc://from-settings"]).spark
    for variable in (None, "sc://from-environment"):
        if variable is not None:
            monkeypatch.setenv("SPARK_REMOTE", variable)
        with pytest.raises(MachineError):
            session.build(settings)
    assert asked == ["sc://from-settings", "sc://from-environment"]
