"""What a Spark JVM writes to stderr, passed on to the log without the chatter of its start."""

from __future__ import annotations

import logging
import os
import re
import threading
from collections import deque
from types import TracebackType

log = logging.getLogger("spark")

# Ivy's report of a resolution that went well, and remarks about defaults. What Ivy says of a failure is not among them.
_CHATTER = re.compile(
    r"""^(?:
        \s*$
      | WARNING:\ Using\ incubator\ modules
      | Using\ Spark's\ default\ log4j | Setting\ default\ log\ level | To\ adjust\ logging\ level
      | ::\ (?:loading|resolving|resolution|retrieving)
      | Ivy\ Default\ Cache | The\ jars\ for\ the\ packages | \S+\#\S+\ added\ as\ a\ dependency
      | \t(?:confs:|found\ |::\ |[\w.-]+\#\S+\ (?:from|by)|-{9}|\|)
      | \t\d+\ artifacts\ copied | downloading\ | \t\[SUCCESSFUL
    )""",
    re.VERBOSE,
)
_LEVEL = re.compile(r"^(?:\S+ \S+ )?(ERROR|WARN|INFO|FATAL) ")
_LEVELS = {"FATAL": logging.ERROR, "ERROR": logging.ERROR, "WARN": logging.WARNING, "INFO": logging.INFO}
_KEPT_LINES = 50


class Chatter:
    """A pipe for a child's stderr: `with Chatter() as c: start(stderr=c.pipe)`; a thread reads until the child ends."""

    def __init__(self) -> None:
        self._read, self.pipe = os.pipe()
        self._recent: deque[str] = deque(maxlen=_KEPT_LINES)
        self._level = logging.WARNING
        self._thread = threading.Thread(target=self._forward, name="spark-stderr", daemon=True)

    def __enter__(self) -> Chatter:
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # The child holds its own copy; ours would keep the reader from seeing the end.
        os.close(self.pipe)

    def said(self, *phrases: str) -> bool:
        """Whether one of the last lines holds one of the phrases."""
        return any(phrase in line for line in list(self._recent) for phrase in phrases)

    def last(self) -> str:
        """The last line that was no chatter, empty where there was none."""
        return next((line.strip() for line in reversed(self._recent) if not is_chatter(line)), "")

    def _forward(self) -> None:
        with os.fdopen(self._read, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                line = line.rstrip("\n")
                self._recent.append(line)
                if not is_chatter(line):
                    # The lines of a stack trace bear no level and belong to the line before.
                    found = _LEVEL.match(line)
                    self._level = _LEVELS[found[1]] if found else self._level
                    log.log(self._level, "%s", line[found.end() :] if found else line)


def is_chatter(line: str) -> bool:
    """Whether the line says only that a start goes as it should."""
    return _CHATTER.match(line) is not None
