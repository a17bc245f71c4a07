"""What a person reads where no session can be had, or where one refuses a setting."""

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


class Conf:
    """The settings of a shared cluster, which keeps its time zone and its warehouse and hides a secret."""

    def __init__(self) -> None:
        self.values = {"spark.sql.session.timeZone": "CET", "spark.sql.warehouse.dir": "here"}

    def set(self, key: str, value: str) -> None:
        if key in ("spark.sql.session.timeZone", "spark.sql.warehouse.dir", "spark.secret"):
            raise RuntimeError(f"[CONFIG_NOT_AVAILABLE] {key} is kept\nJVM stacktrace")
        self.values[key] = value

    def get(self, key: str, default: str | None = None) -> str | None:
        if key == "spark.secret":
            raise RuntimeError("no")
        return self.values.get(key, default)


class Session:
    def __init__(self) -> None:
        self.conf = Conf()


def test_refused_settings_are_told_in_one_warning(caplog):
    shared = Session()
    wanted = {
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.warehouse.dir": "here",
        "spark.sql.adaptive.enabled": "false",
        "spark.secret": "s3",
    }
    session._set_what_can_be(wanted, shared)
    assert shared.conf.values["spark.sql.adaptive.enabled"] == "false"
    (warned,) = caplog.records
    assert warned.levelname == "WARNING"
    assert "spark.sql.session.timeZone, spark.secret" in warned.getMessage()
    # What the session has already is no refusal, and values may be secrets.
    assert "warehouse" not in warned.getMessage()
    assert "s3" not in warned.getMessage()
    assert warned.reason == "[CONFIG_NOT_AVAILABLE] spark.sql.session.timeZone is kept"


def test_a_session_that_takes_all_settings_gets_no_warning(caplog):
    session._set_what_can_be({"spark.sql.adaptive.enabled": "false"}, Session())
    assert caplog.records == []
