"""Gathering the feature statistics with Spark; what comes to the driver is bounded by the feature settings."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence

import pyarrow as pa
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from nightstream.models.features import Attributes, FeatureStatistics, Scale, words_of
from nightstream.runtime.settings import FeatureSettings

log = logging.getLogger(__name__)

SKEWED = 2.0  # mean over median from which a positive number is read by its logarithm
MAX_ATTRIBUTES = 256
# A number is no value, but another system's sign for none, where it lies so many times the distance of the quartiles
# outside of them, by its signed logarithm, or so many units, a factor of three million, where they lie close together.
# Counts and prices are heavy-tailed, and stay far within. Squares of larger ones than LARGEST are no number.
FAR_OFF, FAR_OFF_UNITS, LARGEST = 10.0, 15.0, 1e100


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
    pairs = _within_bounds(rows.select(F.explode("numbers").alias("name", "x")))
    positive = F.min("x") >= 0
    figures = (
        pairs.groupBy("name")
        .agg(
            F.avg("x").alias("mean"),
            F.stddev_pop("x").alias("deviation"),
            F.avg(F.log1p(F.greatest("x", F.lit(0.0)))).alias("log_mean"),
            F.stddev_pop(F.log1p(F.greatest("x", F.lit(0.0)))).alias("log_deviation"),
            (positive & (F.avg("x") > SKEWED * F.median("x"))).alias("logarithmic"),
            F.first("low").alias("low"),
            F.first("high").alias("high"),
            F.count_if(F.col("x").isNull()).alias("far_off"),
            F.first("far_off_value", ignorenulls=True).alias("example"),
            F.count(F.lit(1)).alias("all"),
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
            low=r.low,
            high=r.high,
        )
        for r in figures
        if r.far_off < r.all
    }
    for r in figures:
        if r.far_off:
            log.warning(
                "%s: %d of %d values are left out, %g for example: they are out of all proportion to the others",
                *(r.name, r.far_off, r.all, r.example),
            )
    values = rows.select(F.explode("categories").alias("name", "values")).select("name", F.explode("values").alias("v"))
    counted = values.groupBy("name", "v").count()
    ranked = counted.groupBy("name").agg(
        F.slice(F.sort_array(F.collect_list(F.struct((-F.col("count")).alias("c"), "v"))), 1, limit).alias("kept")
    )
    kept = ranked.orderBy("name").limit(MAX_ATTRIBUTES).collect()
    return Attributes(numbers=numbers, categories={r.name: tuple(e.v for e in r.kept) for r in kept})


def _within_bounds(pairs: DataFrame) -> DataFrame:
    """(name, x) -> (name, x, low, high, far_off_value): x is null where it is out of the bounds of its name, and is
    far_off_value then. The bounds are null where all values are too large."""
    signed = F.signum("x") * F.log1p(F.abs("x"))
    quartiles = F.percentile(signed, F.array(F.lit(0.25), F.lit(0.75)))
    bounds = pairs.where(F.abs("x") <= LARGEST).groupBy("name").agg(quartiles.alias("q"))
    first, third = F.get("q", F.lit(0)), F.get("q", F.lit(1))
    distance = F.greatest(FAR_OFF * (third - first), F.lit(FAR_OFF_UNITS))
    bounds = bounds.select("name", _unsigned(first - distance).alias("low"), _unsigned(third + distance).alias("high"))
    placed = pairs.join(F.broadcast(bounds), "name", "left")
    inside = F.coalesce(F.col("x").between(F.col("low"), F.col("high")), F.lit(False))
    return placed.select(
        "name",
        F.when(inside, F.col("x")).alias("x"),
        "low",
        "high",
        F.when(~inside, F.col("x")).alias("far_off_value"),
    )


def _unsigned(signed: Column) -> Column:
    """The number of a signed logarithm, within LARGEST."""
    return F.signum(signed) * F.least(F.expm1(F.abs(signed)), F.lit(LARGEST))


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
