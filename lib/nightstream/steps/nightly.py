"""The night in one job: ingest, train, publish, apply."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pyspark.sql import SparkSession

from nightstream.errors import RejectedError
from nightstream.runtime import console
from nightstream.runtime.settings import Settings
from nightstream.steps import apply, freshness, ingest, publish, train
from nightstream.store.storage import Storage
from nightstream.training import spark_job


def run(spark: SparkSession, settings: Settings, as_of: datetime) -> dict[str, Any]:
    """Each step leaves complete tables behind, so a night that died is run again from the start.

    Until the publishing commit the last published model and its recommendations stay as they are. Where the gate
    rejects the new model, the published one serves on: apply brings everyone's list up to the night's events under it,
    and RejectedError is raised at the end. Beside a running stream it trains on the events that the tables hold, those
    of the stream included.

    Raises SettingsError, and nothing is written, for an encoder that nobody has registered.
    """
    # What the settings tell the learner is checked before anything is written.
    spark_job.learn_spec(settings)
    results: dict[str, Any] = {}
    with console.working(lambda: "ingest"):
        results["ingest"] = ingest.run(spark, settings, beside_stream=True)
    with console.working(lambda: "train"):
        results["train"] = train.run(spark, settings, as_of)
    rejected: RejectedError | None = None
    try:
        version = results["train"]["model_version"]
        with console.working(lambda: "publish"):
            results["publish"] = publish.through_gate(Storage(spark, settings.storage), settings, as_of, version)
    except RejectedError as error:
        rejected = error
    with console.working(lambda: "apply"):
        results["apply"] = apply.run(spark, settings, as_of)
        results["freshness"] = freshness.after_night(Storage(spark, settings.storage), settings, as_of)
    if rejected is not None:
        raise rejected
    return results
