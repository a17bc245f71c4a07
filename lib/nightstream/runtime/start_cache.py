"""What makes Spark start faster the next time: the files of its packages, and an archive of the classes of its JVM.

Every start that resolves packages writes the list of their files. The archive is Java's class data sharing
(`-XX:ArchiveClassesAtExit`, Java 13 and later); only a JVM that does nothing else writes one, see session.record.
Java itself checks whether an archive fits and is whole, and starts without it where it is not.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nightstream.files import write_atomically
from nightstream.runtime import console

_QUIET = "-Xshare:auto -XX:+VerifySharedSpaces -Xlog:cds=off -Xlog:cds+dynamic=off -Xlog:class+path=off"
_DEFAULTS = "spark-defaults.conf"
_ARGUMENTS = "PYSPARK_SUBMIT_ARGS"
_LONGEST_SECONDS = 120


class StartCache:
    """What is kept for one Java and one Spark. Several processes may use and write it at a time."""

    def __init__(self, folder: Path, java: str, spark_home: Path) -> None:
        """java: what tells one Java from another, such as path and version. Raises OSError where the folder can't be
        made."""
        self.folder = folder
        self._no_settings = folder / "no-settings"
        self._no_settings.mkdir(parents=True, exist_ok=True)
        # In whole seconds: the layers of a container image keep no more.
        found = ((jar.name, jar.stat()) for jar in (spark_home / "jars").glob("*.jar"))
        jars = sorted((name, stat.st_size, int(stat.st_mtime)) for name, stat in found)
        self._fits = hashlib.sha256(f"{java} {spark_home} {jars}".encode()).hexdigest()[:16]
        self._conf = Path(os.environ.get("SPARK_CONF_DIR") or spark_home / "conf")
        self.archive = folder / f"classes-{self._fits}.jsa"
        self._written = self.archive.with_suffix(".part")
        # Java refuses an archive where a folder on the class path holds files, and Spark's settings lie in one.
        entries = {entry.name for entry in self._conf.iterdir()} if self._conf.is_dir() else set()
        self.can_archive = entries <= {_DEFAULTS} and "--properties-file" not in os.environ.get(_ARGUMENTS, "")

    def options(self, record: bool = False) -> str:
        """What Java is started with: to use the archive where there is one, or to write one when it ends."""
        if record:
            return f"{_QUIET} {_whole(f'-XX:ArchiveClassesAtExit={self._written}')}"
        if self.can_archive and self.archive.exists():
            return f"{_QUIET} {_whole(f'-XX:SharedArchiveFile={self.archive}')}"
        return ""

    def discard_part(self) -> None:
        """Delete what an earlier recording has left half-done."""
        self._written.unlink(missing_ok=True)

    @contextmanager
    def environment(self) -> Iterator[None]:
        """Inside, Spark's settings are given by their file's name, and no folder on the class path holds files."""
        if not self.can_archive:
            yield
            return
        defaults = self._conf / _DEFAULTS
        before = {name: os.environ.get(name) for name in ("SPARK_CONF_DIR", _ARGUMENTS)}
        os.environ["SPARK_CONF_DIR"] = str(self._no_settings)
        if defaults.is_file():
            os.environ[_ARGUMENTS] = f"--properties-file '{defaults}' {before[_ARGUMENTS] or 'pyspark-shell'}"
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value

    def keep(self, jvm: subprocess.Popen[Any]) -> bool:
        """Wait until the JVM has ended and has written the archive; whether it has."""
        try:
            with console.working(lambda: "writing the archive of Spark's classes"):
                jvm.wait(_LONGEST_SECONDS)
        except subprocess.TimeoutExpired:
            jvm.kill()
            jvm.wait()
            self.discard_part()
            return False
        try:
            os.replace(self._written, self.archive)
        except OSError:
            return False
        return True

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


def _whole(option: str) -> str:
    """The option as Spark keeps it in one piece, whatever is in it."""
    escaped = option.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
