"""Malformed payloads in any number, each with the reason for which it must be rejected, and some that only look so."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

import world

NOT_UTF8 = (b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\xc0\xaf", b"\xe2\x82", b"\xf5\x80\x80\x80", b"\x80")


@dataclass(frozen=True)
class Poison:
    """One line without line breaks. reason: the expected one, None for a valid event."""

    payload: bytes
    reason: str | None


def payloads(count: int, seed: int, huge: int = 1_000_000) -> list[Poison]:
    """So many malformed ones, and valid ones between them, one in twelve.

    huge: characters of the longest; about one in 200 is as long.
    """
    rng = random.Random(seed)
    made: list[Poison] = []
    while count:
        kind = _huge if len(made) % 200 == 0 else _KINDS[len(made) % len(_KINDS)]
        made.append(kind(rng, len(made), huge))
        count -= made[-1].reason is not None
    return made


def event(number: int, **values: Any) -> dict[str, Any]:
    """A valid event with some values changed; `...` leaves a key out."""
    good: dict[str, Any] = {
        "event_id": f"p{number}",
        "user_id": f"u{number % 40:03}",
        "item_id": f"i{number % world.ITEMS:02}",
        "event_type": "view",
        "event_time": world.START + 10**6 + number,
        "value": 1.0,
    }
    return {k: v for k, v in {**good, **values}.items() if v is not ...}


def text(number: int, **values: Any) -> str:
    return json.dumps(event(number, **values), ensure_ascii=False)


def literal(number: int, key: str, value: str) -> str:
    """An event with a value that json.dumps would not write."""
    return text(number, **{key: "@"}).replace('"@"', value)


def one_of(rng: random.Random, *made: tuple[str, str | None]) -> Poison:
    payload, reason = rng.choice(made)
    return Poison(payload.encode(), reason)


def _huge(rng, n, huge):
    return one_of(
        rng,
        (text(n, user_id="u" * huge), "too_long"),
        ("x" * huge, "not_json"),
        (text(n, value="9" * huge), "too_long"),
        (text(n, value="9" * huge + "x"), "too_long"),
        (text(n, event_time="9" * huge + "x"), "too_long"),
        (text(n, event_time="2024-01-01" + " " * huge + "x"), "too_long"),
        (text(n, value=" " * huge + "1"), None),
        (text(n, note="n" * 2_000_000), "too_long"),
        (text(n, value="1" * huge)[: huge // 2], "not_json"),
        (text(n, note="n" * huge), None),
    )


def _truncated(rng, n, huge):
    whole = text(n)
    return one_of(rng, (whole[: rng.randrange(1, len(whole))], "not_json"))


def _wrong_types(rng, n, huge):
    return one_of(
        rng,
        *[(text(n, **{key: v}), "unreadable") for key in ("user_id", "item_id", "event_id") for v in ({"a": n}, [n])],
        *[(text(n, event_time=v), "unreadable") for v in ("soon", True, [n], {"at": n}, "10:00", "2024-02-30")],
        *[(text(n, value=v), "unreadable") for v in ("much", False, [n], {"v": n}, "1,5", "0x10")],
        (text(n, event_type=[n]), "unknown"),
    )


def _missing(rng, n, huge):
    keys = ("user_id", "item_id", "event_time")
    return one_of(rng, *[(text(n, **{key: v}), "missing") for key in keys for v in (..., None, "", " \t")])


def _nested(rng, n, huge):
    deep = "[" * 1500 + "]" * 1500
    return one_of(
        rng,
        (literal(n, "user_id", deep), "not_json"),
        (literal(n, "note", '{"a":' * 1500 + "1" + "}" * 1500), "not_json"),
        (literal(n, "item_id", "[" * 400 + "]" * 400), "unreadable"),
        ("[" * 1000 + str(n), "not_json"),
    )


def _broken_utf8(rng, n, huge):
    whole = text(n, note="ä" * 5).encode()
    place = whole.index(b"note") + rng.randrange(2)
    return Poison(whole[:place] + rng.choice(NOT_UTF8) + whole[place:], "not_utf8")


def _repeated_keys(rng, n, huge):
    key = rng.choice(["user_id", "event_time", "note"])
    return one_of(rng, (text(n, note=1)[:-1] + f', "{key}": {n}}}', "repeated_key"))


def _extreme_times(rng, n, huge):
    return one_of(
        rng,
        *[(literal(n, "event_time", v), "unreadable") for v in ("1e400", "NaN", "-Infinity", "9" * 60, str(10**19))],
        (text(n, event_time="300000-01-01T00:00:00Z"), "unreadable"),
        *[(text(n, event_time=v), "out_of_range") for v in (-1, -(10**15), -(10**18), "0001-01-01")],
        (text(n, event_time="9999-12-31"), "in_future"),
    )


def _extreme_numbers(rng, n, huge):
    return one_of(
        rng,
        *[(literal(n, "value", v), "out_of_range") for v in ("1e400", "-1e308", "NaN", "Infinity", str(2**64))],
        (literal(n, "user_id", "1e400"), "unreadable"),
        (literal(n, "item_id", "1" * 400), "too_long"),
    )


def _characters(rng, n, huge):
    return one_of(
        rng,
        (text(n, user_id=f"a{n}\x01"), "unreadable"),
        (text(n, user_id="@").replace("@", f"a\x00{n}"), "not_json"),
        (literal(n, "user_id", f'"a{n}\\ud800"'), "unreadable"),
        (literal(n, "item_id", f'"\\udc00{n}"'), "unreadable"),
        ("{\ufeff" + text(n)[1:], "not_json"),
        (text(n, user_id="\ufffd"), "unreadable"),
        ("\t", "not_json"),
    )


def _no_object(rng, n, huge):
    whole = text(n)
    others = (f"[{whole}]", str(n), f'"{n}"', "true", "null", whole + "x", whole + whole, whole.replace('"', "'"))
    return one_of(rng, *[(other, "not_json") for other in others])


def _rules(rng, n, huge):
    return one_of(
        rng,
        (text(n, user_id="*"), "reserved"),
        (text(n, event_type="VIEW"), "unknown"),
        (text(n, event_type="retract"), "missing"),
        (text(n, event_id="e" * 300), "too_long"),
    )


def _only_strange(rng, n, huge):
    return one_of(
        rng,
        ("\ufeff " + text(n), None),
        (literal(n, "value", "-0.0"), None),
        (literal(n, "note", "[" * 400 + "]" * 400), None),
        (literal(n, "note", '{"a":1,"a":2}'), None),
        (text(n, user_id=n, item_id="漢🎬", note=[1e300]), None),
    )


_KINDS = (
    *(_truncated, _wrong_types, _missing, _nested, _broken_utf8, _repeated_keys, _extreme_times, _extreme_numbers),
    *(_characters, _no_object, _rules, _only_strange),
)
