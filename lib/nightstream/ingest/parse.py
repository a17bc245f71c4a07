"""From payload to event: what a payload tells, and its verdict; pure, the same in batch and stream."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F
from pyspark.sql import types as T

from nightstream.runtime.settings import EventSettings
from nightstream.store.tables import EVENTS, RAW_EVENTS

NOT_UTF8, NOT_JSON, REPEATED_KEY = "not_utf8", "not_json", "repeated_key"
MISSING, TOO_LONG, UNREADABLE = "missing", "too_long", "unreadable"
RESERVED, IN_FUTURE, OUT_OF_RANGE, UNKNOWN = "reserved", "in_future", "out_of_range", "unknown"
REASONS = (
    *(NOT_UTF8, NOT_JSON, REPEATED_KEY, MISSING, TOO_LONG),
    *(UNREADABLE, RESERVED, IN_FUTURE, OUT_OF_RANGE, UNKNOWN),
)


BLANK = " \t\r\n\u00a0\u3000\ufeff"
NUMBER = r"^[+-]?(\d++\.?\d*+|\.\d++)([eE][+-]?\d{1,3})?$"
# Characters of a number or a time: no double is written with more, and patterns and parsers take more than twice as
# long for twice as many.
LONGEST_NUMBER = 1_100
_NOT_FINITE = r"(?i)^[+-]?(nan|inf|infinity)$"
_ISO = r"^\d{4}-\d{2}-\d{2}([T ]\d{2}:\d{2}(:\d{2}(\.\d{1,9})?)?)?"
_ZONE = r"(Z|[+-]\d{2}(:?\d{2})?)$"
# 201411, 20141118 and 201411181230 are no epoch times that anybody means, in whatever unit.
_COMPACT_DATE = r"^(19|20)\d\d(0[1-9]|1[0-2])((0[1-9]|[12]\d|3[01])(([01]\d|2[0-3])[0-5]\d)?)?$"
_FRACTIONAL = r"^-?\d+(\.\d+([eE][+-]?\d+)?|[eE][+-]?\d+)$"
_EXACT = 2**53  # below it a double holds every whole number
BAD_ID = r"[\x00-\x1f\x7f\ufffd]"
_LONE_SURROGATE = r"(?i)\\ud[89ab][0-9a-f]{2}(?!\\ud[c-f][0-9a-f]{2})|(?<!\\ud[89ab][0-9a-f]{2})\\ud[c-f][0-9a-f]{2}"
_IDS = ("event_id", "user_id", "item_id", "retracts")
_LONGEST_DOUBLE = 40
_SEPARATOR = "\u0001"
_MICROS = {"seconds": 1_000_000, "milliseconds": 1_000, "microseconds": 1}
_LAST_MICROSECOND = 253_402_300_799_999_999  # the end of the year 9999


def raw_rows(payloads: DataFrame) -> DataFrame:
    """The payload rows (payload, source, position, arrival_time, and any other columns) with their raw_id.

    Identical payloads at one position are numbered, so that position, and with it raw_id (32 hex digits of
    sha256 over source and position), is unique and the same whenever the position is read again.
    """
    content = F.col("payload").cast("binary")
    if "payload_bytes" in payloads.columns:
        content = F.coalesce("payload_bytes", content)
    digest = F.substring(F.sha2(content, 256), 1, 16)
    same = Window.partitionBy("source", "position", "_digest").orderBy("arrival_time")
    rows = payloads.withColumn("_digest", digest).withColumn("_ordinal", F.row_number().over(same))
    rows = rows.withColumn("position", F.concat("position", F.lit("#"), "_digest", F.lit("-"), "_ordinal"))
    raw_id = F.substring(F.sha2(F.concat_ws(_SEPARATOR, "source", "position"), 256), 1, 32)
    return rows.select(raw_id.alias("raw_id"), *payloads.columns)


def raw_table(parsed: pa.Table) -> pa.Table:
    """`raw_rows` of rows of `parse` that are on the driver; a test compares the two."""
    columns = (parsed[name].to_pylist() for name in ("source", "position", "payload", "payload_bytes"))
    rows = list(zip(*columns, strict=True))
    positions, raw_ids = [""] * len(rows), [""] * len(rows)
    met: Counter[tuple[str, str, str]] = Counter()
    for place in pc.array_sort_indices(parsed["arrival_time"], null_placement="at_start").to_pylist():
        source, position, text, content = rows[place]
        digest = hashlib.sha256(text.encode() if content is None else content).hexdigest()[:16]
        met[source, position, digest] += 1
        positions[place] = f"{position}#{digest}-{met[source, position, digest]}"
        named = _SEPARATOR.join((source, positions[place]))
        raw_ids[place] = hashlib.sha256(named.encode()).hexdigest()[:32]
    numbered = parsed.set_column(
        parsed.schema.get_field_index("position"), "position", pa.array(positions, pa.string())
    )
    return numbered.add_column(0, "raw_id", pa.array(raw_ids, pa.string()))


def parse(
    payloads: DataFrame,
    columns: Mapping[str, str],
    time_unit: str,
    rules: EventSettings,
    reserved_user: str,
    time_zone: str = "UTC",
) -> DataFrame:
    """One row per payload row (payload, arrival_time, and any other columns, which stay): the columns of RAW_EVENTS
    that a source may leave out (null then), those of EVENTS that the payload tells, and reason and field, both null for
    a valid event.

    Row by row, so that a streaming query does it before its micro-batches are cut. In a payload that is not UTF-8 the
    broken bytes become U+FFFD, because readers of the tables would fail on them; payload_bytes keeps it as it came.
    columns: our column → key of the payload's JSON object (top level). time_unit: auto, seconds, milliseconds,
    microseconds, nanoseconds or iso. time_zone: of texts that name none. A retraction may leave out item_id. A key
    given twice at the top level is refused: readers of JSON do not agree on which value counts.
    An id that came as a number with a fraction, as pandas writes whole numbers beside missing ones, is that whole
    number; where it is none, or a double does not hold it exactly, it is unreadable.
    A derived event_id leads with crc32("user_id/item_id"), so that order by (event_time, event_id) breaks ties by it.
    Never fails on a payload: whatever cannot be read gets a reason. What is too long is not looked into.
    """
    payloads = _readable(payloads)
    text, is_event = _texts(payloads, columns, rules.max_payload_bytes)
    added = [n for n in EVENTS.schema.names if n not in RAW_EVENTS.schema.names]
    return _checked(text, is_event, columns, time_unit, time_zone, rules, reserved_user).select(
        *payloads.columns, *added, "reason", "field"
    )


def _readable(payloads: DataFrame) -> DataFrame:
    """The payload rows with payload as valid text, and payload_bytes and headers where they were missing."""
    broken = F.when(~F.is_valid_utf8("payload"), F.col("payload").cast("binary"))
    if "payload_bytes" in payloads.columns:
        # Rows of raw_events, read again.
        broken = F.coalesce("payload_bytes", broken)
    columns = {"payload_bytes": broken, "payload": F.coalesce(F.make_valid_utf8("payload"), F.lit(""))}
    if "headers" not in payloads.columns:
        columns["headers"] = F.lit(None).cast(RAW_EVENTS.schema["headers"].dataType)
    return payloads.withColumns(columns)


def json_objects(name: str, keys: Sequence[str]) -> Column:
    """The text column as struct of strings with these keys; null unless the text is exactly one JSON object.

    Nested values are their JSON text. Of a key given twice the last value counts.
    """
    schema = T.ArrayType(T.StructType([T.StructField(k, T.StringType()) for k in keys]))
    # In brackets the parser must reach the end: alone it would accept `{…} garbage` and `{…}{…}` and drop the rest.
    bracketed = F.concat(F.lit("["), _without_mark(name), F.lit("]"))
    parsed = F.from_json(bracketed, schema, {"allowSingleQuotes": "false", "mode": "PERMISSIVE"})
    return F.when(F.size(parsed) == 1, F.get(parsed, F.lit(0)))


def _without_mark(name: str) -> Column:
    return F.ltrim(F.regexp_replace(name, "^\ufeff", ""))


def _texts(raw: DataFrame, columns: Mapping[str, str], max_bytes: int) -> tuple[DataFrame, Column]:
    """The payload's values as trimmed text columns _event_id, …, null where absent or blank, and «is a JSON object»;
    with _short, the payload, null where it is longer than max_bytes."""
    rows = raw.withColumn("_short", F.when(F.octet_length("payload") <= max_bytes, F.col("payload")))
    rows = rows.withColumn("_object", json_objects("_short", sorted(set(columns.values()))))
    values = {}
    for name in ("event_id", "user_id", "item_id", "event_type", "event_time", "value", "retracts"):
        if name in columns:
            trimmed = F.btrim(F.col("_object").getField(columns[name]), F.lit(BLANK))
            if name in _IDS:
                trimmed = F.when(is_number(trimmed, F.col("_short"), columns[name]), whole(trimmed)).otherwise(trimmed)
            values[f"_{name}"] = F.when(trimmed != "", trimmed)
        else:
            values[f"_{name}"] = F.lit(None).cast("string")
    return rows.withColumns(values), F.col("_object").isNotNull()


def _checked(
    rows: DataFrame,
    is_event: Column,
    columns: Mapping[str, str],
    time_unit: str,
    time_zone: str,
    rules: EventSettings,
    reserved_user: str,
) -> DataFrame:
    micros = _microseconds(_bounded("_event_time"), time_unit, time_zone)
    number = F.regexp_replace(_bounded("_value"), '"', "")
    rows = rows.withColumns(
        {
            "event_type": F.coalesce(F.col("_event_type"), F.lit(rules.default_type)),
            "_micros": micros,
            "value": F.when(number.rlike(NUMBER), number.try_cast("double") + F.lit(0.0)),
            "_infinite": number.rlike(_NOT_FINITE),
        }
    )
    retraction = F.col("event_type") == rules.retraction_type
    latest = F.unix_micros("arrival_time") + rules.max_future_seconds * 1_000_000
    value, time = F.col("value"), F.col("_micros")
    keys = F.json_object_keys(_without_mark("_short"))
    problems: list[tuple[Column, str, str]] = [
        (F.col("payload_bytes").isNotNull(), NOT_UTF8, "payload"),
        (F.col("_short").isNull(), TOO_LONG, "payload"),
        (~is_event, NOT_JSON, "payload"),
        (F.size(keys) > F.size(F.array_distinct(keys)), REPEATED_KEY, "payload"),
        *_id_problems("user_id", columns, rules.max_id_length, F.lit(True)),
        (F.col("_user_id") == reserved_user, RESERVED, "user_id"),
        (~F.col("event_type").isin(*rules.types, rules.retraction_type), UNKNOWN, "event_type"),
        *_id_problems("item_id", columns, rules.max_id_length, ~retraction),
        *_id_problems("event_id", columns, rules.max_id_length, F.lit(False)),
        *_id_problems("retracts", columns, rules.max_id_length, retraction),
        (F.col("_event_time").isNull(), MISSING, "event_time"),
        (F.length("_event_time") > LONGEST_NUMBER, TOO_LONG, "event_time"),
        (time.isNull(), UNREADABLE, "event_time"),
        ((time < 0) | (time > _LAST_MICROSECOND), OUT_OF_RANGE, "event_time"),
        (time > latest, IN_FUTURE, "event_time"),
        (F.col("_infinite") | ~value.between(rules.min_value, rules.max_value) | F.isnan(value), OUT_OF_RANGE, "value"),
        (F.length("_value") > LONGEST_NUMBER, TOO_LONG, "value"),
        (F.col("_value").isNotNull() & value.isNull(), UNREADABLE, "value"),
    ]
    verdict = F.coalesce(
        *(F.when(p, F.struct(F.lit(r).alias("reason"), F.lit(f).alias("field"))) for p, r, f in problems)
    )
    rows = rows.withColumn("_verdict", verdict)
    valid = F.col("_verdict").isNull()
    kept = {n: F.when(valid, F.col(f"_{n}")) for n in ("user_id", "item_id")}
    kept |= {
        "reason": F.col("_verdict.reason"),
        "field": F.col("_verdict.field"),
        "event_type": F.when(valid, F.col("event_type")),
        "event_time": F.when(valid, F.timestamp_micros("_micros")),
        "value": F.when(valid, value),
        "retracts": F.when(valid & retraction, F.col("_retracts")),
    }
    rows = rows.withColumns(kept)
    rows = rows.withColumn("content_hash", F.when(valid, content_hash()))
    pair = F.concat("user_id", F.lit("/"), F.coalesce("item_id", F.lit("")))
    derived = F.concat(F.lpad(F.crc32(pair).cast("string"), 10, "0"), F.lit("-"), "content_hash")
    return rows.withColumn("event_id", F.when(valid, F.coalesce(F.col("_event_id"), derived)))


def _bounded(name: str) -> Column:
    """The text column, null where it is longer than a number or a time can be."""
    return F.when(F.length(name) <= LONGEST_NUMBER, F.col(name))


def content_hash() -> Column:
    """16 hex digits of sha256 over (user_id, item_id, event_type, event_time, value, retracts) of an event row."""
    # The text of a double differs between Java versions, its hash does not.
    value = F.when(F.col("value").isNotNull(), F.xxhash64("value").cast("string"))
    parts: list[Column | str] = [
        "user_id",
        "item_id",
        "event_type",
        F.unix_micros("event_time").cast("string"),
        value,
        "retracts",
    ]
    joined = F.concat_ws(_SEPARATOR, *(F.coalesce(p, F.lit("")) for p in parts))
    return F.substring(F.sha2(joined, 256), 1, 16)


def _id_problems(
    name: str, columns: Mapping[str, str], max_length: int, required: Column
) -> list[tuple[Column, str, str]]:
    text = F.col(f"_{name}")
    problems = [(text.isNull() & required, MISSING, name)]
    if name in columns:
        key = _regex_literal(columns[name])
        # The parser gives nested values as their JSON text: only the payload tells `[1]` from `"[1]"`.
        nested = text.rlike(r"^[\[{]") & F.col("_short").rlike(rf'"{key}"\s*:\s*[\[{{]')
        # A lone surrogate has become a question mark, on which different ids would meet.
        lone = text.contains("?") & F.col("_short").rlike(_LONE_SURROGATE)
        # Numbers that no double holds come as quoted words.
        infinite = text.isin('"NaN"', '"Infinity"', '"-Infinity"')
        fraction = is_number(text, F.col("_short"), columns[name])
        problems.append((text.rlike(BAD_ID) | nested | lone | infinite | fraction, UNREADABLE, name))
        problems.append((F.length(text) > max_length, TOO_LONG, name))
    return problems


def is_number(text: Column, payload: Column, key: str) -> Column:
    """Whether a key's value, which is this text, stands in the payload as a number with a fraction or an exponent."""
    # Only the payload tells `196.0` from `"196.0"`.
    unquoted = payload.rlike(rf'"{_regex_literal(key)}"\s*:\s*-?\d')
    return (F.length(text) <= _LONGEST_DOUBLE) & text.rlike(_FRACTIONAL) & unquoted


