from __future__ import annotations

from nightstream.runtime import session


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
