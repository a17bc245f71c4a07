"""The console script with a fault: the process kills itself, its JVM with it, at a chosen write.

    NIGHTSTREAM_FAULT="after append events" python killable.py serve --settings FILE

The fault is `before` or `after`, the operation (append, merge, batch) and the table; a number behind it means that only
so many-th write dies. With `stop` instead, the process stands still before the write until somebody lets it go on
(SIGSTOP, SIGCONT). Without NIGHTSTREAM_FAULT it is the console script. The process must lead a process group of its
own, because the group is what dies.
"""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from nightstream import cli
from nightstream.ingest import booking
from nightstream.serving import commits, speed_layer
from nightstream.store.storage import Storage

VARIABLE = "NIGHTSTREAM_FAULT"
# Written side by side: these wait for one another, so that the write before which the process dies is the last one,
# and the write after which it dies the first.
TOGETHER = {
    "append": {"raw_events", "events", "quarantine", "duplicates"},
    "merge": {"user_vectors", "recommendations"},
}
PATIENCE = 6.0  # seconds; where a batch does not have the chosen write, the others go on after it


def signal_all(number: int) -> None:
    """To this process and its JVM."""
    group = os.getpgrp()
    if group != os.getpid():
        raise RuntimeError("this process does not lead its group: the signal would reach who started it")
    os.killpg(group, number)


def die() -> None:
    signal_all(signal.SIGKILL)
    time.sleep(60)


class Fault:
    def __init__(self, text: str) -> None:
        self.when, self.operation, self.table, *number = text.split()
        self.left = int(number[0]) if number else 1
        together = TOGETHER.get(self.operation, set())
        self.beside = together - {self.table} if self.table in together else set()
        self._running = 0
        self._changed = threading.Condition()

    def around(self, operation: str, table_of: Callable[..., str], real: Callable[..., Any]) -> Callable[..., Any]:
        """The real write, with the fault where it is the chosen one."""

        @functools.wraps(real)
        def write(*arguments: Any, **options: Any) -> Any:
            table = table_of(*arguments)
            chosen = (operation, table) == (self.operation, self.table)
            if chosen and self.when == "stop" and self._is_due():
                signal_all(signal.SIGSTOP)
            beside = operation == self.operation and table in self.beside
            if chosen and self.when == "before" and self._is_due():
                self._let_others_end()
                die()
            if beside and self.when == "after":
                time.sleep(PATIENCE)
            with self._counted() if beside else nullcontext():
                result = real(*arguments, **options)
            if chosen and self.when == "after" and self._is_due():
                die()
            return result

        return write

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with self._changed:
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def _is_due(self) -> bool:
        self.left -= 1
        return self.left == 0

    def _let_others_end(self) -> None:
        if self.beside:
            time.sleep(1)
            with self._changed:
                self._changed.wait_for(lambda: self._running == 0, 10 * PATIENCE)


def install(fault: Fault) -> None:
    named = [(commits, "_merge_states", "user_vectors"), (commits, "_merge_lists", "recommendations")]
    for owner, name, table in [*named, (booking, "supersede", "events")]:
        around = fault.around("merge", lambda *_, table=table: table, getattr(owner, name))
        setattr(owner, name, around)
    Storage.append = fault.around("append", lambda self, spec, *_: spec.name, Storage.append)
    whole = fault.around("batch", lambda *_: "stream", speed_layer.SpeedLayer.__call__)
    speed_layer.SpeedLayer.__call__ = whole


if __name__ == "__main__":
    if told := os.environ.get(VARIABLE):
        install(Fault(told))
    cli.main()
