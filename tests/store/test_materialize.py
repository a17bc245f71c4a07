from __future__ import annotations

import pytest
from nightstream.store.materialize import cut
from pyspark.errors import PySparkException
from pyspark.sql import functions as F


def totals():
    return {"rows": F.count(F.lit(1)), "odd": F.count_if(F.col("id") % 2 == 1), "last": F.max("id")}


@pytest.mark.parametrize("options", [{}, {"size": 5}, {"limit": 0}, {"limit": 4}, {"limit": 4, "cached": False}])
def test_rows_and_totals_are_those_of_the_frame(spark, options):
    found = cut(spark.range(5), totals(), **options)
    assert found.totals == {"rows": 5, "odd": 2, "last": 4}
    assert [r.id for r in found.rows.orderBy("id").collect()] == [0, 1, 2, 3, 4]
    found.release()


def test_nothing_has_no_totals(spark):
    found = cut(spark.range(5).where("id > 9"), totals())
    assert found.rows.isEmpty()
    assert not found.totals["rows"]


@pytest.mark.parametrize("options", [{}, {"limit": 1}, {"limit": 1, "cached": False}])
def test_what_was_cut_stands_still(spark, tmp_path, options):
    source = str(tmp_path / "numbers")
    spark.range(3).write.parquet(source)
    found = cut(spark.read.parquet(source), totals(), **options)
    for file in (tmp_path / "numbers").iterdir():
        file.unlink()
    assert found.rows.count() == 3
    found.release()


@pytest.mark.parametrize("cached", [True, False])
def test_rows_that_cannot_be_kept_are_told_and_computed_again(spark, monkeypatch, caplog, cached):
    rows = spark.range(5)

    def refused(self):
        raise PySparkException("[NOT_SUPPORTED] PERSIST TABLE is not supported on serverless compute\nmore")

    for name in ("persist", "localCheckpoint"):
        monkeypatch.setattr(type(rows), name, refused)
    found = cut(rows, totals(), limit=1, cached=cached)
    assert found.totals == {"rows": 5, "odd": 2, "last": 4}
    (warned,) = caplog.records
    assert "computed again" in warned.getMessage()
    assert warned.wanted == ("cache" if cached else "checkpoint")
    assert warned.reason == "[NOT_SUPPORTED] PERSIST TABLE is not supported on serverless compute"
