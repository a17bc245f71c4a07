"""Which side refreshes a micro-batch: this process, or the executors."""

from __future__ import annotations

from dataclasses import replace

import pyarrow as pa
import pytest
from nightstream.ingest.ledger import Counts, Recorded, Refold
from nightstream.serving import commits
from nightstream.serving.refresh import NO_EVENTS
from nightstream.serving.state_source import DriverStates, ExecutorStates, Touched
from nightstream.store.materialize import Cut

ELSEWHERE = object()  # stands for a frame whose rows are not on the driver
FEW = Recorded(Counts(), {}, accepted=Cut(ELSEWHERE, {}, pa.table({"user_id": ["b", "a", "b"]})))
BEHIND = Cut(ELSEWHERE, {"users": 2}, pa.table({"user_id": ["a", "c"]}))


@pytest.fixture
def driver() -> DriverStates:
    return DriverStates(None, None, None, list)


@pytest.mark.parametrize(
    ("touched", "users"),
    [
        (Touched(FEW, None), ["b", "a"]),
        (Touched(FEW, BEHIND), ["b", "a", "c"]),
        (Touched(Recorded(Counts(), {}), BEHIND), ["a", "c"]),
        (Touched(Recorded(Counts(), {}), None), []),
        (Touched(replace(FEW, accepted=Cut(ELSEWHERE, {})), BEHIND), None),
        (Touched(FEW, Cut(ELSEWHERE, BEHIND.totals)), None),
    ],
)
def test_the_users_are_known_where_all_of_them_are_on_the_driver(driver, touched, users):
    found = touched.users()
    assert found is None if users is None else found.to_pylist() == users
    assert driver.takes(touched) is (users is not None)


def test_who_is_folded_again_is_among_the_users_and_many_go_to_the_executors(driver, monkeypatch):
    users = Cut(ELSEWHERE, {}, pa.table({"user_id": ["d", "a"]}))
    again = Touched(replace(FEW, refold=Refold(users, Cut(ELSEWHERE, {}, NO_EVENTS))), None)
    assert again.users().to_pylist() == ["b", "a", "d"]
    assert driver.takes(again)
    with_a_long_past = Touched(replace(FEW, refold=Refold(users, Cut(ELSEWHERE, {}))), None)
    assert not driver.takes(with_a_long_past)
    monkeypatch.setattr(commits, "LOCAL_USERS", 2)
    assert driver.takes(Touched(FEW, None))
    assert not driver.takes(Touched(FEW, BEHIND))
    assert ExecutorStates(None, None, list).takes(with_a_long_past)


def test_nothing_is_asked_ahead_for_too_many_users_nor_for_none(driver, monkeypatch):
    arriving = pa.table({"user_id": ["a", None, "b", "c"]})
    monkeypatch.setattr(driver, "_ask", lambda users, events: (users.to_pylist(), events))
    assert driver.ask_ahead(Cut(ELSEWHERE, {}, arriving)) == (["a", "b", "c"], 4)
    assert driver.ask_ahead(Cut(ELSEWHERE, {}, arriving.slice(1, 1))) is None
    assert driver.ask_ahead(Cut(ELSEWHERE, {})) is None
    monkeypatch.setattr(commits, "LOCAL_USERS", 2)
    assert driver.ask_ahead(Cut(ELSEWHERE, {}, arriving)) is None
