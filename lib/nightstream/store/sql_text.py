"""Values in SQL, as Spark and as DataFusion read them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime

Value = str | int | datetime | Sequence[str]


def for_spark(sql: str, values: Mapping[str, Value]) -> str:
    """The query with the values in place of their names behind colons; tables stay in braces."""
    return _filled(sql, values, lambda text: _doubled(text.replace("\\", "\\\\").replace("'", "\\'")))


def for_datafusion(sql: str, values: Mapping[str, Value]) -> str:
    """The same, with the tables' names without braces."""
    return _filled(re.sub(r"\{(\w+)\}", r"\1", sql), values, lambda text: text.replace("'", "''"))


def _doubled(text: str) -> str:
    """Without what PySpark would take for a frame."""
    return text.replace("{", "{{").replace("}", "}}")


def _filled(sql: str, values: Mapping[str, Value], escaped: Callable[[str], str]) -> str:
    def literal(value: Value) -> str:
        if isinstance(value, str):
            return f"'{escaped(value)}'"
        if isinstance(value, datetime):
            return f"TIMESTAMP '{value.astimezone(UTC):%Y-%m-%d %H:%M:%S.%f}'"
        if isinstance(value, int):
            return str(value)
        # No id is empty. (With NULL in the brackets delta-rs leaves the whole condition out.)
        return ", ".join(map(literal, value)) or "''"

    return re.sub(r":([a-z]\w*)", lambda match: literal(values[match[1]]), sql)
