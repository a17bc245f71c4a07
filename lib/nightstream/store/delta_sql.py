"""Delta's table API in SQL, for Spark Connect: there Delta's own needs a plugin in the server, and SQL needs none."""

from __future__ import annotations

import re

from pyspark.errors import AnalysisException
from pyspark.sql import DataFrame, SparkSession

from nightstream.store.tables import TableSpec


def path_name(path: str) -> str:
    """The SQL name of a table that lies by path."""
    return "delta.`" + path.replace("`", "``") + "`"


def exists(spark: SparkSession, name: str) -> bool:
    """Whether there is a Delta table of that SQL name."""
    try:
        spark.sql(f"DESCRIBE DETAIL {name}").first()
    except AnalysisException:
        return False
    return True


def create(spark: SparkSession, name: str, spec: TableSpec) -> None:
    """Create the table, empty, where it is not there yet. name: in SQL."""
    columns = ", ".join(f"`{field.name}` {field.dataType.simpleString()}" for field in spec.schema)
    properties = ", ".join(f"{_literal(key)} = {_literal(value)}" for key, value in spec.properties.items())
    spark.sql(
        f"CREATE TABLE IF NOT EXISTS {name} ({columns}) USING DELTA COMMENT {_literal(spec.grain)} "
        f"TBLPROPERTIES ({properties})"
    )


class SqlTable:
    """A Delta table by its SQL name: what the tables need of delta.tables.DeltaTable, under the same names."""

    def __init__(self, spark: SparkSession, name: str, alias: str = "") -> None:
        self.spark, self.name, self.as_name = spark, name, alias

    def alias(self, name: str) -> SqlTable:
        return SqlTable(self.spark, self.name, name)

    def history(self, limit: int) -> DataFrame:
        return self.spark.sql(f"DESCRIBE HISTORY {self.name} LIMIT {limit}")

    def merge(self, source: DataFrame, condition: str) -> SqlMerge:
        """condition: names the columns of either side by its alias."""
        return SqlMerge(self, source, condition)


class SqlMerge:
    """A MERGE, clause by clause; the methods are those of delta.tables.DeltaMergeBuilder."""

    def __init__(self, table: SqlTable, source: DataFrame, condition: str) -> None:
        self.table, self.source, self.condition = table, source, condition
        # The frame's own alias cannot be asked for: it is the name in the condition that is not the table's.
        (self.source_name,) = set(re.findall(r"\b([A-Za-z_]\w*)\.", condition)) - {table.as_name}
        self._clauses: list[str] = []

    def whenMatchedUpdateAll(self, condition: str | None = None) -> SqlMerge:
        return self._when("MATCHED", condition, "UPDATE SET *")

    def whenMatchedDelete(self, condition: str | None = None) -> SqlMerge:
        return self._when("MATCHED", condition, "DELETE")

    def whenNotMatchedInsertAll(self, condition: str | None = None) -> SqlMerge:
        return self._when("NOT MATCHED", condition, "INSERT *")

    def execute(self) -> None:
        table = self.table
        # The frame goes along with the statement, so no view is left behind.
        table.spark.sql(
            f"MERGE INTO {_braced(table.name)} AS {table.as_name} USING {{source}} AS {self.source_name} "
            f"ON {_braced(self.condition)} {_braced(' '.join(self._clauses))}",
            source=self.source,
        )

    def _when(self, matched: str, condition: str | None, action: str) -> SqlMerge:
        also = "" if condition is None else f" AND ({condition})"
        self._clauses.append(f"WHEN {matched}{also} THEN {action}")
        return self


def _braced(text: str) -> str:
    """As it is to stand in a statement that takes frames in braces."""
    return text.replace("{", "{{").replace("}", "}}")


def _literal(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
