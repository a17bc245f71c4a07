"""The Spark session: the only place that knows how one is built."""

from __future__ import annotations

import logging
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies

from nightstream.errors import MachineError
from nightstream.runtime import console
from nightstream.runtime.jvm_log import JvmLog
from nightstream.runtime.settings import SparkSettings
from nightstream.runtime.start_cache import StartCache

log = logging.getLogger(__name__)

DEFAULT_CONNECT_PORT = 15002
SUPPORTED_JAVA = (17, 21)
_WANTED = "install Java 17 or 21 (on Debian: apt-get install openjdk-17-jre-headless) and set JAVA_HOME to it"
_EXTENSION = "io.delta.sql.DeltaSparkSessionExtension"
_CHECKPOINTS = "org.apache.spark.sql.execution.streaming.checkpointing.FileSystemBasedCheckpointFileManager"
_PACKAGES, _JARS, _JAVA_OPTIONS = "spark.jars.packages", "spark.jars", "spark.driver.extraJavaOptions"
_GATEWAY = ("PYSPARK_GATEWAY_PORT", "PYSPARK_GATEWAY_SECRET")
# What spark-submit notes about itself; a JVM started anew finds its own values.
_OF_THE_LAUNCH = ("spark.submit.", "spark.app.", "spark.driver.host", "spark.driver.port", "spark.repl.")


def check_java() -> str:
    """Path and version of `java`. Raises MachineError unless it is there in a version that Spark 4.2 supports."""
    home = os.environ.get("JAVA_HOME")
    java = str(Path(home) / "bin" / "java") if home else shutil.which("java")
    if java is None or not Path(java).exists():
        raise MachineError(f"Spark needs Java and none was found{f' in JAVA_HOME={home}' if home else ''}; {_WANTED}")
    output = subprocess.run([java, "-version"], capture_output=True, text=True, check=False)
    match = re.search(r'version "(\d+)', output.stderr + output.stdout)
    if match is None or int(match[1]) not in SUPPORTED_JAVA:
        version = match[1] if match else "of unknown version"
        raise MachineError(f"Java {version} at {java} does not run Spark 4.2; {_WANTED}")
    return f"{java} {output.stderr}{output.stdout}"


def build(
    settings: SparkSettings,
    app_name: str = "nightstream",
    extra: dict[str, str] | None = None,
    record: bool = False,
):
    """The running session where there is one (Databricks), one on the Spark Connect server that SPARK_REMOTE or
    spark.remote names, else one of our own, with Delta.

    Args:
        settings: Of Spark; under spark-submit its own settings win over them.
        app_name: What Spark calls the application.
        extra: Spark settings on top of all.
        record: Whether the JVM writes down its classes, see `record`.

    Raises:
        MachineError: Java is missing or another one, the packages cannot be fetched, or no server answers.
    """
    from pyspark.sql import SparkSession

    session = SparkSession.getActiveSession()
    remote = _remote(settings)
    if session is None and "DATABRICKS_RUNTIME_VERSION" in os.environ:
        session = SparkSession.builder.appName(app_name).getOrCreate()
    elif session is None and remote is not None:
        session = _connected(remote, app_name)
    if session is not None:
        _set_what_can_be({**_common(settings), **(extra or {})}, session)
        return session
    given = _submitted(settings)
    master = given.get("spark.master", settings.master)
    configuration = {**_common(settings), **_own(settings, master), **given, **(extra or {})}
    if _GATEWAY[0] not in os.environ:
        configuration = _launch(configuration, settings.cache, record)
    builder = SparkSession.builder.appName(app_name)
    for key, value in configuration.items():
        builder = builder.config(key, value)
    session = builder.getOrCreate()
    session.conf.set("spark.sql.session.timeZone", "UTC")
    return session


def record(settings: SparkSettings, work: Callable[[Any], None]) -> Path:
    """Do the work in a session of its own and archive the classes that its JVM has loaded, for faster starts.

    Args:
        settings: `cache` says where the archive goes. Whatever the master, the work is done on this machine.
        work: What commands do with Spark; given the session.

    Returns:
        The path of the archive.

    Raises:
        MachineError: Another process starts the JVMs here, nothing can be kept, or Java has not written the archive.
    """
    from pyspark import SparkContext

    elsewhere = _GATEWAY[0] in os.environ or "DATABRICKS_RUNTIME_VERSION" in os.environ or _remote(settings)
    if elsewhere or SparkContext._gateway is not None:
        raise MachineError("Spark is started by another process here; run nightstream warm-up where this one starts it")
    cache = _cache_of(settings.cache, check_java(), _spark_home())
    if cache is None:
        raise MachineError(f"spark.cache is {settings.cache or 'null'}: name a folder that can be written")
    if not cache.can_archive:
        raise MachineError(
            "Java archives no classes where Spark's conf folder holds more than spark-defaults.conf, or where "
            "PYSPARK_SUBMIT_ARGS names a --properties-file; move those settings into spark-defaults.conf"
        )
    cache.discard_part()
    session = build(settings.model_copy(update={"master": "local[2]"}), "nightstream warm-up", record=True)
    try:
        work(session)
    finally:
        session.stop()
    gateway: Any = SparkContext._gateway
    SparkContext._gateway = SparkContext._jvm = None
    gateway.shutdown()
    # Spark's JVM ends when nobody can write to it any more.
    gateway.proc.stdin.close()
    if not cache.keep(gateway.proc):
        raise MachineError(
            f"Java has not written {cache.archive}; look for room in its folder and run nightstream warm-up again"
        )
    return cache.archive


