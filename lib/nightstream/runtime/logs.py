"""Logging: readable lines, or one JSON object per line, both on stderr and both with the `extra` fields."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any

from rich.text import Text

from nightstream.runtime.console import stderr

_RESERVED = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_STYLES = {logging.WARNING: "yellow", logging.ERROR: "bold red", logging.CRITICAL: "bold red"}

# Loggers that tell of their own inner life; what matters of it reaches us as exceptions.
_CHATTY = {
    "py4j": logging.CRITICAL,
    "pyspark": logging.ERROR,
    "torch": logging.ERROR,
    "TorchDistributor": logging.WARNING,
}


def configure(as_json: bool = False, level: int = logging.INFO) -> None:
    """Send all logging to stderr in one of the two forms, replacing earlier handlers."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    root.addHandler(JsonHandler() if as_json else LineHandler())
    root.setLevel(level)
    logging.captureWarnings(True)
    for name, least in _CHATTY.items():
        logging.getLogger(name).setLevel(least)


def extra_fields(record: logging.LogRecord) -> dict[str, Any]:
    """What the caller passed as `extra`."""
    return {key: value for key, value in vars(record).items() if key not in _RESERVED}


class JsonFormatter(logging.Formatter):
    """One JSON object: at, level, logger, message, the extra fields, and `trace` where there is an exception."""

    def format(self, record: logging.LogRecord) -> str:
        document: dict[str, Any] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        # A caller's field never hides one of ours.
        document = {**extra_fields(record), **document}
        if record.exc_info:
            document["trace"] = self.formatException(record.exc_info)
        return json.dumps(document, default=str, ensure_ascii=False)


class JsonHandler(logging.StreamHandler):
    """Writes JsonFormatter's lines to stderr."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JsonFormatter())


class LineHandler(logging.Handler):
    """Writes `time message key=value …` to stderr, coloured on a terminal.

    It shares the console of the progress bars, which else would be torn by a line that they know nothing of.
    """

    def emit(self, record: logging.LogRecord) -> None:
        try:
            stderr.print(_line(record), highlight=False, soft_wrap=True)
        except Exception:
            self.handleError(record)


def _line(record: logging.LogRecord) -> Text:
    style = _STYLES.get(record.levelno, "")
    line = Text.assemble((f"{datetime.fromtimestamp(record.created):%H:%M:%S} ", "dim"))
    if record.levelno != logging.INFO:
        line.append(f"{record.levelname.lower()} ", style)
    line.append(record.getMessage(), style)
    for key, value in extra_fields(record).items():
        line.append(f" {key}={_short(value)}", "dim")
    if record.exc_info:
        line.append("\n" + logging.Formatter().formatException(record.exc_info))
    return line


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    return f'"{text}"' if " " in text else text
