"""How far the stream is behind, for each kind of source."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime

import pytest
from delta.tables import DeltaTable
from nightstream.monitoring import backlog
from nightstream.store.tables import USERS


def source(**more):
    return {"metrics": {}, "endOffset": '{"logOffset":3}', "latestOffset": "null", **more}


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (source(), {}),
        (source(latestOffset='{"logOffset":9}'), {}),
        (source(latestOffset="None", endOffset="not json"), {}),
        (
            source(metrics={"numFilesOutstanding": "4", "numBytesOutstanding": "512", "other": "1"}),
            {"backlog_files": 4.0, "backlog_bytes": 512.0},
        ),
        # A partition that the query has not read from is behind by all that it holds.
        (
            source(endOffset='{"clicks":{"0":7,"1":5}}', latestOffset='{"clicks":{"0":10,"1":5,"2":4}}'),
            {"backlog_offsets": 7.0},
        ),
    ],
)
def test_what_the_progress_of_a_source_tells(told, expected):
    assert backlog.reported(told) == expected


def test_files_that_are_newer_than_what_was_read(settings, tmp_path):
    folder = tmp_path / "stream"
    folder.mkdir()
    for name, milliseconds in (("read", 1_000), ("same", 1_000), ("new", 1_001), ("newer", 9_000), (".hidden", 9_000)):
        (folder / name).write_text("{}")
        # Spark tells the time of a file without its microseconds.
        os.utime(folder / name, ns=(0, milliseconds * 1_000_000 + 999))
    read_to = datetime.fromtimestamp(1, UTC)
    assert backlog.probed(None, settings.stream, "{}", read_to) == {"backlog_files": 2.0}
    assert backlog.probed(None, settings.stream, "{}", None) == {}
    remote = settings.stream.model_copy(update={"path": "s3://bucket/stream"})
    assert backlog.probed(None, remote, "{}", read_to) == {}


def test_versions_of_a_delta_table_behind_its_newest(spark, storage, settings):
    for _ in range(2):
        storage.append(USERS, spark.createDataFrame([("u", {}, {})], USERS.schema))
    newest = DeltaTable.forPath(spark, storage.location(USERS)).history(1).first().version
    stream = settings.stream.model_copy(update={"format": "delta", "path": storage.location(USERS)})

    def behind(version, index):
        offset = json.dumps({"sourceVersion": 1, "reservoirVersion": version, "index": index})
        return backlog.probed(spark, stream, offset, None)["backlog_versions"]

    assert (behind(newest, 0), behind(newest - 2, 3)) == (0, 2)
    # Of version `newest` nothing, of the one after it nothing either because it is not there yet.
    assert (behind(newest, -100), behind(newest + 1, -100)) == (1, 0)
