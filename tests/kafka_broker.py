"""A real Kafka broker for tests, and for a person to try: one node in KRaft mode, from the JARs of Maven's repository.

python tests/kafka_broker.py run FOLDER ADDRESS TOPIC      # until Ctrl-C
python tests/kafka_broker.py send FOLDER ADDRESS TOPIC     # one message per line of stdin
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType

import pyspark
from nightstream.runtime import session

VERSION = "4.1.1"
PACKAGES = f"org.apache.kafka:kafka_2.13:{VERSION},org.apache.kafka:kafka-tools:{VERSION}"
PARTITIONS = 2


def jars(folder: Path) -> str:
    """The class path of Kafka, fetched into the folder the way Spark fetches packages (some 50 MB)."""
    # Spark leaves out what it has itself.
    (scala,) = (Path(pyspark.__file__).parent / "jars").glob("scala-library-*.jar")
    path = f"{folder / 'jars'}/*:{scala}"
    done = folder / f"fetched-{VERSION}"
    if done.exists():
        return path
    nothing = folder / "nothing.py"
    nothing.parent.mkdir(parents=True, exist_ok=True)
    nothing.write_text("", encoding="utf-8")
    submit = str(Path(sys.executable).with_name("spark-submit"))
    command = [submit, "--master", "local[1]", "--conf", f"spark.jars.ivy={folder}", "--packages", PACKAGES, nothing]
    fetched = subprocess.run(command, capture_output=True, text=True, check=False)
    assert fetched.returncode == 0, fetched.stderr[-2000:]
    done.touch()
    return path


class Broker:
    """Runs inside a `with` block; `address` is what clients connect to, and `guarded_address` those of `users`, user →
    password, by SASL/PLAIN. What it stored in the folder before is still there."""

    def __init__(self, folder: Path, address: str | None = None, users: Mapping[str, str] | None = None) -> None:
        session.check_java()
        # Ivy wants an absolute path.
        folder = folder.absolute()
        self.folder, self.path = folder, jars(folder / "ivy")
        controller = _free_port()
        self.address = address or f"127.0.0.1:{_free_port()}"
        self.guarded_address = f"127.0.0.1:{_free_port()}"
        self.settings = folder / "server.properties"
        advertised, guard = f"PLAINTEXT://{self.address}", ""
        if users:
            advertised += f",SASL_PLAINTEXT://{self.guarded_address}"
            known = " ".join(f'user_{name}="{password}"' for name, password in users.items())
            guard = (
                "sasl.enabled.mechanisms=PLAIN\nlistener.name.sasl_plaintext.plain.sasl.jaas.config="
                f"org.apache.kafka.common.security.plain.PlainLoginModule required {known};\n"
            )
        listeners = f"{advertised},CONTROLLER://127.0.0.1:{controller}"
        self.settings.write_text(
            f"""process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
listeners={listeners}
advertised.listeners={advertised}
controller.listener.names=CONTROLLER
listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,SASL_PLAINTEXT:SASL_PLAINTEXT
log.dirs={folder / "log"}
num.partitions={PARTITIONS}
offsets.topic.replication.factor=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
group.initial.rebalance.delay.ms=0
{guard}""",
            encoding="utf-8",
        )

    def __enter__(self) -> Broker:
        self._java("kafka.tools.StorageTool", "format", "-g", "-t", "MkU3OEVBNTcwNTJENDM2Qg", "-c", str(self.settings))
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

    def create(self, topic: str) -> None:
        """Make the topic, unless it is there."""
        arguments = ("--bootstrap-server", self.address, "--create", "--if-not-exists", "--topic", topic)
        self._java("org.apache.kafka.tools.TopicCommand", *arguments)

    def send(self, topic: str, lines: Iterable[str], batch_size: int = 1) -> None:
        """As the function `send`."""
        send(self.path, self.address, topic, lines, batch_size)

    def _java(self, main: str, *arguments: str) -> None:
        _java(self.path, main, *arguments)


def send(path: str, address: str, topic: str, lines: Iterable[str], batch_size: int = 1) -> None:
    """Produce one message per line (UTF-8), spread over the topic's partitions.

    A line may begin with headers and a tab: `name:value,name:value<TAB>message`.
    batch_size: bytes that go to one partition before the next.
    """
    arguments = ("--bootstrap-server", address, "--topic", topic, "--batch-size", str(batch_size))
    given = "\n".join(line if "\t" in line else f"NULL\t{line}" for line in lines) + "\n"
    properties = ("--property", "parse.headers=true", "--property", "null.marker=NULL")
    _java(path, "org.apache.kafka.tools.ConsoleProducer", *arguments, *properties, given=given)


def _java(path: str, main: str, *arguments: str, given: str | None = None) -> None:
    command = ["java", "-Xmx256m", "-cp", path, main, *arguments]
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def main(what: str, folder: str, address: str, topic: str) -> None:
    if what == "send":
        send(jars(Path(folder).absolute() / "ivy"), address, topic, sys.stdin.read().splitlines())
        return
    try:
        socket.create_connection(tuple(address.split(":")), timeout=1).close()
    except OSError:
        pass
    else:
        sys.exit(f"something already listens at {address}; stop it first")
    print("fetching Kafka (the first time only) and starting it", flush=True)
    with Broker(Path(folder), address) as broker:
        broker.create(topic)
        print(f"Kafka {VERSION} at {address}, topic {topic}; Ctrl-C stops it", flush=True)
        try:
            broker.process.wait()
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    main(*sys.argv[1:])
