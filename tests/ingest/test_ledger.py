from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest
from chispa import assert_df_equality
from nightstream.errors import TableError
from nightstream.ingest import booking, ledger, resolve
from nightstream.ingest.id_filter import IdFilter
from nightstream.ingest.ledger import Counts, check
from nightstream.runtime.settings import load
from nightstream.store import storage as storage_module
from nightstream.store.storage import Storage
from nightstream.store.tables import DUPLICATES, EVENTS, QUARANTINE, RAW_EVENTS
from pyspark.sql import functions as F

CONF = Path(__file__).parents[2] / "conf"
ARRIVAL = datetime(2026, 1, 1, tzinfo=UTC)


def line(event_id=None, user="u", item="i", time=1_700_000_000, **more) -> str:
    return json.dumps({"event_id": event_id, "user_id": user, "item_id": item, "event_time": time, **more})


def retraction(event_id, of, user="u") -> str:
    return line(event_id, user, event_type="retract", retracts=of)


def payloads(spark, lines, position="f"):
    rows = [(x, "test", position, ARRIVAL) for x in lines]
    return spark.createDataFrame(rows, "payload string, source string, position string, arrival_time timestamp")


def record(storage, rows, settings, micro_batch=False, **options):
    """As the callers do; all writes done."""
    arriving = ledger.arrive(ledger.parsed(rows, settings), settings, micro_batch)
    recorded = ledger.book(storage, arriving, settings, micro_batch, **options)
    recorded.written()
    return recorded


def contents(storage) -> dict[str, list[str]]:
    """All four tables, as sorted texts."""
    return {
        t.name: sorted(r[0] for r in storage.read(t).select(F.to_json(F.struct("*"))).collect()) for t in ledger.TABLES
    }


def ids(frame, column="event_id") -> set[str]:
    return set() if frame is None else {r[column] for r in frame.collect()}


def types(frame) -> dict[str, str]:
    return {r.event_id: r.event_type for r in frame.collect()}


# What may be folded of SECOND; e, taken back, only makes its user known.
ACCEPTED = {"a": "view", "d": "view", "e": "retract"}
REFOLDED = {"u1", "u9", "u3", "u5"}
FIRST = [line("a", "u1"), line("b", "u2"), line("c", "u3"), "broken"]
# a: a newer version, of another user; b: an older one; d twice; a retraction of c; e is dead on arrival.
SECOND = [
    line("a", "u9", time=1_700_000_009),
    line("b", "u2", time=1_600_000_000),
    line("d", "u4"),
    line("d", "u4"),
    retraction("r1", "c", "u7"),
    retraction("r2", "e", "u5"),
    line("e", "u5"),
    line("f", "", time=1),
]


def test_every_row_ends_in_one_table(spark, settings, storage):
    first = record(storage, payloads(spark, FIRST, "f1"), settings, True)
    assert first.counts == Counts(4, 3, 1, 0)
    assert first.first_arrival == ARRIVAL
    assert first.refold is None
    second = record(storage, payloads(spark, SECOND, "f2"), settings, True)
    assert second.counts == Counts(8, 5, 1, 2)
    assert second.added == {"raw_events": 8, "events": 4, "quarantine": 1, "duplicates": 3}
    # Without its cache it is computed anew, from the tables that it has changed itself.
    second.release()
    assert types(second.accepted.rows) == ACCEPTED
    assert ids(second.refold.users.rows, "user_id") == REFOLDED
    assert check(storage) == {"raw_events": 12, "events": 7, "quarantine": 2, "duplicates": 3}
    stored = {r.event_id: r for r in storage.read(EVENTS).collect()}
    assert set(stored) == {"a", "b", "c", "d", "e", "r1", "r2"}
    assert (stored["a"].user_id, stored["b"].event_time.year) == ("u9", 2023)
    raw = {r.raw_id: json.loads(r.payload) for r in storage.read(RAW_EVENTS).collect() if r.payload != "broken"}
    for copy in storage.read(DUPLICATES).collect():
        kept = stored[copy.event_id]
        assert copy.kept_raw_id == kept.raw_id != copy.raw_id
        assert raw[copy.raw_id]["event_id"] == copy.event_id

    # The same micro-batch again: nothing is added, and the caller sees what it saw the first time.
    before = contents(storage)
    again = record(storage, payloads(spark, SECOND[::-1], "f2"), settings, True)
    assert (again.counts, set(again.added.values())) == (second.counts, {0})
    assert types(again.accepted.rows) == ACCEPTED
    # And nobody is refreshed whom the first time left alone.
    assert REFOLDED <= ids(again.refold.users.rows, "user_id") <= REFOLDED | ids(second.accepted.rows, "user_id")
    assert contents(storage) == before

    # A renewed checkpoint reads everything again under another identity; so does a batch ingest.
    for micro_batch in (True, False):
        anew = payloads(spark, FIRST, "f1").unionByName(payloads(spark, SECOND, "f2"))
        assert set(record(storage, anew, settings, micro_batch).added.values()) == {0}
        assert contents(storage) == before


