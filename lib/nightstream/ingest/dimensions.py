"""What sources say of items and users, in the shape of their tables, and merged into them."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import TypeVar

from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F
from pyspark.sql import types as T

from nightstream.errors import SourceError
from nightstream.ingest import formats
from nightstream.ingest.formats import (
    ARRIVAL,
    POSITION,
    as_text,
    open_batch,
    own_columns,
    quoted,
    recbole_types,
    require_columns,
)
from nightstream.ingest.parse import BAD_ID, BLANK, LONGEST_NUMBER, NUMBER, is_number, json_objects, whole
from nightstream.runtime.settings import ItemSource, Settings, UserSource
from nightstream.store.merge import Merge, When
from nightstream.store.storage import Storage
from nightstream.store.tables import CATEGORIES, ITEMS, NUMBERS, USERS, TableSpec

log = logging.getLogger(__name__)
Source = TypeVar("Source", ItemSource, UserSource)

NO_ID, REPEATED = "without a usable id", "repeated"

_FALSE = ("0", "false", "f", "no", "n", "off")
# Links and keys of other systems: as many values as rows, and nothing to learn from them.
_IDENTIFIER = re.compile(r"(^|_)(id|ids|url|link|asin|isbn|imdb|tmdb)$", re.IGNORECASE)


@dataclass(frozen=True)
class Described:
    """rows: one per id, in the table's schema. left_out: rows of the source that are not among them, by reason."""

    rows: DataFrame
    left_out: dict[str, int]


def items(spark: SparkSession, source: ItemSource, max_id_length: int) -> Described:
    """ITEMS rows of the source. text is the text columns joined, category values and words parted by single spaces;
    numbers that cannot be read, NaN included, are left out; an item is available unless its column says no.

    Rows without a usable id are left out; of rows with one id the one from the newest file stays, among those the one
    with the greatest content. A RecBole source that maps no text, categories and numbers is mapped by its typed header.
    Raises SourceError for a source that is missing, unreadable, without a usable row, or lacks a mapped column.
    """
    if source.format == "recbole" and not (source.text or source.categories or source.numbers):
        source = _mapped_by_header(source, recbole_types(spark, source.path))
    text = tuple(dict.fromkeys(source.text))
    wanted = [source.id, source.title, source.available, *text, *source.categories, *source.numbers]
    rows = _opened(spark, source, wanted)
    columns = {
        "title": _line(_text(rows, source.title)) if source.title else F.lit(None).cast("string"),
        "text": _line(F.concat_ws(" ", *(_text(rows, c) for c in text))),
        "categories": _categories(rows, source.categories),
        "numbers": _numbers(rows, source.numbers),
        "available": _available(_text(rows, source.available)) if source.available else F.lit(True),
    }
    return _described(rows, source, ITEMS, "item_id", columns, max_id_length, None)


def users(spark: SparkSession, source: UserSource, max_id_length: int, reserved_user: str) -> Described:
    """USERS rows of the source, by the rules of `items`; a row with the reserved id has no usable id."""
    if source.format == "recbole" and not (source.categories or source.numbers):
        source = _mapped_by_header(source, recbole_types(spark, source.path))
    rows = _opened(spark, source, [source.id, *source.categories, *source.numbers])
    columns = {"categories": _categories(rows, source.categories), "numbers": _numbers(rows, source.numbers)}
    return _described(rows, source, USERS, "user_id", columns, max_id_length, reserved_user)


def _mapped_by_header(source: Source, types: dict[str, str]) -> Source:
    types = {c: t for c, t in types.items() if c != source.id}
    categories: dict[str, str | None] = {
        c: None for c, t in types.items() if t == "token" and not _IDENTIFIER.search(c)
    }
    sequences = [c for c, t in types.items() if t == "token_seq"]
    derived: dict[str, object] = {"numbers": tuple(c for c, t in types.items() if t in ("float", "float_seq"))}
    if isinstance(source, ItemSource):
        derived |= {"text": tuple(sequences), "title": source.title or next(iter(sequences), None)}
    else:
        categories |= dict.fromkeys(sequences, " ")
    return source.model_copy(update={**derived, "categories": categories})


def _opened(spark: SparkSession, source: ItemSource | UserSource, wanted: list[str | None]) -> DataFrame:
    names = list(dict.fromkeys(c for c in wanted if c is not None))
    rows = open_batch(spark, source.format, source.path)
    if source.format == "jsonl":
        # Without a schema of its own the file cannot lack a column: an absent key is an absent value.
        parsed = rows.withColumn("_object", json_objects("value", names))
        return parsed.select(
            *(F.col("_object").getField(c).alias(c) for c in names), F.col("value").alias("_line"), POSITION, ARRIVAL
        )
    require_columns(rows, source.path, names)
    line = F.to_json(F.struct(*(quoted(c) for c in own_columns(rows))))
    return rows.withColumn("_line", line)


def _described(
    rows: DataFrame,
    source: ItemSource | UserSource,
    spec: TableSpec,
    key: str,
    columns: dict[str, Column],
    max_id_length: int,
    reserved: str | None,
) -> Described:
    identity = _identity(rows, source.id, source.format)
    usable = F.length(identity).between(1, max_id_length) & ~identity.rlike(BAD_ID)
    if reserved is not None:
        usable &= identity != reserved
    newest = Window.partitionBy(key).orderBy(F.desc(ARRIVAL), F.desc(POSITION), F.desc("_line"))
    selected = rows.select(
        F.when(usable, identity).alias(key), *(c.alias(n) for n, c in columns.items()), ARRIVAL, POSITION, "_line"
    )
    place = F.when(F.col(key).isNotNull(), F.row_number().over(newest))
    judged = selected.withColumn("_place", place).select(*spec.schema.names, "_place")
    counts = judged.agg(
        F.count("*").alias("all"), F.count("_place").alias("usable"), F.count_if(F.col("_place") == 1).alias("kept")
    ).first()
    assert counts is not None
    left_out = {NO_ID: counts["all"] - counts["usable"], REPEATED: counts["usable"] - counts["kept"]}
    if not counts["kept"]:
        raise SourceError(f"the source {source.path} holds no row with a usable {source.id}; check the file and its id")
    if any(left_out.values()):
        log.warning("rows left out of %s: %s", source.path, ", ".join(f"{n} {why}" for why, n in left_out.items() if n))
    return Described(judged.where(F.col("_place") == 1).drop("_place"), left_out)


