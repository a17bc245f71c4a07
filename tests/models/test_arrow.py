from __future__ import annotations

import pyarrow as pa
import pytest
from nightstream.models.arrow import combined, names, rows_of


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_rows_are_one_based_and_0_where_absent_or_null(kind: pa.DataType) -> None:
    ids = pa.array(["b", "a", "c"])
    assert rows_of(pa.array(["c", "x", None, "b"], kind), ids).tolist() == [3, 0, 0, 1]
    assert rows_of(pa.array([], kind), ids).tolist() == []


def test_names_undo_rows_of() -> None:
    ids = pa.array(["b", "a", "c"])
    assert names(ids, rows_of(pa.array(["c", "x", "b"]), ids)).to_pylist() == ["c", None, "b"]


@pytest.mark.parametrize("chunks", [[["a"], ["b", "c"]], [["a", "b", "c"]]])
def test_a_column_becomes_one_array(chunks: list[list[str]]) -> None:
    column = combined(pa.chunked_array(chunks))
    assert isinstance(column, pa.Array)
    assert column.to_pylist() == ["a", "b", "c"]
