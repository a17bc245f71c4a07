"""Writes that meet a concurrent writer are tried again, and counted."""

from __future__ import annotations

import threading

import pytest
from nightstream.store import storage as module


class ConcurrentAppendException(Exception):
    """Named as Delta's."""


def failing(times: int, error: Exception):
    """An action that raises `times` times, then returns how often it was called."""
    calls = []

    def action() -> int:
        calls.append(1)
        if len(calls) <= times:
            raise error
        return len(calls)

    return action


@pytest.fixture
def bare(settings, monkeypatch):
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    return module.Storage(None, settings.storage)


def test_a_conflict_is_tried_again_and_counted_from_any_thread(bare):
    def conflict(times):
        assert bare.with_retries(failing(times, ConcurrentAppendException()), 5, "t") == times + 1

    threads = [threading.Thread(target=conflict, args=(times,)) for times in (0, 1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bare.conflicts == 3


def test_the_last_attempt_and_other_errors_are_raised(bare):
    with pytest.raises(ConcurrentAppendException):
        bare.with_retries(failing(3, ConcurrentAppendException()), 3, "t")
    with pytest.raises(ZeroDivisionError):
        bare.with_retries(failing(1, ZeroDivisionError()), 3, "t")
    assert bare.conflicts == 2
