"""Errors of Spark that a person can mend, put into one sentence."""

from __future__ import annotations

import re

from py4j.protocol import Py4JError, Py4JNetworkError

from nightstream import errors
from nightstream.errors import NightstreamError

# What Python raises inside a micro-batch or on an executor comes back as the text of a Java exception.
_OURS = re.compile(rf"{re.escape(errors.__name__)}\.(\w+): ([^\r\n]+)")

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
_KINDS |= dict.fromkeys(
    (
        "DELTA_SCHEMA_CHANGED",
        "DELTA_SCHEMA_CHANGED_WITH_VERSION",
        "DELTA_STREAMING_INCOMPATIBLE_SCHEMA_CHANGE_USE_SCHEMA_LOG",
        "DELTA_SOURCE_TABLE_IGNORE_CHANGES",
    ),
    "the table that stream.path names was rewritten; delete the folder stream.checkpoint and start the stream again, "
    "no event counts twice",
)
_CLASS = re.compile(r"\[([A-Z_]+)[.\]]")
# Kafka's errors have no class of Spark's; each has its sentence.
_KAFKA = {
    "Failed to find data source: kafka": "Spark lacks the Kafka source; add "
    "org.apache.spark:spark-sql-kafka-0-10_2.13:4.2.0 to spark.packages",
    "SaslAuthenticationException": "the Kafka broker refuses the login; check user, password and mechanism in "
    "stream.options",
    "UnknownTopicOrPartitionException": "the Kafka broker has no topic of that name; create it or check stream.path",
    "Timed out waiting for a node assignment": "no Kafka broker answers; check kafka.bootstrap.servers in "
    "stream.options, and that the broker runs",
}
_GONE = (
    "Spark's Java process ended while the command ran; see what it said last, raise spark.driver_memory if it lacked "
    "memory, and run the command again"
)


def sentence_for(error: BaseException) -> str | None:
    """One sentence where the error, or one that it wraps, is of a known kind; None where it is a defect of ours."""
    if (ours := ours_in(error)) is not None:
        return str(ours)
    for cause, text in _texts(error):
        if text is None or isinstance(cause, Py4JNetworkError):
            return _GONE
        if type(cause).__module__.split(".")[0] not in {"pyspark", "py4j"}:
            continue
        for sign, sentence in _KAFKA.items():
            if sign in text:
                return sentence
        for name in _CLASS.findall(text):
            if meaning := _KINDS.get(name):
                return f"{meaning}: {_first_line(text)}"
    return None


def ours_in(error: BaseException) -> NightstreamError | None:
    """The error itself where it is one of ours, else the one that its text, or that of one it wraps, names; None where
    none does."""
    if isinstance(error, NightstreamError):
        return error
    for _, text in _texts(error):
        if match := _OURS.search(text or ""):
            kind = getattr(errors, match[1], NightstreamError)
            # A kind that makes its sentence itself can't be made of one.
            plain = kind.__init__ is NightstreamError.__init__
            return (kind if plain else NightstreamError)(match[2].strip())
    return None


def _texts(error: BaseException) -> list[tuple[BaseException, str | None]]:
    return [(cause, _text(cause)) for cause in _chain(error)]


def _chain(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    return chain


def _text(cause: BaseException) -> str | None:
    """None where the text lay in a JVM that is gone."""
    try:
        return str(cause)
    except (OSError, Py4JError):
        return None


def _first_line(text: str) -> str:
    line = next((part.strip() for part in text.splitlines() if part.strip()), "")
    return re.sub(r"\s*SQLSTATE: \w+", "", re.sub(r"^.*?\[[A-Z_.]+\]\s*", "", line))


def has_new_columns(error: Exception) -> bool:
    """Whether a Delta source stopped the query because its schema has changed; a query started anew goes on."""
    return any(name in str(error) for name in ("DELTA_SCHEMA_CHANGED", "DELTA_STREAMING_METADATA_EVOLUTION"))