def is_remote(session: Any) -> bool:
    """Whether a session is one of Spark Connect."""
    return type(session).__module__.startswith("pyspark.sql.connect.")


def first_in_line(session: Any) -> None:
    """Let the jobs of this thread get the next free task slot, however many tasks others have waiting.

    Over Spark Connect the server decides.
    """
    if session is not None and not is_remote(session):
        session.sparkContext.setLocalProperty("spark.scheduler.pool", "first in line")


def _remote(settings: SparkSettings) -> str | None:
    return os.environ.get("SPARK_REMOTE") or settings.remote


def _connected(remote: str, app_name: str) -> Any:
    """A session on a Spark Connect server. remote: sc://host:port, with parameters behind it where the server asks for
    them. Raises MachineError where nobody answers there, and where this Python lacks the client."""
    # What follows host and port may hold a token.
    server = urlsplit(remote)
    shown = f"sc://{server.hostname}:{server.port or DEFAULT_CONNECT_PORT}"
    if not getproxies():
        # The client itself would try for ten minutes.
        try:
            socket.create_connection((server.hostname or "", server.port or DEFAULT_CONNECT_PORT), 10).close()
        except OSError as error:
            raise MachineError(
                f"no Spark Connect server answers at {shown} ({error}); start it, or mend spark.remote or SPARK_REMOTE"
            ) from error
    from pyspark.sql import SparkSession

    try:
        return SparkSession.builder.remote(remote).appName(app_name).getOrCreate()
    except ImportError as error:
        raise MachineError(f"Spark Connect needs more of PySpark: pip install 'pyspark[connect]' ({error})") from error


def _common(settings: SparkSettings) -> dict[str, str]:
    return {
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.shuffle.partitions": str(settings.shuffle_partitions),
        "spark.sql.adaptive.enabled": str(settings.adaptive).lower(),
        # Small tables and short micro-batches: the fixed cost of each stage is what counts.
        "spark.databricks.delta.snapshotPartitions": "1",
        "spark.databricks.delta.merge.materializeSource": "none",
        # A Delta source that drops or widens a column changes the payloads, and those are validated one by one.
        "spark.databricks.delta.streaming.allowSourceColumnRenameAndDrop": "always",
        "spark.databricks.delta.streaming.allowSourceColumnTypeChange": "always",
        # Options of a source in plans and errors: the login of Kafka is in one whose name says nothing of a password.
        "spark.sql.redaction.options.regex": "(?i)url|secret|password|token|key|jaas",
        "spark.sql.execution.arrow.pyspark.enabled": "true",
        "spark.sql.execution.arrow.maxRecordsPerBatch": "2048",
    }


def _own(settings: SparkSettings, master: str) -> dict[str, str]:
    configuration = {
        "spark.sql.extensions": _EXTENSION,
        "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
        "spark.master": master,
        "spark.sql.warehouse.dir": settings.warehouse,
        "spark.driver.memory": settings.driver_memory,
        # Jobs of another pool than the default one need not wait until its tasks have run, see first_in_line.
        "spark.scheduler.mode": "FAIR",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        # A micro-batch goes through more than the 100 compiled classes that Spark keeps, so it would compile all anew.
        "spark.sql.codegen.cache.maxEntries": "10000",
    }
    if master.startswith("local"):
        configuration |= {"spark.driver.host": "127.0.0.1", "spark.driver.bindAddress": "127.0.0.1"}
        # By default Hadoop starts ten processes (chmod, readlink) for each file of a local checkpoint, and a
        # micro-batch writes three. This one renames a finished file, too, which in a local folder is atomic.
        configuration["spark.sql.streaming.checkpointFileManagerClass"] = _CHECKPOINTS
    if settings.packages:
        configuration[_PACKAGES] = ",".join(settings.packages)
    log4j = Path(str(files("nightstream.runtime") / "log4j2.properties"))
    if log4j.is_file():
        # As a URI, it has no spaces: Spark splits the options at them.
        configuration[_JAVA_OPTIONS] = f"-Dlog4j2.configurationFile={log4j.absolute().as_uri()}"
    return configuration


def _set_what_can_be(configuration: dict[str, str], session: Any) -> None:
    """Set what the session lets us set, and warn of the settings that it keeps otherwise.

    Shared and serverless clusters refuse settings that they decide themselves.
    """
    refused: dict[str, str] = {}
    for key, value in configuration.items():
        try:
            session.conf.set(key, value)
        except Exception as error:
            if not _has(session, key, value):
                refused[key] = str(error).partition("\n")[0]
    if refused:
        log.warning(
            "the session refuses settings of ours and keeps its own values of %s",
            ", ".join(refused),
            extra={"reason": next(iter(refused.values()))},
        )


