"""Logging on stderr: readable lines, or one JSON object per line, both with the `extra` fields of the call."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import Any

from pythonjsonlogger.json import JsonFormatter as BaseJsonFormatter
from rich.highlighter import NullHighlighter
from rich.logging import RichHandler

from nightstream.runtime.console import stderr

_RESERVED = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_TIME = "%H:%M:%S"

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
    root.addHandler(JsonHandler() if as_json else _line_handler())
    root.setLevel(level)
    logging.captureWarnings(True)
    for name, least in _CHATTY.items():
        logging.getLogger(name).setLevel(least)


def extra_fields(record: logging.LogRecord) -> dict[str, Any]:
    """What the caller passed as `extra`."""
    return {key: value for key, value in vars(record).items() if key not in _RESERVED}


class JsonFormatter(BaseJsonFormatter):
    """One JSON object: at, level, logger, message, the extra fields, and `trace` where there is an exception."""

    def __init__(self) -> None:
        super().__init__(rename_fields={"exc_info": "trace"}, json_default=str, json_ensure_ascii=False)

    def add_fields(self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]) -> None:
        ours = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        log_data.update(ours)
        super().add_fields(log_data, record, message_dict)
        # A caller's field never hides one of ours.
        log_data.update(ours)
        if "exc_info" in message_dict:
            log_data["trace"] = message_dict["exc_info"]


class JsonHandler(logging.StreamHandler):
    """Writes JsonFormatter's lines to stderr."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JsonFormatter())


class LineFormatter(logging.Formatter):
    """`message key=value …`, then the trace where there is an exception.

    Args:
        prefixed: Put the time, and a level other than info, before the message.
    """

    def __init__(self, prefixed: bool) -> None:
        super().__init__(datefmt=_TIME)
        self.prefixed = prefixed

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {key}={_short(value)}" for key, value in extra_fields(record).items())
        if not self.prefixed:
            return record.message + fields
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()} "
        return f"{self.formatTime(record, self.datefmt)} {level}{record.message}{fields}"


def _line_handler() -> logging.Handler:
    """On a terminal rich's handler; elsewhere plain lines, which no column width folds."""
    if not stderr.is_terminal:
        plain = logging.StreamHandler()
        plain.setFormatter(LineFormatter(prefixed=True))
        return plain
    # It shares the console of the progress bars, which else would be torn by a line that they know nothing of.
    rich = RichHandler(
        console=stderr, show_path=False, omit_repeated_times=False, highlighter=NullHighlighter(), keywords=[]
    )
    rich.setFormatter(LineFormatter(prefixed=False))
    return rich


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    return f'"{text}"' if " " in text else text
