"""A stream that stands still before a write, while another process takes the tables over, has no part in what comes."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from arrivals import Arrivals
from killing import Victim
from nightstream.steps import apply, serve
from states import assert_merged, assert_same, recomputed, state_of
from test_kills import APPENDS, ENGINES, MERGES, assert_same_books, prepared

LEASE_SECONDS = 5.0
WRITES = (*APPENDS, *MERGES)
AS_OF = datetime(2024, 1, 2, tzinfo=UTC)


def overtaken(night, tmp_path: Path, write: str, engine: str, by_night: bool) -> None:
    """Stopped before the write, overtaken, let go on; and run to the end by the next process."""
    storage, settings = night("stopped")
    settings, file = prepared(settings, tmp_path, serving__lease_seconds=LEASE_SECONDS, storage__engine=engine)
    arrivals = Arrivals(Path(settings.stream.path), 9)
    for _ in range(3):
        arrivals.drop(whole=True)
    with Victim(["serve"], file, tmp_path / "serve.log") as stream:
        stream.start(f"stop {write}")
        stream.stood_still()
        if by_night:
            # Not before the lease has run out.
            time.sleep(LEASE_SECONDS)
            assert apply.run(storage.spark, settings, AS_OF)["users"] > 0
        else:
            # Another process under the checkpoint has the lease at once.
            serve.run(storage.spark, settings, until_idle=True)
        stream.go_on()
        assert stream.ended() == 2, stream.said()
        assert "taken over by" in stream.said() or "ran out" in stream.said(), stream.said()
    serve.run(storage.spark, settings, until_idle=True)
    # A night cuts everyone's seen items by this test's limit, a stream those of the users that it touches.
    computed = recomputed(storage, settings, tmp_path / "copy") if by_night else None
    undisturbed, own = night("undisturbed")
    own, _ = prepared(own, tmp_path, stream__path=settings.stream.path, stream__max_per_trigger=100)
    serve.run(storage.spark, own, until_idle=True)
    assert_merged(storage)
    assert_same_books(storage, undisturbed)
    assert_same(storage, state_of(undisturbed) if computed is None else computed)


@pytest.mark.faults
@pytest.mark.parametrize("by_night", [True, False])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("write", WRITES)
def test_a_stream_that_slept_before_any_write_has_no_part_in_what_comes(night, tmp_path, write, engine, by_night):
    overtaken(night, tmp_path, write, engine, by_night)


@pytest.mark.slow
def test_a_stream_that_slept_before_a_drawn_write_has_no_part_in_what_comes(night, tmp_path, drawn):
    overtaken(night, tmp_path, drawn.choice(WRITES), drawn.choice(ENGINES), drawn.random() < 0.5)
