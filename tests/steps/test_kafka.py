"""The streaming query against a real Kafka broker."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import world
import yaml
from kafka_broker import Broker
from nightstream.ingest import sources
from nightstream.ingest.ledger import check
from nightstream.runtime.settings import Settings, validate
from nightstream.steps.serve import run
from nightstream.store.storage import Storage
from nightstream.store.tables import EVENTS, QUARANTINE, RAW_EVENTS, USER_VECTORS
from pyspark.sql import functions as F
from states import assert_same, recomputed

CONF = Path(__file__).parents[2] / "conf"
PASSWORD, WRONG_PASSWORD = "hush-1234", "pst-5678"
JAAS = 'org.apache.kafka.common.security.plain.PlainLoginModule required username="stream" password="${env:SECRET}";'
MESSAGES = (
    "value binary, headers array<struct<key string, value binary>>, topic string, partition int, offset long, "
    "timestamp timestamp"
)


def lines(numbers: range) -> list[str]:
    rows = [
        {"event_id": f"k{n}", "user_id": f"u{n % 48:03}", "item_id": f"i{n % 24:02}", "event_time": world.START + n}
        for n in numbers
    ]
    return [json.dumps({**r, "event_time": r["event_time"] + 10**6}) for r in rows]


@pytest.fixture(scope="module")
def broker(tmp_path_factory):
    with Broker(tmp_path_factory.mktemp("broker"), users={"stream": PASSWORD}) as running:
        yield running


@dataclass
class Serving:
    """The stream of an installation after one night, on a topic named like the test."""

    storage: Storage
    settings: Settings
    file: Path
    topic: str

    def document(self, options: dict[str, str]) -> dict[str, Any]:
        """The settings with these options of the source."""
        document = self.settings.model_dump(mode="json")
        overlay = yaml.safe_load((CONF / "kafka.yaml").read_text(encoding="utf-8"))
        document["spark"] |= overlay["spark"]
        own = {"path": self.topic, "max_per_trigger": 30, "options": overlay["stream"]["options"] | options}
        document["stream"] |= {"format": overlay["stream"]["format"], **own}
        return document

    def command(self, options: dict[str, str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        self.file.write_text(yaml.safe_dump(self.document(options)), encoding="utf-8")
        nightstream = str(Path(sys.executable).with_name("nightstream"))
        return subprocess.run(
            [nightstream, "serve", "--until-idle", "--settings", str(self.file)],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    def here(self, options: dict[str, str]) -> dict[str, Any]:
        """The same in this process, which has a warm JVM."""
        return run(self.storage.spark, validate(self.document(options)), until_idle=True)


@pytest.fixture
def serving(night, tmp_path, request):
    return Serving(*night("kafka"), tmp_path / "base.yaml", request.node.name)


def ended(done: subprocess.CompletedProcess[str]) -> dict:
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_messages_of_a_topic_refresh_their_users_and_a_restart_goes_on(broker, serving):
    storage, topic = serving.storage, serving.topic
    before = check(storage)["events"]
    broker.send(topic, [*lines(range(59)), f"origin:db/17,origin:db/18\t{lines(range(59, 60))[0]}"])
    broker.send(topic, ["no event", lines(range(1))[0]])
    first = ended(serving.command({"kafka.bootstrap.servers": "${env:BROKER}"}, {"BROKER": broker.address}))
    assert first["events"] == 60
    assert first["batches"] >= 3
    broker.send(topic, lines(range(60, 70)))
    assert serving.here({"kafka.bootstrap.servers": broker.address})["events"] == 10
    assert check(storage) == {"raw_events": before + 72, "events": before + 70, "quarantine": 1, "duplicates": 1}
    rejected = storage.read(QUARANTINE).first()
    assert (rejected.source, rejected.payload, rejected.reason) == (f"kafka:{topic}", "no event", "not_json")
    raw = storage.read(RAW_EVENTS).where(f"source = 'kafka:{topic}'").collect()
    positions = {r.position.split("#")[0] for r in raw}
    assert len(positions) == 72
    assert {p.rsplit("/", 1)[0] for p in positions} == {f"{topic}/0", f"{topic}/1"}
    (headers,) = [r.headers for r in raw if r.headers]
    assert [(h.key, h.value) for h in headers] == [("origin", "db/17"), ("origin", "db/18")]
    newest = {r.user_id: r.window[-1].event_id for r in storage.read(USER_VECTORS).collect() if r.window}
    assert all(newest[f"u{n % 48:03}"] == f"k{n}" for n in range(22, 70))


@pytest.mark.slow
def test_events_out_of_order_over_the_partitions_end_in_the_state_of_one_batch(broker, serving, tmp_path):
    storage, topic, rng = serving.storage, serving.topic, random.Random(3)
    # Some 16 of each user, more than the window holds; late by up to months, in any order, some of them twice.
    rows = [
        {
            "event_id": f"k{n}",
            "user_id": f"u{n % 6:03}",
            "item_id": f"i{rng.randrange(world.ITEMS):02}",
            "event_time": world.START + 10**6 - int(10 ** rng.uniform(0, 6.9)),
        }
        for n in range(96)
    ]
    sent = [*rows, *rng.sample(rows, 12)]
    rng.shuffle(sent)
    broker.send(topic, [json.dumps(row) for row in sent])
    assert serving.here({"kafka.bootstrap.servers": broker.address})["batches"] >= 3
    raw = storage.read(RAW_EVENTS).where(f"source = 'kafka:{topic}'").select("position").collect()
    assert {r.position.rsplit("/", 1)[0] for r in raw} == {f"{topic}/0", f"{topic}/1"}
    stored = storage.read(EVENTS).where("event_id LIKE 'k%'").select("event_id", "user_id", "item_id", "event_time")
    assert {(*r[:3], int(r.event_time.timestamp())) for r in stored.collect()} == {tuple(row.values()) for row in rows}
    assert check(storage)["duplicates"] == 12
    assert_same(storage, recomputed(storage, serving.settings, tmp_path / "copy"))


@pytest.mark.slow
def test_a_password_reaches_the_broker_and_nothing_else(broker, serving, tmp_path):
    broker.send(serving.topic, lines(range(3)))
    login = {
        "kafka.bootstrap.servers": broker.guarded_address,
        "kafka.security.protocol": "SASL_PLAINTEXT",
        "kafka.sasl.mechanism": "PLAIN",
        "kafka.sasl.jaas.config": JAAS,
    }
    refused = serving.command(login, {"SECRET": WRONG_PASSWORD})
    assert refused.returncode == 2, refused.stderr[-3000:]
    assert "the Kafka broker refuses the login" in refused.stderr
    done = serving.command(login, {"SECRET": PASSWORD})
    assert ended(done)["events"] == 3
    assert not any(p in text for p in (PASSWORD, WRONG_PASSWORD) for text in (refused.stderr, done.stderr, done.stdout))
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert any(p.name == "metadata" for p in written)
    assert not [p for p in written if PASSWORD.encode() in p.read_bytes()]


def test_a_message_becomes_a_payload_with_its_place_and_headers(spark):
    moment = datetime(2024, 1, 1, tzinfo=UTC)
    rows = [
        (bytearray(b'{"a":1}'), [("k", bytearray(b"1")), ("k", None), ("b", bytearray(b"\xff"))], "t", 0, 7, moment),
        (bytearray(b"\xff"), None, "t", 1, 8, datetime.fromtimestamp(-1, UTC)),
        (None, None, "t", 1, 9, moment),
    ]
    # Microseconds given for milliseconds: a year that Python has not.
    beyond = F.timestamp_micros(F.lit(1_700_000_000_000_000_000))
    moments = F.when(F.col("offset") == 9, beyond).otherwise(F.col("timestamp"))
    found = sources.kafka_payloads(spark.createDataFrame(rows, MESSAGES).withColumn("timestamp", moments), "t")
    found = found.withColumns({"payload": F.hex("payload"), "arrival_time": F.unix_seconds("arrival_time")})
    first, broken, deleted = [tuple(r) for r in found.select("payload", "source", "position", "arrival_time").collect()]
    assert first == (b'{"a":1}'.hex().upper(), "kafka:t", "t/0/7", int(moment.timestamp()))
    assert broken == ("FF", "kafka:t", "t/1/8", None)
    assert (deleted[0], deleted[3]) == (None, None)
    headers = [r.headers for r in found.collect()]
    assert [tuple(h) for h in headers[0]] == [("k", "1"), ("k", None), ("b", "\ufffd")]
    assert headers[1:] == [None, None]
