"""Opening batch files and tables: every format becomes rows with the source's own columns and where they came from."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from delta.tables import DeltaTable
from pyspark.errors import AnalysisException, PySparkException
from pyspark.sql import Column, DataFrame, Row, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from nightstream.errors import SourceError
from nightstream.runtime.session import is_remote
from nightstream.store.delta_sql import SqlTable, path_name

ARRIVAL, POSITION, CORRUPT = "_arrival_time", "_position", "_corrupt_row"
_MISSING = ("PATH_NOT_FOUND", "DELTA_SCHEMA_NOT_SET", "DELTA_TABLE_NOT_FOUND", "TABLE_OR_VIEW_NOT_FOUND")
_OWN = (ARRIVAL, POSITION, CORRUPT)
_RECBOLE_TYPES = ("token", "token_seq", "float", "float_seq")


def open_batch(spark: SparkSession, kind: str, path: str) -> DataFrame:
    """The rows of a batch source with its own columns, and the columns _arrival_time and _position beside them.

    csv and recbole give text columns (a broken row has its line in _corrupt_row), jsonl one column `value`.
    Raises SourceError for a source that is missing or cannot be read.
    """
    try:
        if kind == "jsonl":
            rows = spark.read.text(path).where(F.trim("value") != "")
        elif kind == "csv":
            rows = _delimited(spark, path, {"header": "true", "escape": '"', "enforceSchema": "false"})
        elif kind == "recbole":
            rows = _delimited(spark, path, {"header": "true", "sep": "\t", "quote": "", "enforceSchema": "false"})
        elif kind == "delta":
            rows = load(spark.read.format("delta"), path)
        else:
            rows = spark.read.parquet(path)
        rows = rows.withColumns(origin(F.lit(path) if kind == "delta" else F.col("_metadata.file_path")))
        if kind == "recbole":
            rows = rows.withColumnsRenamed({c: recbole_name(c) for c in rows.columns})
        rows.schema  # noqa: B018 - over Spark Connect only this asks whether the path exists
    except Exception as error:
        raise unreadable(error, kind, path, "its path in sources") from error
    return rows


def fingerprint(spark: SparkSession, kind: str, path: str) -> str:
    """A short text that changes when the source does: from names, times and sizes of its files, or from the table's
    newest version; no file is opened. Raises SourceError for a source that is missing."""
    try:
        if kind == "delta":
            row = newest_version(spark, path)
        else:
            # Without the column `content` it only lists.
            files = spark.read.format("binaryFile").load(path)
            each = F.xxhash64("path", "modificationTime", "length")
            row = files.agg(F.count(F.lit(1)), F.bit_xor(each)).first()
    except Exception as error:
        raise unreadable(error, kind, path, "its path in sources") from error
    assert row is not None
    return "/".join(str(value) for value in row)


def own_columns(rows: DataFrame) -> list[str]:
    """The columns of the source itself, without the ones that open_batch put beside them."""
    return [c for c in rows.columns if c not in _OWN]


def require_columns(rows: DataFrame, path: str, wanted: Iterable[str]) -> None:
    """Raise SourceError, naming the missing and the present columns, unless every wanted column is there."""
    present = own_columns(rows)
    missing = sorted(set(wanted) - set(present))
    if missing:
        raise SourceError(
            f"{path} lacks the column(s) {', '.join(missing)} (present: {', '.join(present)}); "
            "mend the mapping in sources or the file"
        )


def recbole_name(header: str) -> str:
    """`movie_title:token_seq` → `movie_title`; a header without a RecBole type stays."""
    name, _, kind = header.rpartition(":")
    return name if name and kind in _RECBOLE_TYPES else header


def recbole_types(spark: SparkSession, path: str) -> dict[str, str]:
    """Column → RecBole type, from the typed header of an atomic file. Raises SourceError for an untyped header."""
    try:
        headers = spark.read.options(header="true", sep="\t", quote="").csv(path).columns
    except Exception as error:
        raise unreadable(error, "recbole", path, "its path in sources") from error
    untyped = [h for h in headers if recbole_name(h) == h]
    if untyped:
        raise SourceError(
            f"{path}: the header(s) {', '.join(untyped)} lack a RecBole type such as :token; "
            "mend the header or use format: csv"
        )
    return {recbole_name(h): h.rpartition(":")[2] for h in headers}


def recbole_siblings(path: str) -> dict[str, str]:
    """The local files beside `X.inter` that exist: {"items": "X.item", "users": "X.user"}."""
    if not path.endswith(".inter"):
        return {}
    stem = path.removesuffix(".inter")
    candidates = {"items": f"{stem}.item", "users": f"{stem}.user"}
    return {name: file for name, file in candidates.items() if Path(file.removeprefix("file:")).is_file()}


def quoted(name: str) -> Column:
    """A column by its literal name: dots and other signs in it mean nothing."""
    return F.col("`" + name.replace("`", "``") + "`")


def as_text(rows: DataFrame, name: str) -> Column:
    """A column of bytes as the text that they are, or in base64 where they are none; other columns as they are.

    Some writers of Parquet do not mark their texts.
    """
    column = quoted(name)
    if not isinstance(rows.schema[name].dataType, T.BinaryType):
        return column
    text = column.cast("string")
    return F.when(F.is_valid_utf8(text), text).otherwise(F.base64(column)).alias(name)


def origin(position: Column) -> dict[str, Column]:
    """_position as given and _arrival_time, the modification time of the file."""
    return {POSITION: position, ARRIVAL: F.col("_metadata.file_modification_time")}


def _is_table_name(path: str) -> bool:
    """Whether a Delta table is given by its name: that has dots and no slash."""
    return "/" not in path and "." in path


def newest_version(spark: SparkSession, path: str) -> Row | None:
    """version and timestamp of a Delta table's newest commit; None where its history is gone."""
    table: DeltaTable | SqlTable
    if is_remote(spark):
        table = SqlTable(spark, path if _is_table_name(path) else path_name(path))
    else:
        table = DeltaTable.forName(spark, path) if _is_table_name(path) else DeltaTable.forPath(spark, path)
    return table.history(1).select("version", "timestamp").first()


def load(reader, path: str) -> DataFrame:
    """A Delta table by path or by name."""
    return reader.table(path) if _is_table_name(path) else reader.load(path)


def _delimited(spark: SparkSession, path: str, options: dict[str, str]) -> DataFrame:
    columns = spark.read.options(**options).csv(path).columns
    schema = T.StructType([T.StructField(c, T.StringType()) for c in [*columns, CORRUPT]])
    return spark.read.options(**options, columnNameOfCorruptRecord=CORRUPT).schema(schema).csv(path)


def unreadable(error: Exception, kind: str, path: str, setting: str) -> SourceError:
    """What to tell the person whose source Spark could not open."""
    condition = (error.getCondition() or "") if isinstance(error, PySparkException) else ""
    # Py4J wraps what PySpark has no class for; the condition in brackets leads the sentence that helps.
    text = "[" + str(error).partition("[")[2] if "[" in str(error) else str(error)
    if isinstance(error, AnalysisException) and (condition in _MISSING or "doesn't exist" in text):
        return SourceError(f"the source {path} does not exist; check {setting}")
    if "UNABLE_TO_INFER_SCHEMA" in condition:
        return SourceError(f"the source {path} holds no readable {kind} file; check {setting}")
    return SourceError(
        f"the source {path} cannot be read as {kind} ({text.strip().splitlines()[0][:300]}); mend it or {setting}"
    )
