"""Small steps over Arrow arrays that Spark's workers and the models share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def strings(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(pa.string())


def combined(column: pa.ChunkedArray) -> pa.Array:
    """The column as one array."""
    array = column.combine_chunks()
    return array if isinstance(array, pa.Array) else pa.concat_arrays(array.chunks)


def names(items: Sequence[str], rows: np.ndarray) -> np.ndarray:
    """1-based catalogue rows -> object array of ids, None for 0."""
    table = np.array([None, *items], dtype=object)
    return table[rows]


def rows_of(values: pa.Array, ids: pa.Array) -> np.ndarray:
    """int64: 1-based positions of values in ids, 0 where absent."""
    places = pc.index_in(values.cast(ids.type), value_set=ids)
    return np.asarray(pc.fill_null(places, -1), dtype=np.int64) + 1
