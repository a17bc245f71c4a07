"""Errors of Spark that a person can mend, put into one sentence."""

from __future__ import annotations

import re

# What Python raises inside a micro-batch or on an executor comes back as the text of a Java exception.
_OURS = re.compile(r"nightstream\.errors\.\w+: ([^\r\n]+)")

_KINDS = {
    "PATH_NOT_FOUND": "a path that a source or table names is not there",
    "DELTA_PATH_DOES_NOT_EXIST": "a table is missing",
    "DELTA_TABLE_NOT_FOUND": "a table is missing",
    "DELTA_MISSING_DELTA_TABLE": "a table is missing",
    "DELTA_MISSING_DELTA_TABLE_COPY_INTO": "a table is missing",
    "TABLE_OR_VIEW_NOT_FOUND": "a table is missing",
    "SCHEMA_NOT_FOUND": "the schema that storage.root names is not there",
    "UNABLE_TO_INFER_SCHEMA": "a source has no file that can be read in the format that its settings name",
    "FAILED_READ_FILE": "a file of a source cannot be read",
    "DATA_SOURCE_NOT_FOUND": "Spark lacks the package for a source's format; name it in spark.packages",
}
_CLASS = re.compile(r"\[([A-Z_]+)[.\]]")
_KAFKA_PACKAGE = "org.apache.spark:spark-sql-kafka-0-10_2.13:4.2.0"
_MISSING_KAFKA = "Failed to find data source: kafka"


def sentence_for(error: BaseException) -> str | None:
    """One sentence where the error, or one that it wraps, is of a known kind; None where it is a defect of ours."""
    for cause in _chain(error):
        text = str(cause)
        if found := _OURS.search(text):
            return found[1].strip()
    for cause in _chain(error):
        if type(cause).__module__.split(".")[0] not in {"pyspark", "py4j"}:
            continue
        text = str(cause)
        if _MISSING_KAFKA in text:
            return f"Spark lacks the Kafka source; add {_KAFKA_PACKAGE} to spark.packages"
        for name in _CLASS.findall(text):
            if meaning := _KINDS.get(name):
                return f"{meaning}: {_first_line(text)}"
    return None


def _chain(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    return chain


def _first_line(text: str) -> str:
    line = next((part.strip() for part in text.splitlines() if part.strip()), "")
    return re.sub(r"\s*SQLSTATE: \w+", "", re.sub(r"^.*?\[[A-Z_.]+\]\s*", "", line))
