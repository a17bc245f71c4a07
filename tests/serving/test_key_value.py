"""The key-value copy: records, the revision guard, and the follower of a table in a folder, on a target in memory."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pytest
import refreshes
from deltalake import DeltaTable
from hypothesis import given
from hypothesis import strategies as st
from nightstream.errors import MachineError, NightstreamError, SettingsError, TableError
from nightstream.runtime.clock import utc_now
from nightstream.serving import key_value
from nightstream.serving.key_value import Patient, Position, Record, Stopped, Tally, Unreachable, Written
from nightstream.steps import sync

NOW = datetime(2024, 1, 2, tzinfo=UTC)


def batch(*revisions: tuple[str, int], **options) -> pa.RecordBatch:
    table = refreshes.rows(revisions, **options).select(key_value.COLUMNS)
    return table.combine_chunks().to_batches()[0]


class Fake:
    """A target in memory. on_write: called before each write, with the target."""

    name = "the fake"

    def __init__(self, on_write: Callable[[Fake], None] = lambda target: None) -> None:
        self.values: dict[str, Record] = {}
        self.kept: str | None = None
        self.connections = 0
        self.sent: list[list[str]] = []
        self.on_write = on_write

    def connect(self) -> None:
        self.connections += 1

    def write(self, records: Sequence[Record]) -> Written:
        self.on_write(self)
        users = [record.user_id for record in records]
        assert len(set(users)) == len(users)
        self.sent.append(users)
        newer = [r for r in records if r.user_id not in self.values or r.revision > self.values[r.user_id].revision]
        self.values |= {record.user_id: record for record in newer}
        return Written(frozenset(record.user_id for record in newer))

    def position(self) -> str | None:
        return self.kept

    def move(self, before: str | None, after: str) -> bool:
        if self.kept != before:
            return False
        self.kept = after
        return True

    def close(self) -> None:
        pass

    def copy(self) -> dict:
        """As refreshes.newest."""
        return {
            user: (r.revision, r.model_version, r.as_of, r.refreshed_at, json.loads(r.items))
            for user, r in self.values.items()
        }

    def revisions(self) -> dict[str, int]:
        return {user: record.revision for user, record in self.values.items()}


# --- records


def test_a_record_has_the_items_by_rank_with_all_their_fields():
    made = batch(("a", 7), ("b", 2))
    first, second = key_value.records(made)
    assert (first.user_id, first.revision, first.model_version) == ("a", 7, "v7")
    assert (first.as_of, first.refreshed_at) == (refreshes.START + timedelta(seconds=7), refreshes.START)
    items = json.loads(first.items)
    assert items == sorted(made["items"][0].as_py(), key=lambda entry: entry["rank"])
    assert items != made["items"][0].as_py()
    assert list(items[0]) == ["rank", "item_id", "score", "strategy", "reason", "because_item_id"]
    assert [entry["item_id"] for entry in json.loads(second.items)] == ["i2-1", "i2-2", "i2-3"]


def test_lists_keep_to_their_rows_in_a_part_of_a_batch_and_where_some_are_empty():
    made = pa.concat_tables([refreshes.rows([("a", 1)]), refreshes.rows([("b", 2)], length=0)])
    made = pa.concat_tables([made, refreshes.rows([("c", 3), ("d", 4)])]).combine_chunks()
    missing = pa.array([None if user == "c" else items for user, items in zip(*_lists(made), strict=True)])
    made = made.set_column(made.schema.get_field_index("items"), "items", missing.cast(made["items"].type))
    part = made.select(key_value.COLUMNS).to_batches()[0].slice(1, 3)
    shown = {r.user_id: [entry["item_id"] for entry in json.loads(r.items)] for r in key_value.records(part)}
    assert shown == {"b": [], "c": [], "d": ["i4-1", "i4-2", "i4-3"]}


def _lists(made: pa.Table) -> tuple[list, list]:
    return made["user_id"].to_pylist(), made["items"].to_pylist()


def test_what_json_does_not_know_is_null():
    made = refreshes.rows([("a", 1)])
    items = [[{**entry, "score": math.nan if entry["rank"] == 1 else math.inf} for entry in made["items"][0].as_py()]]
    made = made.set_column(made.schema.get_field_index("items"), "items", pa.array(items, made["items"].type))
    (record,) = key_value.records(made.select(key_value.COLUMNS).to_batches()[0])
    assert "NaN" not in record.items
    assert [entry["score"] for entry in json.loads(record.items)] == [None] * 3


@pytest.mark.parametrize("kind", [pa.timestamp("ns"), pa.timestamp("us"), pa.timestamp("ms", tz="UTC")])
def test_times_are_in_utc_however_they_were_written(kind):
    made = batch(("a", 1))
    place = made.schema.get_field_index("as_of")
    moment = pa.array([datetime(2024, 5, 6, 7)], pa.timestamp("us")).cast(pa.timestamp(kind.unit))
    moment = moment.cast(kind) if kind.tz is None else moment.cast(pa.int64()).cast(kind)
    (record,) = key_value.records(made.set_column(place, "as_of", moment))
    assert record.as_of.isoformat() == "2024-05-06T07:00:00+00:00"


# --- the revision guard


def written(target: Fake, batches: Sequence[pa.RecordBatch], at_once: int = 100) -> Tally:
    return key_value.write(batches, target, at_once, refreshes.START, lambda: NOW)


@given(
    revisions=st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 5)), min_size=1, max_size=30),
    cuts=st.integers(1, 7),
    at_once=st.integers(1, 5),
    known=st.sampled_from([0, 2, 100]),
)
def test_any_order_any_cut_and_any_repetition_end_in_the_newest(revisions, cuts, at_once, known):
    target, before = Fake(), key_value.MOST_KNOWN
    key_value.MOST_KNOWN = known
    try:
        parts = [revisions[start : start + cuts] for start in range(0, len(revisions), cuts)]
        tally = written(target, [batch(*part, length=1) for part in parts], at_once)
        again = written(target, [batch(*part, length=1) for part in reversed(parts)], at_once)
    finally:
        key_value.MOST_KNOWN = before
    assert target.revisions() == {user: max(r for u, r in revisions if u == user) for user, _ in revisions}
    assert (tally.rows, again.rows, again.written) == (len(revisions), len(revisions), 0)
    assert max(map(len, target.sent)) <= 2 * at_once


def test_of_a_user_who_comes_newest_first_one_row_is_sent():
    target = Fake()
    tally = written(target, [batch(("a", 3), ("b", 1)), batch(("a", 2), ("b", 1)), batch(("a", 1), ("c", 1))], 1)
    assert sorted(user for users in target.sent for user in users) == ["a", "b", "c"]
    assert (tally.rows, tally.written) == (6, 3)


def test_delays_are_of_what_was_written_and_refreshed_since_the_start():
    target = Fake()
    written(target, [batch(("old", 5))])
    ages = {"a": 2, "b": 2, "c": 6, "old": 60}
    parts = [refreshes.rows([(user, 1)], NOW - timedelta(seconds=age)) for user, age in ages.items()]
    parts.append(refreshes.rows([("history", 1)], refreshes.START - timedelta(days=9)))
    tally = written(target, [part.select(key_value.COLUMNS).to_batches()[0] for part in parts])
    assert tally.summary() == {"rows": 5, "written": 4, "refused": 0, "delay_p50_s": 2.0, "delay_max_s": 6.0}
    assert Tally(NOW).summary()["delay_p50_s"] is None


# --- a server that goes away


class Flaky(Fake):
    """Does not answer the first so many times after each connection number in `away`."""

    def __init__(self, failures: int) -> None:
        super().__init__()
        self.failures = failures

    def write(self, records: Sequence[Record]) -> Written:
        if self.failures:
            self.failures -= 1
            raise Unreachable("the fake does not answer")
        return super().write(records)


def test_a_server_that_goes_away_is_connected_anew_and_asked_again(caplog):
    flaky = Flaky(2)
    with caplog.at_level("WARNING"):
        tally = written(Patient(flaky, 60), [batch(("a", 1))])
    assert (tally.written, flaky.connections) == (1, 3)
    assert [record.again_in_s for record in caplog.records] == [0.1, 0.2]


def test_a_server_that_stays_away_is_named_with_the_remedy():
    with pytest.raises(MachineError, match=r"the fake does not answer, 0 s long .*retry_seconds: 0\.2.* goes on where"):
        written(Patient(Flaky(1000), 0.2), [batch(("a", 1))])
    with pytest.raises(Stopped):
        written(Patient(Flaky(1000), 60, stop=lambda: True), [batch(("a", 1))])


def test_a_server_that_is_not_there_at_the_start_is_not_waited_for():
    class Absent(Fake):
        def connect(self) -> None:
            raise Unreachable("the fake does not answer")

    with pytest.raises(MachineError, match=r"the fake does not answer; start the server or check sync\.url"):
        Patient(Absent(), 60).connect()


@pytest.mark.parametrize(
    ("kind", "url"),
    [
        ("redis", "postgresql://u:hush@h/d"),
        ("postgresql", "redis://u:hush@h"),
        ("postgresql", "host=h password=hush"),
        ("postgresql", "postgresql://u:hu@sh@h/d"),
        ("postgresql", "postgresql://u:hu/sh@h/d"),
        ("postgresql", "postgresql://u:hush%zz@h/d"),
        ("redis", "redis://:hu#sh@h"),
        ("redis", "redis://:hu/sh@h"),
    ],
)
def test_an_address_that_is_none_is_not_shown(kind, url):
    with pytest.raises(SettingsError, match=r"sync\.url .*write \w+://user:\$\{env:NAME\}@host") as raised:
        key_value.target_of(kind, url, "t", "p:")
    assert "hu" not in str(raised.value)
    assert raised.value.__cause__ is None


@pytest.mark.parametrize(("kind", "module"), [("postgresql", "psycopg"), ("redis", "redis")])
def test_a_missing_package_is_named(kind, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MachineError, match=rf"package {module}: pip install 'nightstream\[sync\]'"):
        key_value.target_of(kind, f"{kind}://h", "t", "p:")


# --- the follower of a table in a folder


@pytest.fixture
def follow(settings, monkeypatch):
    """follow(target): works off what is new, as a process that has just started; what it has counted."""
    monkeypatch.setattr(sync, "LOOK_SECONDS", 0.0)
    small = settings.sync.model_copy(update={"batch_rows": 3, "poll_seconds": 0.01})

    def worked_off(target: Fake, stop=lambda: False, until_idle: bool = True) -> dict:
        progress = sync._Progress(Tally(utc_now()), stop)
        commits = sync.Commits(Path(settings.storage.root))
        sync.follow(commits, Patient(target, 5), small, progress, stop, until_idle)
        return progress.tally.summary()

    return worked_off


@pytest.fixture
def root(settings) -> str:
    """The folder of the tables, with five commits whose revisions are in no order."""
    for commit in range(5):
        made = [(f"u{number}", (commit * 3) % 5 + 1) for number in range(commit, commit + 6)]
        refreshes.append(settings.storage.root, refreshes.rows(made))
    return settings.storage.root


def table(root: str) -> DeltaTable:
    return DeltaTable(f"{root}/refreshes")


def test_everything_first_then_what_each_commit_adds(follow, root):
    target = Fake()
    assert follow(target)["rows"] == 30
    assert target.copy() == refreshes.newest(root)
    assert max(map(len, target.sent)) <= 6
    assert follow(target)["rows"] == 0
    refreshes.append(root, refreshes.rows([("u1", 9), ("new", 1), ("u2", 0)]))
    refreshes.append(root, refreshes.rows([("u1", 8), ("new", 2)]))
    assert follow(target) | {"delay_p50_s": 0} == {
        **{"rows": 5, "written": 2, "refused": 0, "delay_p50_s": 0, "delay_max_s": None},
    }
    assert target.copy() == refreshes.newest(root)


def test_more_commits_than_are_read_at_once(follow, root, monkeypatch):
    monkeypatch.setattr(sync, "MOST_COMMITS", 2)
    target = Fake()
    follow(target)
    for revision in range(10, 15):
        refreshes.append(root, refreshes.rows([("u1", revision)]))
    assert follow(target)["rows"] == 5
    assert target.copy() == refreshes.newest(root)
    assert Position.of(target.kept).at == table(root).version()


def test_files_that_were_only_arranged_anew_are_not_read_again(follow, root):
    target = Fake()
    follow(target)
    table(root).optimize.compact()
    refreshes.append(root, refreshes.rows([("u1", 9)]))
    assert follow(target)["rows"] == 1


def test_files_that_were_vacuumed_before_they_were_read(follow, root):
    target = Fake()
    follow(target)
    refreshes.append(root, refreshes.rows([("u1", 9), ("new", 1)]))
    table(root).optimize.compact()
    table(root).vacuum(retention_hours=0, dry_run=False, enforce_retention_duration=False)
    follow(target)
    assert target.copy() == refreshes.newest(root)
    assert target.values["u1"].revision == 9


def test_a_log_that_was_cleaned_up_before_it_was_read(follow, root):
    target = Fake()
    follow(target)
    refreshes.append(root, refreshes.rows([("u1", 9), ("new", 1)]))
    refreshes.append(root, refreshes.rows([("u2", 9)]))
    table(root).create_checkpoint()
    for version in range(table(root).version()):
        Path(f"{root}/refreshes/_delta_log/{version:020}.json").unlink()
    follow(target)
    assert target.copy() == refreshes.newest(root)
    assert Position.of(target.kept).at == 6


def test_killed_at_any_write_and_started_again_it_ends_in_the_same(follow, root):
    class Killed(BaseException):
        pass

    whole = Fake()
    follow(whole)
    for last in range(len(whole.sent)):
        target = Fake()

        def kill(killed: Fake, last: int = last) -> None:
            if len(killed.sent) == last:
                raise Killed

        target.on_write = kill
        with pytest.raises(Killed):
            follow(target)
        assert target.copy() != refreshes.newest(root)
        target.on_write = lambda running: None
        follow(target)
        assert target.copy() == refreshes.newest(root)


@pytest.mark.parametrize("lost", ["everything", "the newest rows"])
def test_a_server_that_comes_back_with_less_is_filled_again(follow, root, lost):
    """It loses rows while a commit is written, and the client connects anew without a word."""
    target = Fake()
    follow(target)
    backup = dict(target.values), target.kept
    for revision in (9, 10):
        refreshes.append(root, refreshes.rows([(f"u{number}", revision) for number in range(5)]))

    def restart(running: Fake) -> None:
        # Before the second write of the commits, so the first is gone.
        if running.connections == 2 and len(running.sent) == sent + 1:
            running.values, running.kept = ({}, None) if lost == "everything" else (dict(backup[0]), backup[1])
            running.connections += 1

    sent = len(target.sent)
    target.on_write = restart
    follow(target)
    assert target.connections == 3
    assert target.copy() == refreshes.newest(root)


def test_a_server_that_was_emptied_while_nothing_is_new_is_filled_again(follow, root):
    target, polls = Fake(), []

    def stop() -> bool:
        polls.append(1)
        if len(polls) == 100:
            target.values, target.kept = {}, None
        return len(polls) > 400

    follow(target, stop, until_idle=False)
    assert target.copy() == refreshes.newest(root)


def test_a_copy_by_spark_is_taken_over(follow, root):
    target = Fake()
    target.kept = Position(str(table(root).metadata().id), "spark-1", 57).text()
    follow(target)
    assert target.copy() == refreshes.newest(root)


@pytest.mark.parametrize("kept", ['["another table", "files", 3]', "no position", "[1]"])
def test_the_copy_of_other_tables_is_not_mixed_with_these(follow, root, kept):
    target = Fake()
    target.kept = kept
    with pytest.raises(NightstreamError, match=r"the fake holds the copy of other tables .* or sync\.prefix"):
        follow(target)
    assert target.values == {}


def test_a_table_that_is_older_than_its_copy_is_refused(follow, root):
    target = Fake()
    target.kept = Position(str(table(root).metadata().id), sync.FILES, 57).text()
    with pytest.raises(TableError, match="is older than its copy"):
        follow(target)


def test_a_missing_table_is_named(follow, settings):
    with pytest.raises(TableError, match=r"table refreshes is missing at .*check storage\.root"):
        follow(Fake())


def test_only_a_part_of_a_file_is_in_memory(settings):
    refreshes.append(settings.storage.root, refreshes.rows((f"u{n}", 1) for n in range(1000)))
    commits = sync.Commits(Path(settings.storage.root))
    sizes = [part.num_rows for part in commits.batches(commits.since(None), 64, lambda: False)]
    assert sum(sizes) == 1000
    assert max(sizes) <= 64


# --- a micro-batch of Spark, without Spark


@pytest.fixture
def micro_batch(settings, monkeypatch):
    """micro_batch(target, number): writes one row; how often."""
    writes = []

    def written_by_spark(self: sync.WriteBatch, rows: Callable[[], None]) -> Tally:
        writes.append(rows)
        rows()
        return Tally(NOW)

    monkeypatch.setattr(sync.WriteBatch, "_write", written_by_spark)

    def micro_batch(target: Fake, number: int, rows: Callable[[], None] = lambda: None) -> int:
        monkeypatch.setattr(key_value, "target_of", lambda *options: target)
        writes.clear()
        sync.WriteBatch(settings.sync, "table", "spark-1", "", NOW, "redis", "redis://h")(rows, number)
        return len(writes)

    return micro_batch


@pytest.mark.parametrize("kept", [None, Position("table", "spark-1", 2), Position("table", "spark-2", 3)])
def test_a_micro_batch_is_not_written_behind_others_that_were_lost(micro_batch, kept):
    target = Fake()
    target.kept = kept and kept.text()
    with pytest.raises(sync.LostError, match="the fake has lost its position"):
        micro_batch(target, 4)
    assert target.kept == (kept and kept.text())


@pytest.mark.parametrize("at", [3, 4, 9])
def test_a_micro_batch_may_come_again(micro_batch, at):
    target = Fake()
    target.kept = Position("table", "spark-1", at).text()
    assert micro_batch(target, 4) == 1
    assert Position.of(target.kept).at == 4


def test_a_micro_batch_is_written_again_where_the_server_was_away_meanwhile(micro_batch):
    target = Fake()
    target.kept = Position("table", "spark-1", 3).text()

    def away() -> None:
        target.connections += target.connections == 1

    assert micro_batch(target, 4, away) == 2