@pytest.mark.parametrize(
    "batch",
    [
        [line("n1"), line("n2")],
        pytest.param([line("n1"), line("n1")], marks=pytest.mark.slow),
        [line("a", "u1"), line("n1")],
    ],
)
def test_known_ids_spare_the_table_and_change_nothing(spark, settings, storage, monkeypatch, batch):
    record(storage, payloads(spark, FIRST, "f1"), settings)
    known = IdFilter.of(storage)
    asked = []
    known_of = resolve.known
    monkeypatch.setattr(resolve, "known", lambda *arguments: asked.append(1) or known_of(*arguments))
    found = record(storage, payloads(spark, batch, "f2"), settings, True, fresh=True, id_filter=known)
    new = len({json.loads(x)["event_id"] for x in batch} - {"a"})
    assert found.counts == Counts(2, new, 0, 2 - new)
    assert found.accepted.table["event_id"].to_pylist() == [r.event_id for r in found.accepted.rows.collect()]
    assert bool(asked) == (new < 2)
    check(storage)
    # What this batch brought is known to the next one.
    again = record(storage, payloads(spark, [line("n1")], "f3"), settings, True, fresh=True, id_filter=known)
    assert again.counts == Counts(1, 0, 0, 1)


def test_a_batch_too_large_for_the_driver_is_known_to_the_next_one(spark, settings, storage, monkeypatch):
    known = IdFilter.of(storage)
    cut = ledger.cut
    with monkeypatch.context() as patched:
        for module in (ledger, booking):
            patched.setattr(module, "cut", lambda rows, totals, **options: cut(rows, totals, **{**options, "limit": 0}))
        patched.setattr(ledger, "few", lambda rows: None)
        large = record(storage, payloads(spark, FIRST, "f1"), settings, True, fresh=True, id_filter=known)
    assert large.accepted.table is None
    again = record(storage, payloads(spark, [line("a", "u1"), line("n")], "f2"), settings, True, id_filter=known)
    assert again.counts == Counts(2, 1, 0, 1)


def test_who_is_folded_again_is_the_same_asked_for_by_ids_and_by_jobs(spark, settings, storage, tmp_path, monkeypatch):
    # g stays, h was taken back by another user, who has a history that nobody asks for.
    before = [*FIRST, line("g", "u1"), line("h", "u5"), retraction("r3", "h", "u2"), line("i", "u2")]
    large = Storage(spark, settings.storage.model_copy(update={"root": str(tmp_path / "large")}))
    found = []
    for where, most in ((storage, storage_module.LOCAL_ROWS), (large, 0)):
        monkeypatch.setattr(storage_module, "LOCAL_ROWS", most)
        record(where, payloads(spark, before, "f1"), settings, True)
        found.append(record(where, payloads(spark, SECOND, "f2"), settings, True).refold)
    few, many = found
    assert ids(few.users.rows, "user_id") == REFOLDED
    assert types(few.history.rows) == {"a": "view", "c": "retract", "e": "retract", "g": "view", "h": "retract"}
    assert (few.history.table.num_rows, many.history.table) == (5, None)
    assert_df_equality(few.users.rows, many.users.rows, ignore_row_order=True, ignore_nullable=True)
    assert_df_equality(few.history.rows, many.history.rows, ignore_row_order=True, ignore_nullable=True)


def test_rows_that_arrive_are_the_same_on_the_driver_and_on_the_executors(spark, settings, monkeypatch):
    lines = payloads(spark, [*SECOND, "broken", "broken"], "f2")
    unknown = payloads(spark, ["broken"], "f2").withColumn("arrival_time", F.lit(None).cast("timestamp"))
    arrived = ledger.parsed(lines.unionByName(unknown), settings)
    few = ledger.arrive(arrived, settings, micro_batch=True)
    assert few.table is not None
    monkeypatch.setattr(ledger, "few", lambda rows: None)
    many = ledger.arrive(arrived, settings, micro_batch=True)
    assert many.table is None
    assert few.totals == many.totals
    assert (few.totals["raw"], few.totals["quarantine"], few.totals["retractions"]) == (11, 4, 2)
    assert_df_equality(few.rows, many.rows, ignore_row_order=True, ignore_nullable=True)
    assert len(set(few.table["raw_id"].to_pylist())) == 11


