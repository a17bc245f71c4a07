"""The specs hold together, and what Delta writes about a table tells no identifier."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from nightstream.errors import TableError
from nightstream.store.tables import ALL, BY_NAME, MODELS, REFRESHED, REFRESHES, USER_VECTORS, USERS


def test_names_are_distinct_and_keys_are_columns():
    assert len(BY_NAME) == len(ALL)
    for spec in ALL:
        assert spec.keys, spec.name
        assert set(spec.keys) <= set(spec.schema.names), spec.name


def test_a_refreshed_row_has_all_that_a_state_has():
    late = {"refreshed_at", "writer", "batch_id", "bucket"}
    assert set(USER_VECTORS.schema.names) - late <= set(REFRESHED.names)
    assert set(REFRESHES.schema.names) - late <= set(REFRESHED.names)


def test_a_missing_column_is_named_with_those_present():
    with pytest.raises(TableError, match=r"users lacks the column\(s\) numbers \(present: user_id, categories\)"):
        USERS.check(["user_id", "categories"])


def test_the_log_of_a_table_holds_no_identifier(storage, spark):
    storage.append(USERS, spark.createDataFrame([("secret-user", {"side": ["left"]}, {"age": 3.0})], USERS.schema))
    row = ("version-1", "trained", datetime(2024, 1, 1, tzinfo=UTC), "{}", "{}", "[]")
    storage.append(MODELS, spark.createDataFrame([row], MODELS.schema))

    def log(spec):
        return "".join(f.read_text() for f in Path(storage.location(spec), "_delta_log").glob("*.json"))

    assert "secret-user" not in log(USERS)
    assert "version-1" in log(MODELS)
    assert '"delta.enableDeletionVectors":"false"' in log(USERS)
