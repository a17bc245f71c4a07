"""The night in one job: ingest, train, publish, apply."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pyspark.sql import SparkSession

from nightstream.settings import Settings
from nightstream.steps import apply, ingest, publish, train


def run(spark: SparkSession, settings: Settings, as_of: datetime) -> dict[str, Any]:
    """Each step leaves complete tables behind, so a night that died is run again from the start.

    Until the publishing commit the last published model and its recommendations stay as they are. Beside a running
    stream it trains on the events that the tables hold, those of the stream included.
    """
    return {
        "ingest": ingest.run(spark, settings, beside_stream=True),
        "train": train.run(spark, settings, as_of),
        "publish": publish.run(spark, settings, as_of),
        "apply": apply.run(spark, settings, as_of),
    }
