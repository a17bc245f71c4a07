"""Small steps over Arrow arrays that Spark's workers and the models share."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def strings(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(pa.string())


def combined(column: pa.ChunkedArray) -> pa.Array:
    """The column as one array."""
    array = column.combine_chunks()
    return array if isinstance(array, pa.Array) else pa.concat_arrays(array.chunks)


def names(items: pa.Array, rows: np.ndarray) -> pa.Array:
    """1-based catalogue rows -> what items has of them, null for 0."""
    return items.take(pa.array(rows - 1, mask=rows == 0))


def rows_of(values: pa.Array, ids: pa.Array) -> np.ndarray:
    """int64: 1-based positions of values in ids, 0 where absent."""
    places = pc.index_in(values.cast(ids.type), value_set=ids)
    return np.asarray(pc.fill_null(places, -1), dtype=np.int64) + 1
