"""Whole users reach the function, whatever the size of the batches and of the users."""

from __future__ import annotations

import pyarrow as pa
import pytest
from nightstream.store.cogroup import by_user
from pyspark.sql import functions as F


def counter():
    # Defined in here, so that it travels to the workers with its code.
    def counted(tables: dict[str, pa.Table]) -> pa.Table:
        """One row per user and call: what a user cut in two would have twice."""
        numbers = tables["numbers"].group_by("user_id").aggregate([("number", "count"), ("number", "sum")])
        words = tables["words"].group_by("user_id").aggregate([("word", "count")])
        joined = numbers.join(words, "user_id", join_type="full outer")
        columns = [joined[n] for n in ("user_id", "number_count", "number_sum", "word_count")]
        return pa.table(columns, names=["user_id", "numbers", "total", "words"])

    return counted


@pytest.mark.parametrize("rows_per_call", [1, 70, 16_384])
def test_every_row_of_a_user_comes_in_one_call(spark, rows_per_call):
    numbers = spark.range(5_000).select(F.concat(F.lit("u"), F.floor(F.sqrt("id"))).alias("user_id"),
                                        F.col("id").alias("number"))  # fmt: skip
    words = spark.createDataFrame([("u3", "a"), ("u3", "b"), ("only words", "c")], "user_id string, word string")
    schema = "user_id string, numbers bigint, total bigint, words bigint"
    wanted = spark.createDataFrame([], schema).schema
    found = by_user({"numbers": numbers, "words": words}, counter(), wanted, rows_per_call)
    rows = {r.user_id: r for r in found.collect()}
    assert len(rows) == found.count() == 72
    expected: dict[str, list[int]] = {}
    for number in range(5_000):
        expected.setdefault(f"u{int(number**0.5)}", []).append(number)
    for user, values in expected.items():
        assert (rows[user].numbers, rows[user].total) == (len(values), sum(values)), user
    assert (rows["u3"].words, rows["only words"].words, rows["only words"].numbers) == (2, 1, None)
