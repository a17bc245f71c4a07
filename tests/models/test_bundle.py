"""Model and item matrix are decoded once per process and version."""

from __future__ import annotations

import dataclasses
import json
import os

import pyarrow as pa
import torch
import world
from learning_data import ring_sequences, untrained_model
from nightstream.ingest.ledger import parsed
from nightstream.models import bundle
from nightstream.models.artifacts import to_artifacts
from nightstream.models.features import Attributes, FeatureStatistics, Scale
from nightstream.runtime import clock
from nightstream.serving import catalogue, speed_layer
from nightstream.store import registry

NOTHING = Attributes(numbers={}, categories={})
ARRIVING = "payload string, source string, position string, arrival_time timestamp"


def test_a_worker_decodes_a_bundle_once(spark, night):
    storage, _ = night("worker")
    published = catalogue.load_bundle(storage, registry.published(storage).model_version)
    given = dataclasses.replace(published, catalogue_version="met by no worker yet")

    def look(batches):
        for batch in batches:
            key = (given.model_version, given.catalogue_version, given.fingerprint)
            kept = bundle._LOADED.get(key) is given.load()
            yield pa.RecordBatch.from_pydict({"process": [os.getpid()] * len(batch), "kept": [kept] * len(batch)})

    rows = spark.range(0, 1, 1, 1).mapInArrow(look, "process long, kept boolean")
    # Spark lets a worker go whose rows it has not all taken.
    seen = [row for _ in range(8) for row in rows.collect()]
    assert not {r.process for r in seen} & {os.getpid()}
    assert len(seen) > sum(not r.kept for r in seen) == len({r.process for r in seen}) > 0


def test_files_of_one_name_are_told_apart():
    """Two installations may train at the same moment, and their tasks may share a worker."""
    files = []
    for seed, words in ((1, ()), (2, ()), (2, ("more",))):
        statistics = FeatureStatistics(
            event_types=("event",), value=Scale(mean=0.0, deviation=1.0), items=NOTHING, users=NOTHING, words=words,
            max_tokens=0,
        )  # fmt: skip
        model = to_artifacts(untrained_model(ring_sequences(), seed=seed))
        files.append(model | {bundle.FEATURES_FILE: statistics.to_json().encode()})
    bundles = [bundle.Bundle("of one name", "", each, catalogue.NO_ITEMS) for each in files]
    vectors = [b.load().model.members[0].items.ids.weight for b in bundles]
    assert not torch.equal(vectors[0], vectors[1])
    assert torch.equal(vectors[1], vectors[2])
    assert [b.load().statistics.words for b in bundles] == [(), (), ("more",)]
    assert dataclasses.replace(bundles[2]).load() is bundles[2].load()


def test_the_driver_decodes_nothing_between_micro_batches_unless_the_version_changes(spark, night, monkeypatch):
    storage, settings = night("driver")
    layer = speed_layer.SpeedLayer(storage, settings, lambda: "stream one", clock.utc_now)
    layer.start()
    decoded, decode = [], bundle.Loaded.from_bundle

    def counted(given):
        decoded.append(given.catalogue_version)
        return decode(given)

    def micro_batch(number: int) -> None:
        event = {"event_id": f"p{number}", "user_id": "u000", "item_id": "i00", "event_time": world.START + 10**6}
        layer(
            parsed(spark.createDataFrame([(json.dumps(event), "test", f"p{number}", None)], ARRIVING), settings), number
        )

    monkeypatch.setattr(bundle.Loaded, "from_bundle", counted)
    micro_batch(0)
    assert decoded == []
    layer.bundle = dataclasses.replace(layer.bundle, catalogue_version="another")
    micro_batch(1)
    micro_batch(2)
    assert decoded == ["another"]
    layer.settle()
    layer.close()
