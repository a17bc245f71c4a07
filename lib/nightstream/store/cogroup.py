"""Arrow functions over whole users, on the executors: one shuffle, whatever the number of frames."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql import types as T

# A call gets whole users, some more rows or bytes than these, and one user of any size in one piece.
ROWS_PER_CALL = 16_384
BYTES_PER_CALL = 64 * 1024 * 1024

Tables = dict[str, pa.Table]


def by_user(
    frames: Mapping[str, DataFrame],
    function: Callable[[Tables], pa.Table],
    schema: T.StructType,
    rows_per_call: int = ROWS_PER_CALL,
) -> DataFrame:
    """Apply a function to the rows of all frames, whole users at a time.

    frames: by name, each with a column user_id that is never null. function: Arrow tables by the same names, with all
    rows of some users -> rows of `schema`. It must treat each user alone: which users come together is left open.
    """
    parts = []
    for number, frame in enumerate(frames.values()):
        # A struct column for each frame, null in the rows of the others.
        columns = [
            (F.struct(*frame.columns) if place == number else F.lit(None).cast(each.schema)).alias(f"_{place}")
            for place, each in enumerate(frames.values())
        ]
        parts.append(frame.select("user_id", F.lit(number).alias("_part"), *columns))
    rows, *others = parts
    for other in others:
        rows = rows.unionByName(other)
    grouped = rows.repartition("user_id").sortWithinPartitions("user_id")
    return grouped.mapInArrow(_caller(list(frames), function, rows_per_call), schema)


def _caller(
    names: list[str], function: Callable[[Tables], pa.Table], rows_per_call: int
) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def call(rows: pa.Table) -> Iterator[pa.RecordBatch]:
        rows = rows.combine_chunks()
        tables = {}
        for number, name in enumerate(names):
            own = rows.filter(pc.equal(rows["_part"], number))[f"_{number}"]
            columns = [pa.RecordBatch.from_struct_array(chunk) for chunk in own.chunks]
            tables[name] = pa.Table.from_batches(columns, pa.schema(list(own.type)))
        yield from function(tables).to_batches()

    def run(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        held: list[pa.RecordBatch] = []
        size = count = 0
        for batch in batches:
            if not batch.num_rows:
                continue
            held.append(batch)
            size, count = size + batch.nbytes, count + batch.num_rows
            if count < rows_per_call and size < BYTES_PER_CALL:
                continue
            rows = pa.Table.from_batches(held)
            users = rows["user_id"]
            # The last user may go on in the next batch.
            whole = pc.index(users, users[-1]).as_py()
            if whole:
                yield from call(rows.slice(0, whole))
                held = rows.slice(whole).combine_chunks().to_batches()
                size, count = sum(b.nbytes for b in held), sum(b.num_rows for b in held)
        if held:
            yield from call(pa.Table.from_batches(held))

    return run
