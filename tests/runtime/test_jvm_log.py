from __future__ import annotations

import logging
import subprocess
import sys

import pytest
from nightstream.runtime.jvm_log import JvmLog, is_routine

# What Spark 4.2 said at first starts, hosts and most of the packages left out.
ROUTINE = [
    "WARNING: Using incubator modules: jdk.incubator.vector",
    ":: loading settings :: url = jar:file:/spark/jars/ivy-2.5.3.jar!/org/apache/ivy/core/settings/ivysettings.xml",
    "Ivy Default Cache set to: /home/one/.ivy2.5.2/cache",
    "The jars for the packages stored in: /home/one/.ivy2.5.2/jars",
    "io.delta#delta-spark_4.2_2.13 added as a dependency",
    ":: resolving dependencies :: org.apache.spark#spark-submit-parent-1;1.0",
    "\tconfs: [default]",
    "\tfound io.delta#delta-spark_4.2_2.13;4.4.0 in central",
    "downloading https://one.example/io/delta/delta-storage/4.4.0/delta-storage-4.4.0.jar ...",
    "\t[SUCCESSFUL ] io.delta#delta-storage;4.4.0!delta-storage.jar (102ms)",
    ":: resolution report :: resolve 12127ms :: artifacts dl 3214ms",
    "\t:: modules in use:",
    "\tio.delta#delta-storage;4.4.0 from central in [default]",
    "\torg.slf4j#slf4j-api;2.0.13 by [org.slf4j#slf4j-api;2.0.17] in [default]",
    "\t---------------------------------------------------------------------",
    "\t|                  |            modules            ||   artifacts   |",
    ":: retrieving :: org.apache.spark#spark-submit-parent-1",
    "\t35 artifacts copied, 0 already retrieved (53044kB/92ms)",
    "",
]
HOST = "You probably access the destination server through a proxy server that is not well configured."
ELSEWHERE = [
    HOST,
    HOST,
    "",
    ":: problems summary ::",
    ":::: WARNINGS",
    "\tHost two.example not found. url=https://two.example/org/slf4j/slf4j-bom/2.0.13/slf4j-bom-2.0.13.jar",
    "",
    "\tHost two.example not found. url=https://two.example/org/slf4j/slf4j-parent/2.0.13/slf4j-parent-2.0.13.jar",
    "",
    "",
    ":: USE VERBOSE OR DEBUG MESSAGE LEVEL FOR MORE DETAILS",
]
MISSING = [
    HOST,
    HOST,
    ":: problems summary ::",
    ":::: WARNINGS",
    "\tHost two.example not found. url=https://two.example/org/example/no-such-thing/1.0/no-such-thing-1.0.pom",
    "\t\tmodule not found: org.example#no-such-thing;1.0",
    "\t==== central: tried",
    "\t  https://one.example/org/example/no-such-thing/1.0/no-such-thing-1.0.pom",
    "\t\t::          UNRESOLVED DEPENDENCIES         ::",
    "\t\t:: org.example#no-such-thing;1.0: not found",
    ":: USE VERBOSE OR DEBUG MESSAGE LEVEL FOR MORE DETAILS",
    'Exception in thread "main" java.lang.RuntimeException: [unresolved dependency: org.example#no-such-thing;1.0: not '
    "found]",
    "\tat org.apache.spark.util.MavenUtils$.resolveMavenCoordinates(MavenUtils.scala:539)",
]


def run(jvm_log: JvmLog, lines: list[str], error: Exception | None = None) -> None:
    """A process in the JVM's place writes the lines and ends; the block ends in the error, where there is one."""
    write = [sys.executable, "-c", "import sys; sys.stderr.write(sys.argv[1])", "\n".join(lines) + "\n"]
    with jvm_log:
        subprocess.run(write, stderr=jvm_log.pipe, check=True)
        if error is not None:
            raise error
    jvm_log._thread.join(10)


@pytest.mark.parametrize("line", ROUTINE)
def test_what_a_start_says_when_all_goes_well_is_routine(line):
    assert is_routine(line)


@pytest.mark.parametrize("line", [line for line in MISSING if line] + ["ERROR Utils: no such port", "Error: no JVM"])
def test_what_tells_of_a_failure_is_not_routine(line):
    assert not is_routine(line)


def test_hosts_that_lack_what_another_has_are_not_told(caplog):
    run(JvmLog(), [*ROUTINE, *ELSEWHERE, *ROUTINE])
    assert caplog.records == []


def test_what_comes_after_the_problems_is_told(caplog):
    later = ["WARN Utils: the port is taken", "\tat org.apache.spark.util.Utils", "ERROR Files: disk full"]
    run(JvmLog(), [*ELSEWHERE, *later])
    assert [(r.levelno, r.getMessage()) for r in caplog.records] == [
        (logging.WARNING, "Utils: the port is taken"),
        (logging.WARNING, "\tat org.apache.spark.util.Utils"),
        (logging.ERROR, "Files: disk full"),
    ]


def test_a_summary_without_its_last_line_swallows_nothing_that_follows(caplog):
    run(JvmLog(), [*ELSEWHERE[:-1], "WARN Utils: the port is taken", "\tat org.apache.spark.util.Utils"])
    assert len(caplog.records) == 2


def test_where_the_start_fails_all_problems_are_told(caplog):
    jvm_log = JvmLog()
    with pytest.raises(RuntimeError, match="exited"):
        run(jvm_log, [*ROUTINE, *MISSING], RuntimeError("exited"))
    told = [r.getMessage() for r in caplog.records]
    # Those that repeat the one before are told once.
    assert sorted(told) == sorted(set(MISSING))
    assert jvm_log.said("unresolved dependency")
