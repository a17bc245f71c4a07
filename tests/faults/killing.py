"""Starting and killing real processes of the command line, and telling how far a stream has come."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from killable import VARIABLE

KILLABLE = Path(__file__).with_name("killable.py")
LONGEST_WAIT = 900.0  # seconds; a process that has come no further by then is stuck


class Victim:
    """One command of nightstream, run over and over in processes of their own, all with one settings file.

    log: what they all say. Use as a context: at its end nothing is left running.
    """

    def __init__(self, command: list[str], settings: Path, log: Path) -> None:
        self.command = [sys.executable, str(KILLABLE), *command, "--settings", str(settings)]
        self.log = log
        self.process: subprocess.Popen | None = None
        self._groups: list[int] = []

    def __enter__(self) -> Victim:
        return self

    def __exit__(self, *error: object) -> None:
        for group in self._groups:
            _kill_group(group)

    def start(self, fault: str = "") -> None:
        environment = {**os.environ, VARIABLE: fault}
        with self.log.open("a") as log:
            log.write(f"\n--- {fault or 'started'}\n")
            log.flush()
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, start_new_session=True, env=environment
            )
        self._groups.append(self.process.pid)

    def kill(self, with_jvm: bool = True) -> None:
        """SIGKILL to all of it, or to Python alone: its JVM then finds out and ends by itself."""
        process = self._started()
        if with_jvm:
            _kill_group(process.pid)
        else:
            process.kill()
        process.wait()

    def died(self, seconds: float = LONGEST_WAIT) -> None:
        """Wait for the process to die of its fault."""
        assert self.ended(seconds) == -signal.SIGKILL, self.said()

    def stood_still(self, seconds: float = LONGEST_WAIT) -> None:
        """Wait for the process to stop of its fault."""
        process, deadline = psutil.Process(self._started().pid), time.monotonic() + seconds
        while process.status() != psutil.STATUS_STOPPED:
            assert self.exit_code() is None, f"it ended by itself with {self.exit_code()}: {self.said()}"
            assert time.monotonic() < deadline, f"after {seconds} s it had not stopped: {self.said()}"
            time.sleep(0.1)

    def go_on(self) -> None:
        os.killpg(self._started().pid, signal.SIGCONT)

    def ended(self, seconds: float = LONGEST_WAIT) -> int:
        """Wait for the process to end; its exit code."""
        try:
            return self._started().wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"after {seconds} s it had not ended: {self.said()}") from None

    def exit_code(self) -> int | None:
        return self._started().poll()

    def said(self) -> str:
        return self.log.read_text()[-6000:]

    def _started(self) -> subprocess.Popen:
        assert self.process is not None
        return self.process


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


def batches_done(checkpoint: str) -> int:
    """How many micro-batches a stream has ended, by its checkpoint."""
    folder = Path(checkpoint) / "commits"
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    return max((int(n) + 1 for n in names if n.isdigit()), default=0)


def files_taken(checkpoint: str) -> int:
    """How many files a stream has taken into its micro-batches, by its checkpoint."""
    folder = Path(checkpoint) / "sources" / "0"
    logs = [p for p in folder.iterdir() if not p.name.startswith(".")] if folder.is_dir() else []
    # A compacted log repeats what the logs before it said.
    return len({path for log in logs for path in re.findall(r'"path":"([^"]+)"', log.read_text())})


def kill_at_random(
    victim: Victim, checkpoint: str, rng: random.Random, start_seconds: float, may_end: tuple[int, ...] = ()
) -> None:
    """Start a stream and kill it: while it starts (one in four), else some time after it has ended another micro-batch.

    start_seconds: how long starting takes, more or less. may_end: exit codes with which it may end by itself before.
    """
    before, waited_for = batches_done(checkpoint), rng.random() >= 0.25
    victim.start()
    deadline = time.monotonic() + (LONGEST_WAIT if waited_for else rng.uniform(0.2, 1.2) * start_seconds)
    while time.monotonic() < deadline and not (waited_for and batches_done(checkpoint) > before):
        if (code := victim.exit_code()) is not None:
            assert code in may_end, f"it ended by itself with {code}: {victim.said()}"
            return
        time.sleep(0.1)
    assert not waited_for or time.monotonic() < deadline, f"no micro-batch in {LONGEST_WAIT} s: {victim.said()}"
    if waited_for:
        time.sleep(rng.uniform(0.0, 0.4) * start_seconds)
    assert victim.exit_code() in (None, *may_end), victim.said()
    victim.kill(with_jvm=rng.random() < 0.7)
