"""Model versions as rows: parts, damage, publishing and rolling back."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from nightstream.errors import ArtifactError, TableError
from nightstream.store import registry
from nightstream.store.tables import MODEL_ARTIFACTS, MODELS
from pyspark.sql import functions as F

AT = datetime(2024, 5, 1, tzinfo=UTC)


def test_files_come_back_in_parts_whatever_their_size(storage, monkeypatch):
    monkeypatch.setattr(registry, "PART_BYTES", 10)
    files = {"a.bin": bytes(range(25)), "b.json": b"{}", "empty": b""}
    registry.save_artifacts(storage, "v1", files)
    registry.save_artifacts(storage, "v2", {"a.bin": b"other"})
    assert storage.read(MODEL_ARTIFACTS).where("model_version = 'v1' AND file = 'a.bin'").count() == 3
    assert registry.load_artifacts(storage, "v1") == files
    registry.save_artifacts(storage, "v1", {"a.bin": b"anew"})
    assert registry.load_artifacts(storage, "v1") == {"a.bin": b"anew"}
    assert registry.load_artifacts(storage, "v2") == {"a.bin": b"other"}


def test_files_in_a_folder_are_apart_from_those_that_serve(storage):
    registry.save_artifacts(storage, "v1", {"a.bin": b"serves", "early/a.bin": b"before", "early/b.bin": b"too"})
    assert registry.load_artifacts(storage, "v1") == {"a.bin": b"serves"}
    assert registry.load_artifacts(storage, "v1", "early") == {"a.bin": b"before", "b.bin": b"too"}
    with pytest.raises(ArtifactError, match="model v1 has no artifacts under late"):
        registry.load_artifacts(storage, "v1", "late")


def test_a_missing_part_and_a_changed_byte_are_noticed(storage, monkeypatch):
    monkeypatch.setattr(registry, "PART_BYTES", 4)
    registry.save_artifacts(storage, "v1", {"a.bin": b"12345678"})
    whole = storage.read(MODEL_ARTIFACTS)
    for damaged in (
        whole.where("part = 0"),
        whole.withColumn("content", F.when(F.col("part") == 1, F.lit(b"567X")).otherwise(F.col("content"))),
    ):
        storage.overwrite(MODEL_ARTIFACTS, damaged.localCheckpoint())
        with pytest.raises(ArtifactError, match=r"a\.bin of model v1 is damaged"):
            registry.load_artifacts(storage, "v1")
    with pytest.raises(ArtifactError, match="no artifacts"):
        registry.load_artifacts(storage, "v9")


def test_the_newest_published_row_serves_and_publishing_an_old_version_rolls_back(storage):
    with pytest.raises(TableError, match="no model has been published"):
        registry.published(storage)
    for number in (1, 2):
        at = AT + timedelta(days=number)
        registry.record(storage, f"v{number}", registry.TRAINED, at, {"a": number}, {"ndcg@10": 0.1}, [{"epoch": 1}])
    with pytest.raises(TableError, match="no model has been published"):
        registry.published(storage)
    for version, day in (("v1", 3), ("v2", 4), ("v1", 5)):
        registry.publish(storage, version, AT + timedelta(days=day))
        assert registry.published(storage).model_version == version
    assert registry.published(storage).settings == {"a": 1}
    with pytest.raises(TableError, match="model v7 is not in models"):
        registry.publish(storage, "v7", AT)


def test_what_is_recorded_last_counts_whatever_a_clock_once_said(storage, caplog):
    ahead = AT + timedelta(days=4000)
    for version, at in (("v1", ahead), ("v2", AT), ("v3", AT)):
        registry.record(storage, version, registry.TRAINED, at, {}, {}, [])
        assert registry.candidate(storage).model_version == version
        assert registry.publish(storage, version, at) == registry.published(storage)
        assert registry.published(storage).model_version == version
    assert caplog.text.count("a clock or an --as-of was ahead") == 4
    registry.publish(storage, "v1", AT)
    assert registry.published(storage).model_version == "v1"
    registry.reject(storage, "v3", AT, {})
    assert registry.candidate(storage).model_version == "v2"


def test_a_rejected_version_is_no_candidate_until_a_person_publishes_it(storage):
    for number in (1, 2):
        at = AT + timedelta(days=number)
        registry.record(storage, f"v{number}", registry.TRAINED, at, {"a": number}, {"ndcg@10": 0.1}, [])
    # Rejected in the very moment that counts as now for the whole night, training included.
    registry.reject(storage, "v2", AT + timedelta(days=2), {"gate.events": 5.0})
    assert registry.candidate(storage).model_version == "v1"
    row = registry.newest(storage, registry.REJECTED)
    assert (row.model_version, row.settings, row.metrics) == ("v2", {"a": 2}, {"ndcg@10": 0.1, "gate.events": 5.0})
    registry.publish(storage, "v2", AT + timedelta(days=3))
    assert registry.candidate(storage).model_version == "v2"
    registry.reject(storage, "v1", AT + timedelta(days=4), {})
    registry.reject(storage, "v2", AT + timedelta(days=4), {})
    assert registry.candidate(storage) is None


def test_an_unreadable_model_row_is_named(storage):
    row = ("v1", registry.PUBLISHED, AT, "{not json", "{}", "[]")
    storage.append(MODELS, storage.spark.createDataFrame([row], MODELS.schema))
    with pytest.raises(ArtifactError, match="the row of model v1 in models cannot be read"):
        registry.published(storage)
