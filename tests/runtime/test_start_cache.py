"""What is kept of a start for the next one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from nightstream.runtime.start_cache import StartCache, folder_of

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
session.end(spark, keep=True)
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


def test_java_writes_an_archive_where_there_is_none_and_uses_it_where_there_is_one(tmp_path, spark_home):
    cache = StartCache(tmp_path, "java 17", spark_home)
    assert cache.is_lacking
    (written,) = (o.partition("=")[2] for o in cache.options().split() if o.startswith("-XX:ArchiveClassesAtExit"))
    with subprocess.Popen(["touch", written]) as jvm:
        cache.keep(jvm)
    assert not cache.is_lacking
    assert f"-XX:SharedArchiveFile={cache.archive}" in cache.options()
    # Each Java and each Spark has its own.
    assert StartCache(tmp_path, "java 21", spark_home).is_lacking
    (spark_home / "jars" / "b.jar").touch()
    assert StartCache(tmp_path, "java 17", spark_home).is_lacking


def test_a_jvm_that_wrote_none_leaves_nothing(tmp_path, spark_home):
    cache = StartCache(tmp_path, "java", spark_home)
    with subprocess.Popen(["false"]) as jvm:
        cache.keep(jvm)
    assert cache.is_lacking


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
    (spark_home / "conf" / name).touch()
    cache = StartCache(tmp_path, "java", spark_home)
    assert not cache.is_lacking
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


def test_without_a_folder_nothing_is_kept(tmp_path):
    (tmp_path / "file").touch()
    assert folder_of(None) is None
    assert folder_of(str(tmp_path / "file" / "below")) is None
    assert folder_of(str(tmp_path / "new")).is_dir()


@pytest.mark.slow
def test_the_second_start_uses_what_the_first_has_kept_and_a_damaged_archive_does_no_harm(tmp_path):
    def start(name: str) -> list[str]:
        command = [sys.executable, "-c", START, str(tmp_path / "cache"), str(tmp_path / name)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return result.stdout.split("\n")[:2]

    first, second = start("first"), start("second")
    assert "io.delta" in first[1]
    assert second[1] == ""
    assert int(second[0]) > int(first[0])
    (archive,) = (tmp_path / "cache").glob("*.jsa")
    content = bytearray(archive.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) // 2)
    archive.chmod(0o644)
    archive.write_bytes(content)
    assert int(start("third")[0]) <= int(first[0])
