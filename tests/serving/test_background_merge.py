"""The MERGEs behind the commits: coalesced, in order, never lost in silence."""

from __future__ import annotations

import threading
import time

import pyarrow as pa
import pytest
from nightstream.serving import background_merge, commits


class Commit(str):
    """Stands for committed rows; `table` as of rows on the executors."""

    table = None


class Noted(background_merge.BackgroundMerge):
    """Its MERGEs note their rows, wait for `gate`, and fail on the rows "bad"."""

    def __init__(self) -> None:
        super().__init__(None, 5, 1, share=0.5)
        self.merged: list[list[str]] = []
        self.gate, self.begun = threading.Event(), threading.Event()

    def merge(self, storage, rows, layout, attempts) -> None:
        self.begun.set()
        self.gate.wait(10)
        if "bad" in rows:
            raise RuntimeError("a MERGE failed")
        self.merged.append(rows)


@pytest.fixture
def merging(monkeypatch):
    made = Noted()
    monkeypatch.setattr(commits, "newest_committed", lambda storage, pending: list(pending))
    monkeypatch.setattr(commits, "merge", made.merge)
    return made


def test_what_is_committed_during_a_merge_goes_together_into_the_next(merging):
    merging.add(Commit("a"))
    assert merging.begun.wait(10)
    merging.add(Commit("b"))
    merging.add(Commit("c"))
    assert merging.pending() == ["a", "b", "c"]
    merging.gate.set()
    merging.settle()
    assert merging.pending() == []
    assert merging.merged == [["a"], ["b", "c"]]


def test_a_failed_merge_is_raised_and_nothing_is_merged_past_it(merging):
    merging.add(Commit("bad"))
    merging.add(Commit("later"))
    merging.gate.set()
    with pytest.raises(RuntimeError, match="a MERGE failed"):
        merging.settle()
    assert merging.merged == []


@pytest.mark.parametrize("bound", ["MOST_PENDING", "MOST_PENDING_BYTES"])
def test_too_many_pending_commits_wait(merging, monkeypatch, bound):
    table = pa.table({"number": [1]})
    monkeypatch.setattr(Commit, "table", table)
    monkeypatch.setattr(background_merge, bound, 8 if bound == "MOST_PENDING" else 8 * table.nbytes)
    for number in range(8):
        merging.add(Commit(str(number)))
    waiting = threading.Thread(target=merging.add, args=(Commit("one more"),))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    merging.gate.set()
    waiting.join(10)
    assert not waiting.is_alive()
    merging.settle()
    assert [rows for merge in merging.merged for rows in merge][-1] == "one more"


def test_closing_waits_for_the_merge_that_runs_and_begins_no_other(merging):
    merging.add(Commit("a"))
    assert merging.begun.wait(10)
    merging.add(Commit("later"))
    closing = threading.Thread(target=merging.close)
    closing.start()
    closing.join(0.2)
    assert closing.is_alive()
    merging.gate.set()
    closing.join(10)
    assert not closing.is_alive()
    assert merging.merged == [["a"]]


def test_merges_take_no_more_than_their_share_of_the_time(merging):
    merging.add(Commit("a"))
    assert merging.begun.wait(10)
    time.sleep(0.4)
    merging.begun.clear()
    merging.gate.set()
    merging.add(Commit("b"))
    # Half of the time: so long as the first one took.
    assert not merging.begun.wait(0.3)
    assert merging.begun.wait(10)
    merging.settle()
