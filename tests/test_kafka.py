"""The streaming query against a real Kafka broker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import world
import yaml
from kafka_broker import Broker
from nightstream.ledger import check
from nightstream.settings import load
from nightstream.tables import QUARANTINE, RAW_EVENTS, USER_VECTORS

CONF = Path(__file__).parent.parent / "conf"
CONNECTOR = "org.apache.spark:spark-sql-kafka-0-10_2.13:4.2.0"


def lines(numbers: range) -> list[str]:
    rows = [
        {"event_id": f"k{n}", "user_id": f"u{n % 48:03}", "item_id": f"i{n % 24:02}", "event_time": world.START + n}
        for n in numbers
    ]
    return [json.dumps({**r, "event_time": r["event_time"] + 10**6}) for r in rows]


@pytest.mark.slow
def test_messages_of_a_topic_refresh_their_users_and_a_restart_goes_on(spark, night, tmp_path):
    storage, settings = night("kafka")
    before = check(storage)["events"]
    with Broker(tmp_path / "broker") as broker:
        document = settings.model_dump(mode="json")
        document["stream"] |= {
            "format": "kafka",
            "path": "clicks",
            "max_per_trigger": 30,
            "options": {"kafka.bootstrap.servers": "${env:BROKER}", "startingOffsets": "earliest"},
        }
        document["spark"]["packages"] = [*load([CONF / "base.yaml"]).spark.packages, CONNECTOR]
        file = tmp_path / "base.yaml"
        file.write_text(yaml.safe_dump(document), encoding="utf-8")
        command = [str(Path(sys.executable).with_name("nightstream")), "serve", "--until-idle", "--settings", str(file)]

        def serve() -> dict:
            done = subprocess.run(command, env={**os.environ, "BROKER": broker.address}, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
            return json.loads(done.stdout)

        broker.send("clicks", [*lines(range(60)), "no event", lines(range(1))[0]])
        told = serve()
        assert told["events"] == 60
        assert told["batches"] >= 3
        broker.send("clicks", lines(range(60, 70)))
        assert serve()["events"] == 10
    assert check(storage) == {"raw_events": before + 72, "events": before + 70, "quarantine": 1, "duplicates": 1}
    rejected = storage.read(QUARANTINE).first()
    assert (rejected.source, rejected.payload, rejected.reason) == ("kafka:clicks", "no event", "not_json")
    positions = {r.position.split("#")[0] for r in storage.read(RAW_EVENTS).where("source = 'kafka:clicks'").collect()}
    assert len(positions) == 72
    assert {p.rsplit("/", 1)[0] for p in positions} == {"clicks/0", "clicks/1"}
    newest = {r.user_id: r.window[-1].event_id for r in storage.read(USER_VECTORS).collect() if r.window}
    assert all(newest[f"u{n % 48:03}"] == f"k{n}" for n in range(22, 70))
