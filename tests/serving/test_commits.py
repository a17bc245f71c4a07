"""The commit and the MERGEs behind it: once, in any order, and complete after a crash between any two of them."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from nightstream.serving import commits
from nightstream.serving.commits import Layout
from nightstream.store import delta_rs
from nightstream.store.materialize import Cut
from nightstream.store.storage import CONFLICTS, Storage
from nightstream.store.tables import BY_NAME, RECOMMENDATIONS, REFRESHED, REFRESHES, SEEN_OVERFLOW, USER_VECTORS

AT = datetime(2024, 5, 1, tzinfo=UTC)
LAYOUT = Layout(3)


def refreshed(spark, *rows, on_driver=True):
    """Refreshed rows from (user, revision, item ids[, overflowing item ids])."""
    made = []
    for user, revision, items, *surplus in rows:
        entries = [(n + 1, item, 1.0 - n / 10, "sequence", "why", None) for n, item in enumerate(items)]
        overflow = [(AT, item) for item in (surplus[0] if surplus else [])]
        made.append((user, revision, [], [], bool(overflow), [float(revision), 0.0], "m1", "c1", AT, entries, overflow))
    frame = spark.createDataFrame(made, REFRESHED)
    if on_driver == "computed there":
        return commits.settled_table(spark, frame.toArrow())
    return commits.settled(frame) if on_driver else commits.settled(frame, limit=0)


def lists(storage):
    rows = storage.read(RECOMMENDATIONS).orderBy("user_id", "rank").collect()
    return [(r.user_id, r.rank, r.item_id, r.revision) for r in rows]


def commit_and_merge(storage, rows, batch_id, seconds=0):
    committed = commits.commit(storage, rows, "test", batch_id, AT + timedelta(seconds=seconds))
    commits.merge(storage, committed, LAYOUT, 1)


def test_a_shorter_list_leaves_no_surplus_rank(storage, spark):
    commit_and_merge(storage, refreshed(spark, ("u", 1, ["a", "b", "c"]), ("v", 1, ["a"])), 0)
    commit_and_merge(storage, refreshed(spark, ("u", 2, ["d"])), 1)
    assert lists(storage) == [("u", 1, "d", 2), ("v", 1, "a", 1)]


def test_a_lower_top_k_removes_the_ranks_behind_it(storage, spark):
    commit_and_merge(storage, refreshed(spark, ("u", 1, ["a", "b", "c"])), 0)
    layout = Layout.of(storage, 1)
    assert layout == LAYOUT
    committed = commits.commit(storage, refreshed(spark, ("u", 2, ["a"])), "test", 1, AT)
    commits.merge(storage, committed, layout, 1)
    assert lists(storage) == [("u", 1, "a", 2)]


def test_an_older_revision_never_overwrites_a_newer_one(storage, spark):
    commit_and_merge(storage, refreshed(spark, ("u", 5, ["new"])), 0)
    commits.commit(storage, refreshed(spark, ("u", 4, ["old", "older"])), "late clock", 0, AT + timedelta(seconds=9))
    commits.merge_tail(storage, LAYOUT, 1)
    (state,) = storage.read(USER_VECTORS).collect()
    assert (state.revision, list(state.vector)) == (5, [5.0, 0.0])
    assert lists(storage) == [("u", 1, "new", 5)]


@pytest.mark.parametrize("on_driver", [(True, "computed there"), (True, False), (False, False)])
def test_the_newest_of_several_commits_wherever_their_rows_are(storage, spark, on_driver):
    first = refreshed(spark, ("u", 2, ["a"]), ("v", 1, ["b"]), on_driver=on_driver[0])
    second = refreshed(spark, ("u", 1, ["old"]), ("w", 1, ["c"]), on_driver=on_driver[1])
    both = [commits.commit(storage, rows, "test", number, AT) for number, rows in enumerate((first, second))]
    found = commits.newest_committed(storage, both).rows
    assert {(r.user_id, r.revision, r.writer, r.batch_id) for r in found.collect()} == {
        ("u", 2, "test", 0),
        ("v", 1, "test", 0),
        ("w", 1, "test", 1),
    }
    assert found.columns == REFRESHES.schema.names


def test_the_newest_rows_are_the_same_in_frames_and_in_tables(spark):
    rng = random.Random(4)
    rows = {(f"u{rng.randrange(8)}", rng.randrange(6)): rng.random() for _ in range(40)}
    # A row may lie in several of them, and a user in one alone.
    tables = [rng.sample([(*key, value) for key, value in rows.items()], size) for size in (1, 10, 20)]
    frames = [spark.createDataFrame(t, "user_id string, revision long, value double") for t in tables]
    newest: dict = {}
    for row in sorted(row for t in tables for row in t):
        newest[row[0]] = row
    assert sorted(tuple(r) for r in commits.newest(frames).collect()) == sorted(newest.values())
    found = commits.newest_rows([f.toArrow() for f in frames])
    assert [tuple(r.values()) for r in found.to_pylist()] == sorted(newest.values())


def test_a_commit_is_known_by_its_writer_and_its_number(storage, spark):
    assert not commits.is_committed(storage, "test", 0)
    commits.commit(storage, refreshed(spark, ("u", 1, ["a"])), "test", 0, AT)
    commits.commit(storage, refreshed(spark, ("u", 2, ["a"])), "another", 1, AT)
    asked = [("test", 0), ("test", 1), ("another", 0), ("another", 1)]
    assert [commits.is_committed(storage, *one) for one in asked] == [True, False, False, True]


def test_what_overflows_is_kept_even_if_the_commit_is_not(storage, spark, monkeypatch):
    """The batch that comes again after a crash may take other users over to a new model, and theirs overflow then."""
    append = Storage.append

    def killed(self, spec, rows):
        if spec is REFRESHES:
            raise RuntimeError("killed")
        append(self, spec, rows)

    with monkeypatch.context() as patched:
        patched.setattr(Storage, "append", killed)
        with pytest.raises(RuntimeError, match="killed"):
            commits.commit(storage, refreshed(spark, ("u", 1, ["a"], ["x"])), "test", 0, AT)
    assert not commits.is_committed(storage, "test", 0)
    commits.commit(storage, refreshed(spark, ("u", 1, ["a"], ["x", "y"])), "test", 0, AT)
    assert storage.read(REFRESHES).count() == 1
    assert {r.item_id for r in storage.read(SEEN_OVERFLOW).collect()} == {"x", "y"}


@pytest.mark.parametrize("broken", ["_merge_states", "_merge_lists"])
def test_the_tail_is_merged_after_a_crash_between_the_merges(storage, spark, monkeypatch, broken):
    commit_and_merge(storage, refreshed(spark, ("u", 1, ["a"]), ("v", 1, ["b"])), 0)

    def crash(*_):
        raise RuntimeError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(commits, broken, crash)
        with pytest.raises(RuntimeError, match="killed"):
            commit_and_merge(storage, refreshed(spark, ("u", 2, ["c", "d"]), ("w", 1, ["e"])), 1, seconds=60)
    commits.merge_tail(storage, LAYOUT, 1)
    expected = [("u", 1, "c", 2), ("u", 2, "d", 2), ("v", 1, "b", 1), ("w", 1, "e", 1)]
    assert lists(storage) == expected
    assert {(r.user_id, r.revision) for r in storage.read(USER_VECTORS).collect()} == {("u", 2), ("v", 1), ("w", 1)}
    commits.merge_tail(storage, LAYOUT, 1)
    assert lists(storage) == expected


def held_back(rows, folder):
    """The rows, but the first task that computes them says that it has begun and waits until it may go on."""
    begun, go = str(folder / "begun"), str(folder / "go")

    def wait(batches):
        for batch in batches:
            Path(begun).touch()
            for _ in range(1200):
                if Path(go).exists():
                    break
                time.sleep(0.1)
            yield batch

    return rows.mapInArrow(wait, rows.schema)


def other_commits(storage, table):
    newer = commits.commit(storage, refreshed(storage.spark, ("u", 3, ["x", "y"])), "test", 3, AT)
    commits.merge(storage, newer, LAYOUT, 5)


def compaction(storage, table):
    assert storage.table(BY_NAME[table]).optimize().executeCompaction().first().metrics.numFilesRemoved > 1


@pytest.mark.parametrize(("met", "attempts"), [(other_commits, 1), (other_commits, 3), (compaction, 3)])
@pytest.mark.parametrize("table", ["user_vectors", "recommendations"])
def test_a_merge_that_meets_another_writer_is_tried_again_and_loses_nothing(
    storage, spark, tmp_path, caplog, monkeypatch, table, attempts, met
):
    # By a MERGE each leaves a file of its own.
    monkeypatch.setattr(delta_rs, "_LARGEST_WHOLE", 0)
    commit_and_merge(storage, refreshed(spark, ("u", 1, ["a"]), ("v", 1, ["b"])), 0)
    commit_and_merge(storage, refreshed(spark, ("w", 1, ["a"])), 1)
    committed = commits.commit(storage, refreshed(spark, ("u", 2, ["c"]), ("v", 2, ["d", "e"])), "test", 2, AT)
    name = {"user_vectors": "_merge_states", "recommendations": "_merge_lists"}[table]
    merge = getattr(commits, name)

    def late(storage, rows, layout):
        merge(storage, Cut(held_back(rows.rows, tmp_path), {}), layout)

    with monkeypatch.context() as patched, ThreadPoolExecutor(1) as pool:
        patched.setattr(commits, name, late)
        merging = pool.submit(commits.merge, storage, committed, LAYOUT, attempts)
        while not (tmp_path / "begun").exists() and not merging.done():
            time.sleep(0.05)
        patched.undo()
        try:
            # Of one object's writes to a table each waits for the one before.
            met(Storage(spark, storage.settings), table)
        finally:
            (tmp_path / "go").touch()
        if attempts == 1:
            with pytest.raises(CONFLICTS):
                merging.result()
            # It is still committed, so the next start merges it.
            commits.merge_tail(storage, LAYOUT, 1)
        else:
            merging.result()
            assert (table, 1) in {(r.what, r.attempt) for r in caplog.records if "trying again" in r.message}
    of_u = [("u", 1, "x", 3), ("u", 2, "y", 3)] if met is other_commits else [("u", 1, "c", 2)]
    assert lists(storage) == [*of_u, ("v", 1, "d", 2), ("v", 2, "e", 2), ("w", 1, "a", 1)]
    revisions = {("u", of_u[0][3]), ("v", 2), ("w", 1)}
    assert {(r.user_id, r.revision) for r in storage.read(USER_VECTORS).collect()} == revisions
