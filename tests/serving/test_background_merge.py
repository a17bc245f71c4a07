"""The MERGEs behind the commits: coalesced, in order, never lost in silence."""

from __future__ import annotations

import threading

import pyarrow as pa
import pytest
from nightstream.serving import background_merge, commits


class Commit(str):
    """Stands for committed rows; `table` as of rows on the executors."""

    table = None


@pytest.fixture
def follower(monkeypatch):
    """A follower whose MERGEs note their rows, wait for `gate`, and fail on the rows "bad"."""
    merged, gate, begun = [], threading.Event(), threading.Event()

    def merge(storage, rows, layout, attempts):
        begun.set()
        gate.wait(10)
        if "bad" in rows:
            raise RuntimeError("a MERGE failed")
        merged.append(rows)

    monkeypatch.setattr(commits, "newest_committed", lambda storage, pending: list(pending))
    monkeypatch.setattr(commits, "merge", merge)
    made = background_merge.BackgroundMerge(None, 5, 1)
    made.merged, made.gate, made.begun = merged, gate, begun
    return made


def test_what_is_committed_during_a_merge_goes_together_into_the_next(follower):
    follower.add(Commit("a"))
    assert follower.begun.wait(10)
    follower.add(Commit("b"))
    follower.add(Commit("c"))
    assert follower.pending() == ["a", "b", "c"]
    follower.gate.set()
    follower.settle()
    assert follower.pending() == []
    assert follower.merged == [["a"], ["b", "c"]]


def test_a_failed_merge_is_raised_and_nothing_is_merged_past_it(follower):
    follower.add(Commit("bad"))
    follower.add(Commit("later"))
    follower.gate.set()
    with pytest.raises(RuntimeError, match="a MERGE failed"):
        follower.settle()
    assert follower.merged == []


@pytest.mark.parametrize("bound", ["MOST_PENDING", "MOST_PENDING_BYTES"])
def test_too_many_pending_commits_wait(follower, monkeypatch, bound):
    monkeypatch.setattr(Commit, "table", pa.table({"number": [1]}))
    monkeypatch.setattr(background_merge, bound, 8 if bound == "MOST_PENDING" else 8 * Commit.table.nbytes)
    for number in range(8):
        follower.add(Commit(str(number)))
    waiting = threading.Thread(target=follower.add, args=(Commit("one more"),))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    follower.gate.set()
    waiting.join(10)
    assert not waiting.is_alive()
    follower.settle()
    assert [rows for merge in follower.merged for rows in merge][-1] == "one more"
