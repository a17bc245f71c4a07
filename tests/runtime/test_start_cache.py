"""What is kept of a start for the next one."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from nightstream.errors import MachineError
from nightstream.runtime import session, start_cache
from nightstream.runtime.start_cache import StartCache

ROOT = Path(__file__).parents[2]
START = """
import sys
from pathlib import Path
from nightstream.runtime import session, settings
from pyspark import SparkContext

spark = session.build(settings.load(["conf/base.yaml"], [f"spark.cache={sys.argv[1]}", "spark.driver_memory=1g"]).spark)
assert spark.range(3).count() == 3
spark.range(1).write.format("delta").save(sys.argv[2])
print(Path(f"/proc/{SparkContext._gateway.proc.pid}/maps").read_text().count(".jsa"))
print(spark.conf.get("spark.jars.packages", ""))
spark.stop()
"""


@pytest.fixture
def spark_home(tmp_path, monkeypatch) -> Path:
    for name in ("SPARK_CONF_DIR", "PYSPARK_SUBMIT_ARGS"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "spark"
    for name in ("jars", "conf"):
        (home / name).mkdir(parents=True)
    (home / "jars" / "a.jar").touch()
    return home


def recorded(cache: StartCache) -> bool:
    """A process in place of the JVM, which writes what it is started to write."""
    options = shlex.split(cache.options(record=True))
    (part,) = (o.partition("=")[2] for o in options if "ArchiveClassesAtExit" in o)
    with subprocess.Popen(["touch", part]) as jvm:
        return cache.keep(jvm)


def test_an_archive_is_used_by_the_java_and_the_spark_that_it_was_recorded_with(tmp_path, spark_home):
    cache = StartCache(tmp_path, "java 17", spark_home)
    assert cache.options() == ""
    assert recorded(cache)
    assert f"-XX:SharedArchiveFile={cache.archive}" in cache.options()
    # Whoever records anew starts without.
    assert "SharedArchiveFile" not in cache.options(record=True)
    assert StartCache(tmp_path, "java 21", spark_home).options() == ""
    (spark_home / "jars" / "b.jar").touch()
    assert StartCache(tmp_path, "java 17", spark_home).options() == ""


@pytest.mark.parametrize("name", ["my cache", 'the "good" one', "back\\slash", "it's", "缓存"])
def test_the_folder_may_have_any_name(tmp_path, spark_home, name):
    cache = StartCache(tmp_path / name, "java", spark_home)
    assert recorded(cache)
    assert f"-XX:SharedArchiveFile={cache.archive}" in shlex.split(cache.options())


def test_a_jvm_that_wrote_none_leaves_nothing(tmp_path, spark_home):
    cache = StartCache(tmp_path, "java", spark_home)
    with subprocess.Popen(["false"]) as jvm:
        assert not cache.keep(jvm)
    assert cache.options() == ""


def test_what_an_earlier_recording_left_is_no_archive(tmp_path, spark_home):
    cache = StartCache(tmp_path, "java", spark_home)
    cache.archive.with_suffix(".part").touch()
    cache.discard_part()
    cache.discard_part()
    with subprocess.Popen(["true"]) as jvm:
        assert not cache.keep(jvm)
    assert cache.options() == ""


def test_a_jvm_that_takes_too_long_is_ended_and_leaves_nothing(tmp_path, spark_home, monkeypatch):
    monkeypatch.setattr(start_cache, "_LONGEST_SECONDS", 0.1)
    cache = StartCache(tmp_path, "java", spark_home)
    cache.archive.with_suffix(".part").touch()
    with subprocess.Popen(["sleep", "60"]) as jvm:
        assert not cache.keep(jvm)
        assert jvm.returncode == -signal.SIGKILL
    assert not list(tmp_path.glob("classes-*"))


def test_an_archive_fits_jars_whose_times_were_cut_to_seconds(tmp_path, spark_home):
    jar = spark_home / "jars" / "a.jar"
    os.utime(jar, ns=(0, 5_123_456_789))
    assert recorded(StartCache(tmp_path, "java", spark_home))
    os.utime(jar, (0, 5))
    assert "SharedArchiveFile" in StartCache(tmp_path, "java", spark_home).options()
    jar.write_text("another")
    os.utime(jar, (0, 5))
    assert StartCache(tmp_path, "java", spark_home).options() == ""


def test_the_default_settings_of_spark_are_given_by_name(tmp_path, spark_home, monkeypatch):
    defaults = spark_home / "conf" / "spark-defaults.conf"
    defaults.touch()
    monkeypatch.setenv("PYSPARK_SUBMIT_ARGS", "--verbose pyspark-shell")
    cache = StartCache(tmp_path, "java", spark_home)
    with cache.environment():
        assert list(Path(os.environ["SPARK_CONF_DIR"]).iterdir()) == []
        assert os.environ["PYSPARK_SUBMIT_ARGS"] == f"--properties-file '{defaults}' --verbose pyspark-shell"
    assert "SPARK_CONF_DIR" not in os.environ
    assert os.environ["PYSPARK_SUBMIT_ARGS"] == "--verbose pyspark-shell"


@pytest.mark.parametrize("name", ["log4j2.properties", "hive-site.xml", "spark-env.sh"])
def test_other_files_beside_them_stay_on_the_class_path(tmp_path, spark_home, name):
    recorded(StartCache(tmp_path, "java", spark_home))
    (spark_home / "conf" / name).touch()
    cache = StartCache(tmp_path, "java", spark_home)
    assert not cache.can_archive
    assert cache.options() == ""
    with cache.environment():
        assert "SPARK_CONF_DIR" not in os.environ


def test_files_of_packages_are_known_while_all_are_there(tmp_path, spark_home):
    cache, files = StartCache(tmp_path, "java", spark_home), [tmp_path / "1.jar", tmp_path / "2.jar"]
    for file in files:
        file.touch()
    assert cache.jars("a:b:1") is None
    cache.keep_jars("a:b:1", [str(file) for file in files])
    assert cache.jars("a:b:1") == [str(file) for file in files]
    assert cache.jars("a:b:2") is None
    files[1].unlink()
    assert cache.jars("a:b:1") is None
    for kept in tmp_path.glob("*.json"):
        kept.write_text("{")
    assert cache.jars("a:b:1") is None


def test_without_a_folder_nothing_is_kept(tmp_path, spark_home, caplog):
    (tmp_path / "file").touch()
    caplog.set_level("INFO")
    assert session._cache_of(None, "java", spark_home) is None
    assert session._cache_of(str(tmp_path / "file" / "below"), "java", spark_home) is None
    assert "spark.cache" in caplog.text
    assert session._cache_of(str(tmp_path / "new"), "java", spark_home).folder.is_dir()


def test_nothing_is_recorded_where_others_start_spark_or_nothing_can_be_kept(settings, monkeypatch):
    from pyspark import SparkContext

    monkeypatch.setattr(SparkContext, "_gateway", None)
    with pytest.raises(MachineError, match=r"spark\.cache is null"):
        session.record(settings.spark.model_copy(update={"cache": None}), lambda spark: None)
    with pytest.raises(MachineError, match="another process"):
        session.record(settings.spark.model_copy(update={"remote": "sc://127.0.0.1"}), lambda spark: None)
    monkeypatch.setattr(SparkContext, "_gateway", object())
    with pytest.raises(MachineError, match="another process"):
        session.record(settings.spark, lambda spark: None)


@pytest.mark.slow
def test_a_start_uses_what_the_warm_up_has_kept_and_a_damaged_archive_does_no_harm(tmp_path):
    def run(*command: str) -> str:
        result = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def start(name: str) -> list[str]:
        return run("-c", START, str(folder), str(tmp_path / name)).split("\n")[:2]

    folder = tmp_path / 'my "cache"'
    first = start("first")
    assert "io.delta" in first[1]
    command = ["-c", "from nightstream.cli import main; main()", "warm-up", "--settings", "conf/base.yaml"]
    # Those of a cluster do not get in the way.
    elsewhere = ("--set", "spark.master=spark://127.0.0.1:1")
    kept = run(*command, "--set", f"spark.cache={folder}", "--set", "spark.driver_memory=1g", *elsewhere)
    archive = Path(json.loads(kept)["archive"])
    assert archive.parent == folder
    assert not list(archive.parent.glob("*.part"))
    second = start("second")
    assert second[1] == ""
    assert int(second[0]) > int(first[0])
    content = bytearray(archive.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) // 2)
    archive.chmod(0o644)
    archive.write_bytes(content)
    assert int(start("third")[0]) <= int(first[0])
