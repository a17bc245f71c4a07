"""The warm-up: Spark is started once for nothing but to make the starts after it faster."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from nightstream.runtime import session
from nightstream.runtime.settings import Settings

_ROWS = 50


def run(spark: SparkSession | None, settings: Settings) -> dict[str, Any]:
    """Archive the classes of Spark's JVM in the folder `spark.cache`; the archive's path and its size in MB.

    Starts a session of its own. Raises MachineError where that can't be, or where nothing can be kept.
    """
    archive = session.record(settings.spark, exercise)
    return {"archive": str(archive), "mb": round(archive.stat().st_size / 1e6)}


def exercise(spark: SparkSession) -> None:
    """What a night and a stream do with Spark: JSON and Delta, joins, windows, Python and Arrow, a query with
    foreachBatch."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = [json.dumps({"user_id": f"u{n % 7}", "item_id": f"i{n}", "event_time": n}) for n in range(_ROWS)]
        (folder / "lines").mkdir()
        (folder / "lines" / "1.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        # With its scheme, since Spark may be set to take paths without one for those of another file system.
        at, schema = f"file://{folder.resolve()}", "user_id string, item_id string, event_time bigint"
        table = f"delta.`{at}/table`"
        spark.read.schema(schema).json(f"{at}/lines").write.format("delta").save(f"{at}/table")

        def merge(arrived: DataFrame, batch_id: int) -> None:
            rows = arrived.mapInArrow(_as_they_are, schema).toArrow()
            assert batch_id or rows.num_rows == _ROWS
            spark.createDataFrame(rows).createOrReplaceTempView("arrived")
            spark.sql(
                f"MERGE INTO {table} t USING arrived s ON t.item_id = s.item_id "
                "WHEN MATCHED THEN UPDATE SET * WHEN NOT MATCHED THEN INSERT *"
            )

        parsed = F.from_json("value", schema).alias("event")
        query = (
            spark.readStream.text(f"{at}/lines")
            .select(parsed)
            .select("event.*")
            .writeStream.foreachBatch(merge)
            .option("checkpointLocation", f"{at}/checkpoint")
            .trigger(availableNow=True)
            .start()
        )
        query.awaitTermination()
        merged = spark.read.format("delta").load(f"{at}/table")
        newest = merged.groupBy("user_id").agg(F.max_by("item_id", "event_time").alias("item_id"), F.count("*"))
        merged.join(newest, ["user_id", "item_id"]).orderBy("user_id").toArrow()


def _as_they_are(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    yield from batches
