"""What a Spark JVM writes to stderr, passed on to the log without what a start says when all goes well."""

from __future__ import annotations

import itertools
import logging
import os
import re
import threading
from collections import deque
from types import TracebackType

log = logging.getLogger("spark")

# Ivy's report of a resolution that went well, and remarks about defaults.
_ROUTINE = re.compile(
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
# Ivy asks several repositories for each file, and warns of each that cannot be reached or lacks it, also where another
# has it. What it says here matters only where the resolution fails.
_HOST_WARNING = re.compile(r"^You probably access the destination server through a proxy server")
_PROBLEMS_BEGIN = re.compile(r"^:: problems summary ::")
_PROBLEMS_GO_ON = re.compile(r"^(?:\s|$|::)")
_LEVEL = re.compile(r"^(?:\S+ \S+ )?(ERROR|WARN|INFO|FATAL) ")
_LEVELS = {"FATAL": logging.ERROR, "ERROR": logging.ERROR, "WARN": logging.WARNING, "INFO": logging.INFO}
_KEPT_LINES = 50
_END_SECONDS = 5.0


class JvmLog:
    """A pipe for the stderr of a JVM that starts: `with JvmLog() as jvm_log: start(stderr=jvm_log.pipe)`.

    A thread reads until the JVM ends. What Ivy says of problems is logged only where the block ends in an error.
    """

    def __init__(self) -> None:
        self._read, self.pipe = os.pipe()
        self._recent: deque[str] = deque(maxlen=_KEPT_LINES)
        self._level = logging.WARNING
        self._problems: list[str] = []
        self._among_problems = False
        self._thread = threading.Thread(target=self._forward, name="spark-stderr", daemon=True)

    def __enter__(self) -> JvmLog:
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # The JVM holds its own copy; ours would keep the reader from seeing the end.
        os.close(self.pipe)
        if not isinstance(error, Exception):
            return
        # The JVM has ended, but its last lines may not have been read yet.
        self._thread.join(_END_SECONDS)
        for line, _ in itertools.groupby(self._problems):
            log.warning("%s", line)

    def said(self, *phrases: str) -> bool:
        """Whether one of the last lines holds one of the phrases."""
        return any(phrase in line for line in list(self._recent) for phrase in phrases)

    def last(self) -> str:
        """The last line that was not routine, empty where there was none."""
        return next((line.strip() for line in reversed(self._recent) if not is_routine(line)), "")

    def _forward(self) -> None:
        with os.fdopen(self._read, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                line = line.rstrip("\n")
                self._recent.append(line)
                if self._is_problem(line):
                    self._problems.append(line)
                elif not is_routine(line):
                    # The lines of a stack trace bear no level and belong to the line before.
                    match = _LEVEL.match(line)
                    self._level = _LEVELS[match[1]] if match else self._level
                    log.log(self._level, "%s", line[match.end() :] if match else line)

    def _is_problem(self, line: str) -> bool:
        """Whether the line is one of Ivy's about a problem: a warning of a host, or a line of its closing summary."""
        within = self._among_problems and _PROBLEMS_GO_ON.match(line) is not None
        self._among_problems = within or _PROBLEMS_BEGIN.match(line) is not None
        return self._among_problems or _HOST_WARNING.match(line) is not None


def is_routine(line: str) -> bool:
    """Whether the line says only that a start goes as it should."""
    return _ROUTINE.match(line) is not None
