"""What foreachBatch gets can be shipped to another process, and builds there what it needs."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
import world
from nightstream.ingest.ledger import parsed
from nightstream.runtime.settings import validate
from nightstream.serving import stream_state
from nightstream.serving.speed_layer import SpeedLayer
from nightstream.serving.stream_function import StreamFunction
from nightstream.store import lease
from nightstream.store.tables import RECOMMENDATIONS, REFRESHES
from pyspark import cloudpickle
from states import assert_merged

ARRIVING = "payload string, source string, position string, arrival_time timestamp"


def shipped(function: StreamFunction) -> StreamFunction:
    """As Spark Connect ships it."""
    return cloudpickle.loads(cloudpickle.dumps(function))


def test_it_carries_settings_and_the_references_to_secrets_alone(settings, monkeypatch):
    monkeypatch.setenv("BROKER_LOGIN", "hunter2")
    document = settings.model_dump(mode="json")
    document["stream"]["options"] = {"kafka.sasl.jaas.config": "${env:BROKER_LOGIN}"}
    function = StreamFunction(validate(document), "one run")
    content = cloudpickle.dumps(function)
    assert b"hunter2" not in content
    assert len(content) < 20_000
    assert cloudpickle.loads(content) == function
    assert shipped(function).settings.stream.resolved_options() == {"kafka.sasl.jaas.config": "hunter2"}


def test_reading_it_imports_no_more_than_settings(settings):
    """A Spark Connect server gives the process that reads it 15 seconds, and starts it anew for each query."""
    told = (
        "import pickle, sys; pickle.load(sys.stdin.buffer); "
        "print({name.partition('.')[0] for name in sys.modules} & {'numpy', 'pyarrow', 'pyspark', 'torch', 'xgboost'})"
    )
    content = cloudpickle.dumps(StreamFunction(settings, "one run"))
    done = subprocess.run([sys.executable, "-c", told], input=content, capture_output=True, check=True)
    assert done.stdout == b"set()\n"


@pytest.mark.slow
def test_a_shipped_copy_builds_its_state_at_its_first_call_and_keeps_it(spark, night, monkeypatch):
    storage, settings = night("shipped")
    Path(settings.stream.checkpoint).mkdir(parents=True)
    Path(settings.stream.checkpoint, "metadata").write_text('{"id": "far away"}')
    function = shipped(StreamFunction(settings, "one run"))

    def micro_batch(number: int) -> None:
        event = {"event_id": f"far{number}", "user_id": f"new{number}", "item_id": "i01", "event_time": world.START}
        rows = spark.createDataFrame([(json.dumps(event), "test", f"p{number}", None)], ARRIVING)
        function(parsed(rows, settings), number)

    def holder() -> str | None:
        return lease.take(storage, "the night", "nightly", datetime.now(UTC), 0.001, 3)

    def broken(layer: SpeedLayer) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(SpeedLayer, "start", broken)
        with pytest.raises(OSError, match="no space left"):
            micro_batch(0)
    # What fails at its start gives back what it took.
    assert holder() is None
    assert not stream_state.STATES
    try:
        micro_batch(0)
        state = stream_state.STATES["one run"]
        micro_batch(1)
        assert list(stream_state.STATES) == ["one run"]
        assert stream_state.STATES["one run"] is state
        assert holder() == f"stream (checkpoint {settings.stream.checkpoint})"
        assert state.counts["batches"] == 2
        state.settle()
    finally:
        for state in list(stream_state.STATES.values()):
            state.__exit__(None, None, None)
    assert not stream_state.STATES
    assert holder() is None
    with pytest.raises(InterruptedError):
        state.micro_batch(None, 2)
    rows = storage.read(RECOMMENDATIONS).where("user_id IN ('new0', 'new1')").collect()
    assert {r.user_id for r in rows} == {"new0", "new1"}
    assert {r.writer for r in storage.read(REFRESHES).where("user_id LIKE 'new%'").collect()} == {"stream far away"}
    assert_merged(storage)
