"""The steps of a night that is run again after it died, under the same time."""

from __future__ import annotations

from datetime import UTC, datetime

from nightstream import registry
from nightstream.steps import apply, train
from nightstream.tables import ITEM_EMBEDDINGS, MODEL_ARTIFACTS, MODELS, USER_VECTORS
from states import assert_merged

SAME_NIGHT = datetime(2024, 1, 1, tzinfo=UTC)


def test_what_may_serve_is_not_trained_again_under_its_name(spark, night):
    storage, settings = night("trained")
    tables = (MODEL_ARTIFACTS, ITEM_EMBEDDINGS, MODELS)
    before = [storage.version(spec) for spec in tables]
    published = registry.published(storage)
    told = train.run(spark, settings, SAME_NIGHT)
    assert told == {"model_version": published.model_version, "metrics": published.metrics}
    assert [storage.version(spec) for spec in tables] == before


def test_applied_again_it_commits_what_it_merges(spark, night):
    storage, settings = night("applied")
    apply.run(spark, settings, SAME_NIGHT)
    assert {r.revision for r in storage.read(USER_VECTORS).collect()} == {2}
    assert_merged(storage)
