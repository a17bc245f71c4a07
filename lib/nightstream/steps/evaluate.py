"""Measure recommendation quality on any source that ingest reads, through the refresh that serves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pyspark.sql import SparkSession

from nightstream.evaluation import offline
from nightstream.evaluation.protocol import Protocol, fit, judged, served, split, write_predictions
from nightstream.files import write_atomically
from nightstream.runtime import console
from nightstream.runtime.settings import Settings


def run(
    spark: SparkSession,
    settings: Settings,
    protocol: Protocol,
    predictions: str | None = None,
    delays: Sequence[float] | None = None,
    json_out: str | None = None,
) -> dict[str, Any]:
    """Train on what the protocol allows and score the rest. No table is read or written.

    leave-one-out: each user's last event is the test, the one before is validation, the third-last trains the ranker.
    prequential: the newest `evaluation.cut_fraction` of the events by time is replayed event by event.
    predictions: a Parquet file or folder to write the lists to. json_out: a file for the scores.
    Returns {"protocol", "scores", "metrics"}; see evaluation.scores.
    """
    parts = split(spark, settings, protocol)
    fitted = fit(settings, parts)
    rows = judged(parts, served(settings, parts, fitted.files), delays or settings.evaluation.delays_seconds).persist()
    scores = offline.scores(rows, parts.items.count())
    if predictions is not None:
        write_predictions(offline.predictions(rows), predictions)
    console.stderr.print(console.quality_table(scores, f"{protocol} on {settings.sources.events.path}"))
    result = {"protocol": protocol, "scores": scores, "metrics": fitted.metrics}
    if json_out is not None:
        write_atomically(json_out, json.dumps(result, indent=2).encode())
    return result