def _text(rows: DataFrame, name: str) -> Column:
    """The column as text; of a list its parts with spaces between."""
    if isinstance(rows.schema[name].dataType, T.ArrayType):
        return F.concat_ws(" ", quoted(name).cast("array<string>"))
    return F.make_valid_utf8(as_text(rows, name).cast("string"))


def _identity(rows: DataFrame, name: str, kind: str) -> Column:
    """The id as text, as parse.parse reads it in events."""
    text = F.btrim(_text(rows, name), F.lit(BLANK))
    if kind == "jsonl":
        number = is_number(text, F.col("_line"), name)
    else:
        number = F.lit(isinstance(rows.schema[name].dataType, T.FractionalType))
    found = F.when(number, whole(text)).otherwise(text)
    return F.when(~(number & found.rlike(r"[.eE]")), found)


def _line(text: Column) -> Column:
    """Whitespace normalised; null where nothing is left."""
    flat = F.trim(F.regexp_replace(text, r"(?U)\s+", " "))
    return F.when(flat != "", flat)


def _categories(rows: DataFrame, separators: dict[str, str | None]) -> Column:
    if not separators:
        return F.create_map().cast(CATEGORIES)
    lists = F.map_from_arrays(
        F.array(*(F.lit(c) for c in separators)), F.array(*(_values(rows, c, s) for c, s in separators.items()))
    )
    return F.map_filter(lists, lambda _, values: F.size(values) > 0)


def _values(rows: DataFrame, name: str, separator: str | None) -> Column:
    if isinstance(rows.schema[name].dataType, T.ArrayType):
        values = quoted(name).cast("array<string>")
    else:
        text = _text(rows, name)
        single = F.split(text, re.escape(separator)) if separator else F.array(text)
        listed = F.when(text.startswith("["), F.from_json(text, T.ArrayType(T.StringType())))
        values = F.coalesce(listed, single)
    trimmed = F.transform(values, lambda v: _line(v))
    return F.coalesce(F.array_distinct(F.filter(trimmed, lambda v: v.isNotNull())), F.array().cast("array<string>"))


def _numbers(rows: DataFrame, names: tuple[str, ...]) -> Column:
    if not names:
        return F.create_map().cast(NUMBERS)
    unique = list(dict.fromkeys(names))
    read = F.map_from_arrays(F.array(*(F.lit(c) for c in unique)), F.array(*(_number(rows, c) for c in unique)))
    return F.map_filter(read, lambda _, value: value.isNotNull())


def _number(rows: DataFrame, name: str) -> Column:
    """The first number of the text (a RecBole float_seq has several), null where it is none or not finite."""
    first = F.regexp_extract(_text(rows, name), r"^\s*(\S+)", 1)
    number = F.when((F.length(first) <= LONGEST_NUMBER) & first.rlike(NUMBER), first.try_cast("double"))
    return F.when(F.abs(number) < float("inf"), number)


def _available(text: Column) -> Column:
    text = F.btrim(text, F.lit(BLANK))
    # A flag that went through a table beside missing values is 1.0 or 0.0, and a stock may be below nothing.
    number = F.when((F.length(text) <= LONGEST_NUMBER) & text.rlike(NUMBER), text.try_cast("double"))
    return F.coalesce(~F.lower(text).isin(*_FALSE) & F.coalesce(number > 0, F.lit(True)), F.lit(True))


def merge(storage: Storage, spec: TableSpec, rows: DataFrame, attempts: int) -> None:
    """Take the rows up into ITEMS or USERS by id: new descriptions replace old ones, what the rows lack stays."""
    (key,) = spec.keys
    # Maps cannot be compared, their JSON can: rows that did not change are not written again.
    columns = ", ".join(f"t.{c} AS {c}" for c in spec.schema.names)
    changed = f"to_json(struct({columns})) <> to_json(struct({columns.replace('t.', 's.')}))"
    change = Merge(f"t.{key} = s.{key}", (When("update", changed), When("insert")))
    storage.with_retries(lambda: storage.merge(spec, rows, change), attempts, spec.name)


class ItemsSource:
    """The items source of a running stream, read again whenever its files or its table have changed."""

    def __init__(self, storage: Storage, settings: Settings) -> None:
        self.storage, self.settings = storage, settings
        self._taken_up: str | None = None

    def take_up(self) -> None:
        """Merge the source into ITEMS where it has changed since the last call.

        A source that cannot be read is no reason to stop the events: it is logged and tried again at the next call.
        """
        source, spark = self.settings.sources.items, self.storage.spark
        if source is None:
            return
        try:
            # Before it is read: what changes meanwhile is read at the next call.
            state = formats.fingerprint(spark, source.format, source.path)
            if state == self._taken_up:
                return
            described = items(spark, source, self.settings.events.max_id_length)
            merge(self.storage, ITEMS, described.rows, self.settings.serving.merge_attempts)
            self._taken_up = state
        except Exception as error:
            log.warning("the items stay as they were until their source can be read", extra={"error": str(error)[:300]})
