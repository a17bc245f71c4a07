"""Gathering the feature statistics with Spark; what comes to the driver is bounded by the feature settings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from nightstream.models.features import Attributes, FeatureStatistics, Scale, words_of
from nightstream.runtime.settings import FeatureSettings

SKEWED = 2.0  # mean over median from which a positive number is read by its logarithm
MAX_ATTRIBUTES = 256


def fit(
    items: DataFrame, users: DataFrame, events: DataFrame, event_types: Sequence[str], settings: FeatureSettings
) -> FeatureStatistics:
    """Statistics over ITEMS rows, USERS rows, and the values of EVENTS rows.

    Of each category the most frequent `max_category_values` get an index, of the words `max_words`; ties go by the
    value itself, so that equal data gives equal indices.
    """
    spread = events.agg(F.avg("value").alias("mean"), F.stddev_pop("value").alias("deviation")).first()
    assert spread is not None
    return FeatureStatistics(
        event_types=tuple(event_types),
        value=Scale(mean=spread["mean"] or 0.0, deviation=spread["deviation"] or 1.0),
        items=_attributes(items, settings.max_category_values),
        users=_attributes(users, settings.max_category_values),
        words=_words(items, settings.max_words),
        max_tokens=settings.max_tokens,
    )


def _attributes(rows: DataFrame, limit: int) -> Attributes:
    pairs = rows.select(F.explode("numbers").alias("name", "x"))
    positive = F.min("x") >= 0
    figures = (
        pairs.groupBy("name")
        .agg(
            F.avg("x").alias("mean"),
            F.stddev_pop("x").alias("deviation"),
            F.avg(F.log1p(F.greatest("x", F.lit(0.0)))).alias("log_mean"),
            F.stddev_pop(F.log1p(F.greatest("x", F.lit(0.0)))).alias("log_deviation"),
            (positive & (F.avg("x") > SKEWED * F.median("x"))).alias("logarithmic"),
        )
        .orderBy("name")
        .limit(MAX_ATTRIBUTES)
        .collect()
    )
    numbers = {
        r.name: Scale(
            mean=r.log_mean if r.logarithmic else r.mean,
            deviation=(r.log_deviation if r.logarithmic else r.deviation) or 1.0,
            logarithmic=r.logarithmic,
        )
        for r in figures
    }
    values = rows.select(F.explode("categories").alias("name", "values")).select("name", F.explode("values").alias("v"))
    counted = values.groupBy("name", "v").count()
    ranked = counted.groupBy("name").agg(
        F.slice(F.sort_array(F.collect_list(F.struct((-F.col("count")).alias("c"), "v"))), 1, limit).alias("kept")
    )
    kept = ranked.orderBy("name").limit(MAX_ATTRIBUTES).collect()
    return Attributes(numbers=numbers, categories={r.name: tuple(e.v for e in r.kept) for r in kept})


def _words(items: DataFrame, limit: int) -> tuple[str, ...]:
    counted = items.select("title", "text").mapInArrow(_count_words, "word string, n long")
    top = counted.groupBy("word").agg(F.sum("n").alias("n")).orderBy(F.desc("n"), "word").limit(limit)
    return tuple(r.word for r in top.collect())


def _count_words(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        counts: Counter[str] = Counter()
        for title, text in zip(batch["title"].to_pylist(), batch["text"].to_pylist(), strict=True):
            counts.update(words_of(text or title or ""))
        columns = [pa.array(list(counts), pa.string()), pa.array(list(counts.values()), pa.int64())]
        yield pa.record_batch(columns, ["word", "n"])
