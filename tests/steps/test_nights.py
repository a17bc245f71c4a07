"""The steps of a night that is run again after it died, under the same time."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
import world
from nightstream.errors import SettingsError
from nightstream.runtime import clock
from nightstream.runtime.settings import validate
from nightstream.serving import speed_layer
from nightstream.steps import apply, ingest, nightly, train
from nightstream.store import registry
from nightstream.store.tables import ITEM_EMBEDDINGS, MODEL_ARTIFACTS, MODELS, RAW_EVENTS, UNFOLDED, USER_VECTORS
from states import assert_merged, assert_same, recomputed

SAME_NIGHT = datetime(2024, 1, 1, tzinfo=UTC)


def test_what_may_serve_is_not_trained_again_under_its_name(spark, night):
    storage, settings = night("trained")
    tables = (MODEL_ARTIFACTS, ITEM_EMBEDDINGS, MODELS)
    before = [storage.version(spec) for spec in tables]
    published = registry.published(storage)
    told = train.run(spark, settings, SAME_NIGHT)
    assert told == {"model_version": published.model_version, "metrics": published.metrics}
    assert [storage.version(spec) for spec in tables] == before


def test_an_encoder_that_nobody_knows_ends_the_night_before_it_writes(spark, night):
    storage, settings = night("misspelt")
    before = storage.version(RAW_EVENTS)
    document = settings.model_dump(mode="json")
    document["training"]["encoders"] = ["lstm"]
    with pytest.raises(SettingsError, match=r"training\.encoders: lstm not known"):
        nightly.run(spark, validate(document), SAME_NIGHT)
    assert storage.version(RAW_EVENTS) == before


@pytest.mark.slow
def test_applied_again_it_commits_what_it_merges(spark, night):
    storage, settings = night("applied")
    apply.run(spark, settings, SAME_NIGHT)
    assert {r.revision for r in storage.read(USER_VECTORS).collect()} == {2}
    assert_merged(storage)


@pytest.mark.slow
def test_a_stream_that_starts_before_a_night_has_applied_folds_in_what_that_recorded(spark, night, tmp_path):
    """The night died, or trains still, after its ingest: the stream has the lease from now on."""
    storage, settings = night("ingested")
    later = [
        {"event_id": f"late{n}", "user_id": user, "item_id": f"i{n:02}", "event_time": world.START + 10**6 + n}
        for n, user in enumerate(["u003", "brand new", "u003", "u005"])
    ]
    # As many events as before in the windows of these two, but others.
    later.append({"event_id": "back", "user_id": "u005", "event_type": "retract", "retracts": "e005-011"})
    later.append({"event_id": "e007-011", "user_id": "u007", "item_id": "i01"})
    later[-2]["event_time"] = later[-1]["event_time"] = world.START + 2 * 10**6
    source = world.write_lines(tmp_path / "more.jsonl", [*world.events(), *later])
    document = settings.model_dump(mode="json")
    document["sources"]["events"]["path"] = str(source)
    own = validate(document)
    assert ingest.run(spark, own)["added"]["events"] == 5
    layer = speed_layer.SpeedLayer(storage, own, lambda: "a stream", clock.utc_now)
    layer.start()
    layer.close()
    windows = {r.user_id: (r.revision, [e.event_id for e in r.window]) for r in storage.read(USER_VECTORS).collect()}
    assert windows["u003"][1][-2:] == ["late0", "late2"]
    assert windows["brand new"] == (1, ["late1"])
    # Nobody else was refreshed, and the next start has nothing to do.
    assert {user for user, (revision, _) in windows.items() if revision == 2} == {"u003", "u005", "u007"}
    assert windows["u005"][1][-1] == "late3"
    assert "e005-011" not in windows["u005"][1]
    assert storage.read(UNFOLDED).isEmpty()
    assert_merged(storage)
    assert_same(storage, recomputed(storage, own, tmp_path / "again"))
