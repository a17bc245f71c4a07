"""What follows a table in a folder, or the stream by Spark, and copies its lists: on a target in memory."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
import refreshes
from deltalake import DeltaTable
from fake_target import Fake
from nightstream.errors import NightstreamError, TableError
from nightstream.runtime.clock import utc_now
from nightstream.serving import targets
from nightstream.serving.key_value import Patient, Position, Tally
from nightstream.steps import sync

NOW = datetime(2024, 1, 2, tzinfo=UTC)


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
        monkeypatch.setattr(targets, "target_of", lambda *options: target)
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
