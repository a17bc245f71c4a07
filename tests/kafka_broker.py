"""A real Kafka broker for tests: one node in KRaft mode, from the JARs of Maven's repository."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import pyspark
from nightstream import session

VERSION = "4.1.1"
PACKAGES = f"org.apache.kafka:kafka_2.13:{VERSION},org.apache.kafka:kafka-tools:{VERSION}"
PARTITIONS = 2


def jars(folder: Path) -> str:
    """The class path of Kafka, fetched into the folder the way Spark fetches packages (some 50 MB)."""
    nothing = folder / "nothing.py"
    nothing.parent.mkdir(parents=True, exist_ok=True)
    nothing.write_text("", encoding="utf-8")
    submit = str(Path(sys.executable).with_name("spark-submit"))
    command = [submit, "--master", "local[1]", "--conf", f"spark.jars.ivy={folder}", "--packages", PACKAGES, nothing]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    # Spark leaves out what it has itself.
    (scala,) = (Path(pyspark.__file__).parent / "jars").glob("scala-library-*.jar")
    return f"{folder / 'jars'}/*:{scala}"


class Broker:
    """Runs inside a `with` block; `address` is what clients connect to."""

    def __init__(self, folder: Path) -> None:
        session.check_java()
        self.folder, self.path = folder, jars(folder / "ivy")
        port, controller = _free_port(), _free_port()
        self.address = f"127.0.0.1:{port}"
        self.settings = folder / "server.properties"
        listeners = f"PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}"
        self.settings.write_text(
            f"""process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
listeners={listeners}
advertised.listeners=PLAINTEXT://{self.address}
controller.listener.names=CONTROLLER
log.dirs={folder / "log"}
num.partitions={PARTITIONS}
offsets.topic.replication.factor=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
group.initial.rebalance.delay.ms=0
""",
            encoding="utf-8",
        )

    def __enter__(self) -> Broker:
        self._java("kafka.tools.StorageTool", "format", "-t", "MkU3OEVBNTcwNTJENDM2Qg", "-c", str(self.settings))
        log = (self.folder / "broker.log").open("w")
        self.process = subprocess.Popen(
            ["java", "-Xmx512m", "-cp", self.path, "kafka.Kafka", str(self.settings)], stdout=log, stderr=log
        )
        host, port = self.address.split(":")
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection((host, int(port)), timeout=1).close()
                return self
            except OSError:
                said = (self.folder / "broker.log").read_text()[-2000:]
                assert self.process.poll() is None, said
                assert time.monotonic() < deadline, said
                time.sleep(0.5)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.terminate()
        self.process.wait(30)

    def send(self, topic: str, lines: Iterable[str]) -> None:
        """Produce one message per line (UTF-8), spread over the topic's partitions."""
        arguments = ("--bootstrap-server", self.address, "--topic", topic, "--batch-size", "1")
        self._java("org.apache.kafka.tools.ConsoleProducer", *arguments, given="\n".join(lines) + "\n")

    def _java(self, main: str, *arguments: str, given: str | None = None) -> None:
        command = ["java", "-Xmx256m", "-cp", self.path, main, *arguments]
        done = subprocess.run(command, input=given, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
