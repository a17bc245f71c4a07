"""Under an older epoch than a table knows, no write has an effect; whichever engine writes, and whichever sealed."""

from __future__ import annotations

import threading
from datetime import UTC, datetime

import pytest
from nightstream.errors import WriterBusyError
from nightstream.store.fence import Fence
from nightstream.store.lease import Lease
from nightstream.store.materialize import Cut
from nightstream.store.merge import Merge, When
from nightstream.store.storage import Storage
from nightstream.store.tables import EVENTS, FENCED, UNFOLDED

AT = datetime(2024, 5, 1, tzinfo=UTC)
MERGE = Merge("t.source = s.source", (When("update"), When("insert")))


def source(spark, *names: str) -> Cut:
    frame = spark.createDataFrame([(name, AT, 1) for name in names], UNFOLDED.schema)
    return Cut(frame, {}, frame.toArrow())


def sources(storage: Storage) -> list[str]:
    return sorted(storage.query("SELECT source FROM {unfolded}", UNFOLDED)["source"].to_pylist())


def of(spark, settings, engine: str, epoch: int | None) -> Storage:
    made = Storage(spark, settings.storage.model_copy(update={"engine": engine}))
    made.fence = None if epoch is None else Fence(epoch)
    return made


WRITES = {
    "append": lambda storage, rows: storage.append(UNFOLDED, rows),
    "merge": lambda storage, rows: storage.merge(UNFOLDED, rows, MERGE),
    "overwrite": lambda storage, rows: storage.overwrite(UNFOLDED, rows.rows),
    "lay out": lambda storage, rows: storage.lay_out(UNFOLDED, rows.rows, None),
}


@pytest.mark.parametrize("engine", ["spark", "delta-rs"])
def test_writes_under_the_newest_epoch_count_and_under_an_older_one_not(spark, settings, engine):
    old, new = of(spark, settings, engine, 3), of(spark, settings, engine, 4)
    old.seal(UNFOLDED)
    for name in ("a", "b"):
        old.append(UNFOLDED, source(spark, name))
    old.merge(UNFOLDED, source(spark, "b", "c"), MERGE)
    assert sources(old) == ["a", "b", "c"]
    new.seal(UNFOLDED)
    for write in WRITES.values():
        try:
            write(old, source(spark, "late"))
        except WriterBusyError:
            continue
    assert sources(old) == ["a", "b", "c"]
    for name, write in WRITES.items():
        write(new, source(spark, name))
        assert name in sources(new)


@pytest.mark.parametrize("engine", ["spark", "delta-rs"])
def test_who_is_sealed_out_of_nothing_else_writes_on(spark, settings, engine):
    """Tables that are not the lease's, and writers without one (tools, a first night), know no fence."""
    old = of(spark, settings, engine, 3)
    of(spark, settings, engine, 4).seal(UNFOLDED)
    assert EVENTS in FENCED
    of(spark, settings, engine, None).append(UNFOLDED, source(spark, "a tool"))
    assert sources(old) == ["a tool"]


@pytest.mark.parametrize("sealing", ["spark", "delta-rs"])
def test_a_merge_that_runs_while_another_takes_over_is_refused(spark, settings, tmp_path, monkeypatch, sealing):
    begun, go = tmp_path / "begun", tmp_path / "go"
    paths = str(begun), str(go)

    def held_back(batches):
        import pathlib
        import time

        for batch in batches:
            pathlib.Path(paths[0]).touch()
            # Where it holds all task slots, the seal gets one when this ends, before the second half of the MERGE.
            for _ in range(100):
                if pathlib.Path(paths[1]).exists():
                    break
                time.sleep(0.1)
            yield batch

    old, new = of(spark, settings, "spark", 3), of(spark, settings, "spark", 4)
    old.seal(UNFOLDED)
    old.append(UNFOLDED, source(spark, "a"))
    rows = source(spark, "a", "late").rows.mapInArrow(held_back, UNFOLDED.schema)
    met: list[BaseException] = []

    def merge() -> None:
        try:
            old.merge(UNFOLDED, rows, MERGE)
        except BaseException as error:
            met.append(error)

    merging = threading.Thread(target=merge)
    merging.start()
    while not begun.exists() and merging.is_alive():
        merging.join(0.05)
    if sealing == "spark":
        monkeypatch.setattr(new, "local", None)
    new.seal(UNFOLDED)
    go.touch()
    merging.join()
    assert [type(error) for error in met] == [WriterBusyError]
    monkeypatch.undo()
    assert sources(old) == ["a"]


@pytest.mark.parametrize("engine", ["spark", "delta-rs"])
def test_who_lost_the_lease_learns_it_whatever_it_wrote(spark, settings, engine):
    first, second = of(spark, settings, engine, None), of(spark, settings, engine, None)
    # The same holder, as a second process under one checkpoint is.
    held = Lease(first, "a", "stream", 60, 3, wait=False)
    held.__enter__()
    first.append(UNFOLDED, source(spark, "before"))
    held.confirm()
    with Lease(second, "a", "stream", 60, 3, wait=False):
        second.append(UNFOLDED, source(spark, "second"))
        try:
            first.append(UNFOLDED, source(spark, "late"))
        except WriterBusyError:
            assert engine == "delta-rs"
        with pytest.raises(WriterBusyError, match="taken over by stream"):
            held.confirm()
    with pytest.raises(WriterBusyError, match="taken over by stream"):
        held.__exit__(None)
    assert sources(first) == ["before", "second"]
    # What still runs when its lease has ended stays out, too.
    with Lease(Storage(spark, settings.storage), "b", "nightly", 60, 3, wait=False), pytest.raises(WriterBusyError):
        second.local.append(UNFOLDED, source(spark, "late").table, second.fence)
