"""The MERGEs behind the commits: coalesced, in order, never lost in silence."""

from __future__ import annotations

import threading

import pytest
from nightstream import following, serving


@pytest.fixture
def follower(monkeypatch):
    """A follower whose MERGEs note their rows, wait for `gate`, and fail on the rows "bad"."""
    merged, gate, begun = [], threading.Event(), threading.Event()

    def merge(storage, rows, width, attempts):
        begun.set()
        gate.wait(10)
        if "bad" in rows:
            raise RuntimeError("a MERGE failed")
        merged.append(rows)

    monkeypatch.setattr(serving, "list_width", lambda storage, top_k: top_k)
    monkeypatch.setattr(serving, "newest_committed", lambda storage, commits: list(commits))
    monkeypatch.setattr(serving, "merge", merge)
    made = following.Follower(None, 5, 1)
    made.merged, made.gate, made.begun = merged, gate, begun
    return made


def test_what_is_committed_during_a_merge_goes_together_into_the_next(follower):
    follower.add("a")
    assert follower.begun.wait(10)
    follower.add("b")
    follower.add("c")
    assert follower.pending() == ["a", "b", "c"]
    follower.gate.set()
    follower.settle()
    assert follower.pending() == []
    assert follower.merged == [["a"], ["b", "c"]]


def test_a_failed_merge_is_raised_and_nothing_is_merged_past_it(follower):
    follower.add("bad")
    follower.add("later")
    follower.gate.set()
    with pytest.raises(RuntimeError, match="a MERGE failed"):
        follower.settle()
    assert follower.merged == []


def test_too_many_pending_commits_wait(follower):
    for number in range(following.MOST_PENDING):
        follower.add(str(number))
    waiting = threading.Thread(target=follower.add, args=("one more",))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    follower.gate.set()
    waiting.join(10)
    assert not waiting.is_alive()
    follower.settle()
    assert [rows for merge in follower.merged for rows in merge][-1] == "one more"
