from __future__ import annotations

import io
import json
import logging
import sys
from datetime import UTC, datetime

import pytest
from nightstream.runtime import console, logs
from rich.console import Console

pytestmark = pytest.mark.usefixtures("restored_logging")


def record(message: str, *args: object, level: int = logging.INFO, **extra: object) -> logging.LogRecord:
    return logging.getLogger("nightstream.x").makeRecord(
        "nightstream.x", level, "", 0, message, args, None, extra=extra
    )


def as_json(made: logging.LogRecord) -> dict:
    return json.loads(logs.JsonFormatter().format(made))


def failed() -> logging.LogRecord:
    made = record("stopped", level=logging.ERROR, command="train")
    try:
        raise ZeroDivisionError("by zero")
    except ZeroDivisionError:
        made.exc_info = sys.exc_info()
    return made


def test_a_json_line_has_our_fields_and_the_callers():
    made = record("wrote %s", "Übersicht", level=logging.WARNING, rows=3, at_time=datetime(2026, 1, 2, tzinfo=UTC))
    made.created = datetime(2026, 1, 2, 3, 4, 5, 678_900, tzinfo=UTC).timestamp()
    text = logs.JsonFormatter().format(made)
    assert json.loads(text) == {
        "at": "2026-01-02T03:04:05.678+00:00",
        "level": "warning",
        "logger": "nightstream.x",
        "message": "wrote Übersicht",
        "rows": 3,
        "at_time": "2026-01-02 00:00:00+00:00",
    }
    assert "Übersicht" in text
    assert "\n" not in text


def test_a_callers_field_hides_none_of_ours():
    ours = as_json(record("m")) | {"at": ""}
    theirs = as_json(record("m", at="x", level_="kept", logger="x", trace="theirs"))
    assert theirs | {"at": ""} == ours | {"level_": "kept", "trace": "theirs"}
    made = failed()
    made.__dict__ |= {"trace": "theirs", "level": "theirs"}
    assert "ZeroDivisionError" in as_json(made)["trace"]
    assert as_json(made)["level"] == "error"


def test_an_exception_is_a_trace():
    document = as_json(failed())
    assert document["trace"].startswith("Traceback")
    assert set(document) == {"at", "level", "logger", "message", "command", "trace"}


def test_without_a_terminal_a_record_is_one_unbroken_line(capsys):
    logs.configure()
    log = logging.getLogger("nightstream.x")
    log.info("wrote [%s]", "t" * 300, extra={"rows": 3, "share": 0.123456, "why": "two words"})
    log.warning("careful")
    first, second = capsys.readouterr().err.splitlines()
    assert first[8:] == f' wrote [{"t" * 300}] rows=3 share=0.1235 why="two words"'
    assert second[8:] == " warning careful"


def test_on_a_terminal_lines_go_through_the_console_of_the_bars(monkeypatch):
    written = io.StringIO()
    terminal = Console(file=written, force_terminal=True, width=60, color_system=None)
    monkeypatch.setattr(logs, "stderr", terminal)
    logs.configure()
    logging.getLogger("nightstream.x").warning("read [1:3] of %d", 7, extra={"rows": 3})
    shown = written.getvalue()
    assert "read [1:3] of 7 rows=3" in shown
    assert "WARNING" in shown
    assert console.stderr is not terminal


def test_a_new_configuration_replaces_the_handlers(capsys):
    logs.configure()
    logs.configure(as_json=True)
    logging.getLogger("nightstream.x").info("once")
    assert [json.loads(line)["message"] for line in capsys.readouterr().err.splitlines()] == ["once"]
