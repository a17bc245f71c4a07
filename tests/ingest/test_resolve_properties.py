"""What becomes of each row, and which events count, in every small case: one Spark job, an event id per case."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from datetime import UTC, datetime

from nightstream.ingest import history, resolve
from nightstream.store.tables import EVENTS
from pyspark.sql import functions as F

ARRIVAL = datetime(2026, 1, 1, tzinfo=UTC)
RETRACTION = "retract"
VERSIONS = list(itertools.product((1, 2), "ab"))


@dataclass(frozen=True)
class Case:
    """stored: the version in the table, or None. copies: rows of it there, more than 1 is damage. batch: what arrives.
    again: the stored row arrives once more. before, now: a retraction of it is stored, arrives."""

    stored: tuple[int, str] | None
    copies: int
    batch: list[tuple[int, str]]
    again: bool
    before: bool
    now: bool


def every_case() -> list[Case]:
    """All combinations of two versions that arrive with one, or a damaged two, that are stored, and retractions."""
    yes_or_no = (False, True)
    stored = [(None, 1), *itertools.product(VERSIONS, (1, 2))]
    batches = [[], *([v] for v in VERSIONS), *map(list, itertools.product(VERSIONS, repeat=2))]
    return [
        Case(old, copies, batch, again, before, now)
        for (old, copies), batch, again, before, now in itertools.product(stored, batches, *[yes_or_no] * 3)
        if old is not None or not again
    ]


def row(event_id: str, second: int, content: str, raw_id: str) -> tuple:
    return (event_id, "u", "i", "view", datetime.fromtimestamp(second, UTC), None, None, content, raw_id, ARRIVAL)


def retraction(event_id: str, target: str) -> tuple:
    at = datetime.fromtimestamp(0, UTC)
    return (event_id, "u", None, RETRACTION, at, None, target, "r", f"{event_id}-raw", ARRIVAL)


def tables(found: list[Case]) -> tuple[list[tuple], list[tuple]]:
    """EVENTS rows that arrive and that are stored."""
    arriving, stored = [], []
    for number, case in enumerate(found):
        name = f"e{number}"
        if case.stored:
            copies = [row(name, *case.stored, f"{name}-5{n}") for n in range(case.copies)]
            stored += copies
            arriving += copies[-1:] if case.again else []
        arriving += [row(name, *v, f"{name}-{place * 9}") for place, v in enumerate(case.batch)]
        stored += [retraction(f"before-{name}", name)] if case.before else []
        arriving += [retraction(f"now-{name}", name)] if case.now else []
    return arriving, stored


def expected(found: list[Case], arriving: list[tuple]) -> dict[str, tuple]:
    """raw_id -> outcome, the raw_id that is kept, that of the stored event, its copies, dead."""
    verdicts = {r[8]: (resolve.NEW, r[8], None, None, False) for r in arriving if r[3] == RETRACTION}
    for number, case in enumerate(found):
        name = f"e{number}"
        old = f"{name}-5{case.copies - 1}" if case.stored else None
        new = [(v, f"{name}-{place * 9}") for place, v in enumerate(case.batch)]
        best = max(new, default=None)
        wins = best is not None and (case.stored is None or best[0] > case.stored)
        kept = best[1] if wins else old
        for _, raw_id in new:
            outcome = resolve.DUPLICATE
            if raw_id == kept:
                outcome = resolve.SUPERSEDING if case.stored else resolve.NEW
            verdicts[raw_id] = (outcome, kept)
        if case.stored and case.again:
            verdicts[old] = (resolve.STORED, kept)
        known = (old, case.copies if case.stored else 0 if case.before else None, case.before or case.now)
        for raw_id in [raw_id for _, raw_id in new] + ([old] if case.stored and case.again else []):
            verdicts[raw_id] += known
    return verdicts


def test_every_row_gets_the_verdict_of_the_rule(spark) -> None:
    found = every_case()
    arriving, stored = tables(found)
    valid, events = (spark.createDataFrame(rows, EVENTS.schema) for rows in (arriving, stored))
    known = resolve.known(events, valid.select("event_id"), RETRACTION)
    settled = resolve.settle(valid, known, history.tombstones(valid, RETRACTION))
    rows = settled.select("raw_id", "outcome", "kept_raw_id", "old.raw_id", "copies", "dead").collect()
    assert len(rows) == len(arriving)
    assert {r[0]: tuple(r[1:]) for r in rows} == expected(found, arriving)
    assert {r.outcome for r in rows} == {resolve.NEW, resolve.SUPERSEDING, resolve.STORED, resolve.DUPLICATE}


def test_mentions_are_the_event_and_its_retractions_once_each(spark) -> None:
    rows = [row("a", 1, "x", "1"), row("b", 1, "x", "2"), retraction("r", "a"), retraction("s", "b")]
    # A view that names another event retracts nothing.
    rows.append((*row("c", 1, "x", "3")[:6], "a", *row("c", 1, "x", "3")[7:]))
    ids = spark.createDataFrame([("a",), ("a",), ("r",)], "event_id string")
    found = resolve.mentions(spark.createDataFrame(rows, EVENTS.schema), ids, RETRACTION)
    assert sorted((r.mentioned, r.event_id) for r in found.collect()) == [("a", "a"), ("a", "r"), ("r", "r")]


def test_what_was_taken_back_counts_no_more_and_still_makes_its_user_known(spark) -> None:
    rows = [row("a", 1, "x", "1"), row("b", 2, "x", "2"), retraction("r", "a"), retraction("s", "a")]
    rows.append((*row("c", 1, "x", "3")[:6], "b", *row("c", 1, "x", "3")[7:]))
    events = spark.createDataFrame(rows, EVENTS.schema)
    assert sorted(r.event_id for r in history.live(events, RETRACTION).collect()) == ["b", "c"]
    folded = history.foldable(events, RETRACTION)
    assert folded.columns == EVENTS.schema.names
    kinds = {"a": RETRACTION, "b": "view", "c": "view"}
    assert sorted((r.event_id, r.event_type) for r in folded.collect()) == sorted(kinds.items())
    # The rest of the row stays as it was.
    rest = folded.drop("event_type").where(F.col("event_id") != "c").orderBy("event_id").collect()
    assert [(r.raw_id, r.user_id, r.item_id, r.content_hash) for r in rest] == [
        ("1", "u", "i", "x"),
        ("2", "u", "i", "x"),
    ]
