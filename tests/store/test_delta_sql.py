"""What the tables do over Spark Connect in SQL is what Delta's own API does; the statements run in any session."""

from __future__ import annotations

from pathlib import Path

import pytest
from delta.tables import DeltaTable
from nightstream.store import delta_sql
from nightstream.store.delta_sql import SqlTable, path_name
from nightstream.store.tables import USER_VECTORS
from pyspark.sql import functions as F

BEFORE = [("kept", 5, "a"), ("older", 1, "b"), ("gone", 1, "c")]
ARRIVING = [("kept", 4, "x"), ("older", 2, "it's {y}"), ("gone", 2, None), ("new", 1, "z"), ("never", 1, None)]
COLUMNS = "id string, revision int, item string"


def test_a_merge_does_what_deltas_own_does(spark, tmp_path):
    found = []
    for name in ("sql", "own"):
        # A path that a statement must not take apart.
        path = str(tmp_path / "it's {a}" / name)
        spark.createDataFrame(BEFORE, COLUMNS).write.format("delta").save(path)
        source = spark.createDataFrame(ARRIVING, COLUMNS).withColumn("also", F.lit(1))
        table = SqlTable(spark, path_name(path)) if name == "sql" else DeltaTable.forPath(spark, path)
        merge = table.alias("t").merge(source.alias("s"), "t.id = s.id AND s.id <> '{}'")
        merge = merge.whenMatchedDelete(condition="s.revision > t.revision AND s.item IS NULL")
        merge = merge.whenMatchedUpdateAll(condition="s.revision > t.revision OR false")
        merge.whenNotMatchedInsertAll(condition="s.item IS NOT NULL").execute()
        found.append({tuple(row) for row in spark.read.format("delta").load(path).collect()})
        assert table.history(1).first().version == 1
    assert found[0] == found[1] == {("kept", 5, "a"), ("older", 2, "it's {y}"), ("new", 1, "z")}


def test_a_table_is_made_once_with_its_properties(spark, tmp_path):
    path = str(tmp_path / "table")
    name = path_name(path)
    assert not delta_sql.exists(spark, name)
    for _ in range(2):
        delta_sql.create(spark, name, USER_VECTORS)
    assert delta_sql.exists(spark, name)
    own = DeltaTable.forPath(spark, path)
    assert own.history().count() == 1
    detail = own.detail().first()
    assert {key: detail.properties[key] for key in USER_VECTORS.properties} == USER_VECTORS.properties
    assert detail.description == USER_VECTORS.grain
    assert own.toDF().schema.names == USER_VECTORS.schema.names


@pytest.mark.parametrize("name", ["with`tick", "plain"])
def test_a_path_is_quoted(spark, tmp_path: Path, name: str):
    path = str(tmp_path / name)
    spark.range(1).write.format("delta").save(path)
    assert delta_sql.exists(spark, path_name(path))
