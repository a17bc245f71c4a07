"""What becomes of each valid row, against the rule written down row by row."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime

from nightstream.ingest import resolve
from nightstream.store.tables import EVENTS

ARRIVAL = datetime(2026, 1, 1, tzinfo=UTC)


def event(event_id, second, content, raw_id, kind="view", retracts=None):
    time = datetime.fromtimestamp(second, UTC)
    return (event_id, "u", "i", kind, time, None, retracts, content, raw_id, ARRIVAL)


def expected_outcomes(batch, stored):
    """The rule written down row by row."""
    result = {}
    for row in batch:
        rivals = [r for r in batch if r[0] == row[0]]
        old = next((s for s in stored if s[0] == row[0]), None)
        new = [r for r in rivals if old is None or r[8] != old[8]]
        best = max(new, key=lambda r: (r[4], r[7], r[8]), default=None)
        kept = best if best and (old is None or (best[4], best[7]) > (old[4], old[7])) else old
        if old is not None and row[8] == old[8]:
            outcome = resolve.STORED
        elif row is kept:
            outcome = resolve.NEW if old is None else resolve.SUPERSEDING
        else:
            outcome = resolve.DUPLICATE
        result[row[8]] = (outcome, kept[8])
    return result


def test_resolve_follows_the_rule_in_every_small_case(spark):
    """Up to two rows of a batch against a stored event or none: later, earlier or equal in time and content."""
    versions = [(1, "a"), (1, "b"), (2, "a")]
    batch, stored = [], []
    for number, (old, *new) in enumerate(itertools.product([None, *versions], versions, [None, *versions])):
        name = f"e{number}"
        if old is not None:
            stored.append(event(name, *old, f"{name}-r1"))
        for place, version in zip(("0", "2"), new, strict=True):
            if version is not None:
                batch.append(event(name, *version, f"{name}-r{place}"))
        if old is not None and number % 2:
            batch.append(event(name, *old, f"{name}-r1"))
    rows = resolve.resolve(spark.createDataFrame(batch, EVENTS.schema), spark.createDataFrame(stored, EVENTS.schema))
    found = {r.raw_id: (r.outcome, r.kept_raw_id) for r in rows.select("raw_id", "outcome", "kept_raw_id").collect()}
    expected = expected_outcomes(batch, stored)
    assert found == expected
    assert {o for o, _ in expected.values()} == {resolve.NEW, resolve.SUPERSEDING, resolve.STORED, resolve.DUPLICATE}


def test_what_is_known_of_an_id_is_its_event_and_whether_it_was_taken_back(spark):
    rows = [event("e1", 5, "a", "1"), event("e2", 5, "a", "2"), event("r", 1, "c", "3", "retract", "e1")]
    rows += [event("s", 1, "c", "4", "retract", "not come yet"), event("e2", 5, "a", "5")]
    wanted = spark.createDataFrame(
        [(name,) for name in ("e1", "e2", "not come yet", "unknown", "e1")], "event_id string"
    )
    found = resolve.known(spark.createDataFrame(rows, EVENTS.schema), wanted, "retract").collect()
    told = {r.event_id: (r.old and r.old.event_id, r.copies, bool(r.retracted)) for r in found}
    assert told == {"e1": ("e1", 1, True), "e2": ("e2", 2, False), "not come yet": (None, 0, True)}