def test_an_event_after_its_retraction_is_stored_and_only_makes_its_user_known(spark, settings, storage):
    known = IdFilter.of(storage)
    record(storage, payloads(spark, [retraction("r", "late")], "f1"), settings, True, id_filter=known)
    late = record(storage, payloads(spark, [line("late"), line("other")], "f2"), settings, True, id_filter=known)
    told = dict(zip(*(late.accepted.table[n].to_pylist() for n in ("event_id", "event_type")), strict=True))
    assert types(late.accepted.rows) == told == {"late": "retract", "other": "view"}
    assert ids(storage.read(EVENTS)) == {"r", "late", "other"}


def test_equal_repetitions_do_not_rewrite_the_stored_event(spark, settings, storage):
    for number in range(2):
        result = record(storage, payloads(spark, [line("a")], f"f{number}"), settings, True)
    assert result.counts == Counts(1, 0, 0, 1)
    operations = {r.operation for r in storage.table(EVENTS).history().collect()}
    assert "MERGE" not in operations


def test_a_source_that_grew_adds_only_what_is_new(spark, settings, storage):
    record(storage, payloads(spark, [line("a"), "x"]), settings)
    grown = record(storage, payloads(spark, [line("a"), "x", line("b"), "x", line("a")]), settings)
    assert grown.added == {"raw_events": 3, "events": 1, "quarantine": 1, "duplicates": 1}
    assert check(storage)["raw_events"] == 5


def test_nothing_writes_nothing(spark, settings, storage):
    nothing = record(storage, payloads(spark, [line("a")]).limit(0), settings, True)
    assert (nothing.counts, nothing.accepted) == (Counts(), None)
    broken = record(storage, payloads(spark, ["x"]), settings, True)
    assert (broken.counts, broken.accepted) == (Counts(1, 0, 1, 0), None)
    assert storage.table(EVENTS).history().count() == 1


class Crash(Exception):
    pass


@pytest.fixture(scope="module")
def recorded(spark, tmp_path_factory):
    """A root with FIRST recorded, and what the tables hold after SECOND without a crash."""
    first, both = (tmp_path_factory.mktemp(name) / "tables" for name in ("first", "both"))
    base = load([CONF / "base.yaml"], [f"storage.root={first}"])
    record(Storage(spark, base.storage), payloads(spark, FIRST, "f1"), base)
    shutil.copytree(first, both)
    base = load([CONF / "base.yaml"], [f"storage.root={both}"])
    storage = Storage(spark, base.storage)
    record(storage, payloads(spark, SECOND, "f2"), base)
    return first, contents(storage)


@pytest.mark.parametrize(
    ("point", "micro_batch"),
    [
        ("before raw_events", True),
        ("before events", True),
        pytest.param("before duplicates", True, marks=pytest.mark.slow),
        ("after merge", True),
        pytest.param("before raw_events", False, marks=pytest.mark.slow),
        pytest.param("before events", False, marks=pytest.mark.slow),
    ],
)
def test_a_crash_at_any_write_is_mended_by_a_replay(
    spark, settings, storage, monkeypatch, recorded, point, micro_batch
):
    when, what = point.split()
    first, undisturbed = recorded
    shutil.copytree(first, settings.storage.root)
    append, merge = Storage.append, booking.supersede

    def crashing(real, name):
        def write(self, *arguments):
            if (when, what) == ("before", name or arguments[0].name):
                raise Crash
            real(self, *arguments)
            if (when, what) == ("after", name or arguments[0].name):
                raise Crash

        return write

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "append", crashing(append, None))
        patch.setattr(booking, "supersede", crashing(merge, "merge"))
        with pytest.raises(Crash):
            record(storage, payloads(spark, SECOND, "f2"), settings, micro_batch)
    replayed = record(storage, payloads(spark, SECOND, "f2"), settings, micro_batch)
    assert contents(storage) == undisturbed
    if micro_batch:
        assert types(replayed.accepted.rows) == ACCEPTED
        assert (
            REFOLDED <= ids(replayed.refold.users.rows, "user_id") <= REFOLDED | ids(replayed.accepted.rows, "user_id")
        )


def test_lost_rows_and_damaged_tables_are_noticed(spark, settings, storage):
    record(storage, payloads(spark, FIRST), settings)
    storage.append(EVENTS, storage.read(EVENTS).where("event_id = 'a'"))
    with pytest.raises(TableError, match=r"raw_events has 4 rows.*events \(4\)"):
        check(storage)
    with pytest.raises(TableError, match="more than once"):
        record(storage, payloads(spark, [line("a", time=1)], "f2"), settings, True)
    assert storage.read(QUARANTINE).count() == 1