def whole(text: Column) -> Column:
    """The number as the text of a whole one; unchanged where it is none, or too large for a double to hold exactly."""
    number = text.try_cast("decimal(38,16)")
    is_whole = (number == F.floor(number)) & (F.abs(number) < _EXACT)
    return F.when(is_whole, F.floor(number).cast("string")).otherwise(text)


def _regex_literal(text: str) -> str:
    return "".join(c if c.isalnum() or c == "_" else f"\\x{{{ord(c):x}}}" for c in text)


def _microseconds(text: Column, unit: str, zone: str) -> Column:
    """Microseconds since the epoch from ISO 8601 text (in `zone` where it names none) or an epoch number, else null."""
    plain = F.regexp_replace(text, '"', "")
    # 19 digits before the point: more cannot be a time, and the products below stay within decimal(38).
    number = F.when(plain.rlike(NUMBER), plain.try_cast("decimal(28,9)"))
    size = F.abs(number)
    if unit == "auto":
        factor = F.when(size > 10**14, 1).when(size > 10**11, 1_000).otherwise(1_000_000)
        scaled = F.when(size > 10**17, number / 1000).otherwise(number * factor.cast("decimal(7,0)"))
        scaled = F.when(~plain.rlike(_COMPACT_DATE), scaled)
    elif unit == "iso":
        scaled = F.lit(None).cast("decimal(36,9)")
    elif unit == "nanoseconds":
        scaled = number / 1000
    else:
        scaled = number * F.lit(_MICROS[unit]).cast("decimal(7,0)")
    from_number = F.floor(scaled).try_cast("bigint")
    if unit not in ("auto", "iso"):
        return from_number
    upper = F.upper(plain)
    iso = F.regexp_replace(F.regexp_replace(upper, r"^(\S{10})T", "$1 "), r"\s*(UTC|GMT)$", "Z")
    iso = F.regexp_replace(iso, r"^(\S{10} \d{2}:\d{2})(?!:)", "$1:00")
    own = "Z" if zone == "UTC" else f" {zone}"
    zoned = F.when(iso.rlike(_ZONE) & iso.contains(":"), iso).otherwise(F.concat(iso, F.lit(own)))
    day = iso.rlike(r"^\d{4}-\d{2}-\d{2}$")
    # Without this shape Spark's cast would read "10:00" as ten o'clock today.
    shaped = upper.rlike(_ISO + r"(\s*(UTC|GMT|Z|[+-]\d{2}(:?\d{2})?))?$")
    stamp = F.when(day, F.concat(iso, F.lit(f" 00:00:00{own}"))).otherwise(zoned)
    return F.coalesce(from_number, F.when(shaped, F.unix_micros(stamp.try_cast("timestamp"))))
