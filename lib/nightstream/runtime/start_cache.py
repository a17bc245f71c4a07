"""What makes Spark start faster the next time: the files of its packages, and an archive of the classes of its JVM.

The first process that ends well writes both. The archive is Java's class data sharing (`-XX:ArchiveClassesAtExit`, Java
13 and later): Java itself checks whether an archive fits and is whole, and starts without it where it is not.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nightstream.files import write_atomically
from nightstream.runtime import console

log = logging.getLogger(__name__)

_QUIET = "-Xshare:auto -XX:+VerifySharedSpaces -Xlog:cds=off -Xlog:cds+dynamic=off -Xlog:class+path=off"
_DEFAULTS = "spark-defaults.conf"
_ARGUMENTS = "PYSPARK_SUBMIT_ARGS"
_LONGEST_SECONDS = 120


def folder_of(setting: str | None) -> Path | None:
    """The folder of `spark.cache`, made where it is missing; None for none."""
    if setting is None:
        return None
    folder = Path(setting).expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.info("nothing is kept for a faster start", extra={"reason": str(error)})
        return None
    return folder


class StartCache:
    """Of one Java and one Spark, below a folder; several processes may use and write it at a time."""

    def __init__(self, folder: Path, java: str, spark_home: Path) -> None:
        """java: what tells one Java from another, such as path and version."""
        self.folder = folder
        jars = sorted((jar.name, jar.stat().st_mtime_ns) for jar in (spark_home / "jars").glob("*.jar"))
        self._fits = hashlib.sha256(f"{java} {spark_home} {jars}".encode()).hexdigest()[:16]
        self._conf = Path(os.environ.get("SPARK_CONF_DIR") or spark_home / "conf")
        self.archive = folder / f"classes-{self._fits}.jsa"
        self._written = folder / f"classes-{self._fits}.{os.getpid()}.part"
        # Java refuses an archive where a folder on the class path holds files, and Spark's settings lie in one.
        entries = {entry.name for entry in self._conf.iterdir()} if self._conf.is_dir() else set()
        self._can_archive = entries <= {_DEFAULTS} and "--properties-file" not in os.environ.get(_ARGUMENTS, "")

    @property
    def is_lacking(self) -> bool:
        """Whether there is something to keep."""
        return self._can_archive and not self.archive.exists()

    def options(self) -> str:
        """What Java is started with: to use the archive, or where there is none, to write one when it ends."""
        if not self._can_archive:
            return ""
        if self.archive.exists():
            return f"{_QUIET} -XX:SharedArchiveFile={self.archive}"
        return f"{_QUIET} -XX:ArchiveClassesAtExit={self._written}"

    @contextmanager
    def environment(self) -> Iterator[None]:
        """Inside, Spark's settings are given by their file's name, and no folder on the class path holds files."""
        if not self._can_archive:
            yield
            return
        empty, defaults = self.folder / "no-settings", self._conf / _DEFAULTS
        empty.mkdir(exist_ok=True)
        before = {name: os.environ.get(name) for name in ("SPARK_CONF_DIR", _ARGUMENTS)}
        os.environ["SPARK_CONF_DIR"] = str(empty)
        if defaults.is_file():
            os.environ[_ARGUMENTS] = f"--properties-file '{defaults}' {before[_ARGUMENTS] or 'pyspark-shell'}"
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value

    def keep(self, jvm: subprocess.Popen[Any]) -> None:
        """Wait until the JVM has ended and has written the archive."""
        with suppress(subprocess.TimeoutExpired), console.working(lambda: "keeping Spark's classes for faster starts"):
            jvm.wait(_LONGEST_SECONDS)
        # Another process may have been quicker; either will do.
        with suppress(OSError):
            os.replace(self._written, self.archive)
            log.info("kept Spark's classes for faster starts", extra={"path": str(self.archive)})

    def jars(self, packages: str) -> list[str] | None:
        """The files of these packages (Maven coordinates, with commas between them) and of all that they need; None
        where they are not known, or no longer all there."""
        with suppress(OSError, ValueError):
            found = json.loads(self._list_of(packages).read_text(encoding="utf-8"))
            if isinstance(found, list) and found and all(Path(name).is_file() for name in found):
                return found
        return None

    def keep_jars(self, packages: str, jars: list[str]) -> None:
        with suppress(OSError):
            write_atomically(self._list_of(packages), json.dumps(jars, indent=1).encode())

    def _list_of(self, packages: str) -> Path:
        return self.folder / f"jars-{hashlib.sha256(f'{self._fits} {packages}'.encode()).hexdigest()[:16]}.json"