def _has(session: Any, key: str, value: str) -> bool:
    """Whether the setting has this value; False where the session does not tell."""
    try:
        return session.conf.get(key, None) == value
    except Exception:
        return False


def _submitted(settings: SparkSettings) -> dict[str, str]:
    """The settings given to spark-submit, none outside it.

    spark-submit has started the JVM before we could ask for Delta. Where it lacks Delta, that JVM is left alone and
    `build` starts another with the same settings and the packages.
    """
    if _GATEWAY[0] not in os.environ:
        return {}
    from pyspark import SparkContext
    from pyspark.java_gateway import launch_gateway

    SparkContext._ensure_initialized(gateway=launch_gateway())
    jvm: Any = SparkContext._jvm
    pairs = jvm.org.apache.spark.SparkConf().getAll()
    given = {pair._1(): pair._2() for pair in pairs}
    if _has_delta(jvm):
        return given
    if given.get("spark.submit.deployMode") == "cluster":
        raise MachineError(f"the driver has no Delta Lake: give spark-submit --packages {','.join(settings.packages)}")
    gateway: Any = SparkContext._gateway
    gateway.close()
    SparkContext._gateway = SparkContext._jvm = None
    for name in _GATEWAY:
        os.environ.pop(name, None)
    return {key: value for key, value in given.items() if not key.startswith(_OF_THE_LAUNCH)}


def _has_delta(jvm: Any) -> bool:
    from py4j.protocol import Py4JJavaError

    try:
        jvm.java.lang.Thread.currentThread().getContextClassLoader().loadClass(_EXTENSION)
    except Py4JJavaError:
        return False
    return True


def _launch(configuration: dict[str, str], cache: str | None, record: bool) -> dict[str, str]:
    """Start the JVM ourselves, so that what it says at its start goes through our log.

    Returns the configuration that it was started with. cache: the setting. record: as in build.
    """
    java = check_java()
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    os.environ.setdefault("PYSPARK_DRIVER_PYTHON", sys.executable)
    from pyspark import SparkConf, SparkContext
    from pyspark.errors import PySparkRuntimeError
    from pyspark.java_gateway import launch_gateway

    if SparkContext._gateway is not None:
        return configuration
    start_cache = _cache_of(cache, java, _spark_home())
    started = configuration if start_cache is None else _quickened(configuration, start_cache, record)
    conf = SparkConf(loadDefaults=False).setAll(list(started.items()))
    environment = nullcontext() if start_cache is None else start_cache.environment()
    jvm_log = JvmLog()
    try:
        with console.working(lambda: "starting Spark"), jvm_log, environment:
            gateway = launch_gateway(conf, {"stderr": jvm_log.pipe})
    except PySparkRuntimeError as error:
        packages = configuration.get(_PACKAGES, "")
        if jvm_log.said("unresolved dependency", "download failed", "not found"):
            raise MachineError(
                f"Spark could not fetch {packages}: check the connection to the Maven repository, "
                "or remove half-fetched packages from ~/.m2 and ~/.ivy2.5.2"
            ) from error
        raise MachineError(f"Spark's JVM did not start: {jvm_log.last() or 'it said nothing'}") from error
    SparkContext._ensure_initialized(gateway=gateway)
    if start_cache is not None and _PACKAGES in started:
        jvm: Any = SparkContext._jvm
        resolved = _files(jvm.org.apache.spark.SparkConf().get(_JARS, ""))
        own = _files(started.get(_JARS, ""))
        start_cache.keep_jars(started[_PACKAGES], [file for file in resolved if file not in own])
    return started


def _cache_of(setting: str | None, java: str, spark_home: Path) -> StartCache | None:
    """setting: `spark.cache`."""
    if setting is None:
        return None
    try:
        return StartCache(Path(setting).expanduser().absolute(), java, spark_home)
    except OSError as error:
        log.info("nothing is kept for a faster start: spark.cache can't be written", extra={"reason": str(error)})
        return None


def _files(jars: str) -> list[str]:
    """The paths in a list of `spark.jars`."""
    return [unquote(urlsplit(jar).path) for jar in jars.split(",") if jar]


def _spark_home() -> Path:
    from pyspark.find_spark_home import _find_spark_home

    return Path(_find_spark_home())


def _quickened(configuration: dict[str, str], start_cache: StartCache, record: bool) -> dict[str, str]:
    """The configuration with what is kept of earlier starts; packages whose files are known are no longer in it."""
    started = dict(configuration)
    if options := start_cache.options(record):
        started[_JAVA_OPTIONS] = f"{started.get(_JAVA_OPTIONS, '')} {options}".strip()
    jars = start_cache.jars(started.get(_PACKAGES, ""))
    if jars is not None:
        del started[_PACKAGES]
        started[_JARS] = ",".join(filter(None, [started.get(_JARS), *jars]))
    return started
