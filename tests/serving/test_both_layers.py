"""Batch and speed layer are one function: any cut of a stream ends in what one batch over all events computes."""

from __future__ import annotations

import os
import random
import threading
from datetime import timedelta

import pytest
import world
from nightstream.ingest import sources
from nightstream.ingest.ledger import check, parsed, record
from nightstream.runtime import clock
from nightstream.serving import batch_layer, catalogue, commits, speed_layer
from nightstream.store import registry
from nightstream.store import storage as storage_module
from nightstream.store.storage import Storage
from nightstream.store.tables import (
    BY_NAME,
    EVENTS,
    ITEMS,
    QUARANTINE,
    RECOMMENDATIONS,
    REFRESHES,
    SEEN_OVERFLOW,
    USER_VECTORS,
)
from pyspark.sql import functions as F
from states import NOW, assert_merged, assert_same, state_of

ARRIVED = world.START + 20 * 86_400
TAKEN_BACK = "e001-011"
_ONE_BATCH: list = []


def live_events() -> list:
    """What arrives after the night: events late by seconds to days, repeated, of new users, of an unknown item, by a
    clock that is ahead, a little and too much; a retraction, a changed event, and things that are none."""
    rng = random.Random(5)
    rows = []
    for number in range(60):
        user = f"u{rng.randrange(46):03}"
        # From seconds to days before the arrival, many of them older than what the night has learnt from.
        when = ARRIVED - int(10 ** rng.uniform(0, 6.4))
        item = f"i{rng.randrange(world.ITEMS + 1):02}"
        rows.append(
            {"event_id": f"live{number}", "user_id": user, "item_id": item, "event_type": "view", "event_time": when}
        )
    rows += rng.sample(rows, 8)
    rows.append(
        {"event_id": "back", "user_id": "u001", "event_type": "retract", "event_time": 1, "retracts": TAKEN_BACK}
    )
    # Whether the two come together or not, and whichever comes first, they make a user known who has consumed nothing.
    for number in range(6):
        only = {"event_id": f"only{number}", "user_id": f"once here {number}", "event_time": ARRIVED}
        back = {"event_id": f"only{number} back", "event_type": "retract", "retracts": f"only{number}"}
        rows += [{**only, "item_id": "i07", "event_type": "view"}, {**only, **back}]
    rows.append({"event_id": "e002-010", "user_id": "u004", "item_id": "i03", "event_time": world.START + 10**6})
    ahead = {"user_id": "u003", "item_id": "i05", "event_type": "view"}
    rows.append({**ahead, "event_id": "ahead", "event_time": ARRIVED + 590})
    rows.append({**ahead, "event_id": "too far ahead", "event_time": ARRIVED + 610})
    return [*rows, "no json at all", {"user_id": "u000"}]


def payloads(spark, tmp_path, rows, name):
    source = tmp_path / "live" / f"{name}.jsonl"
    if not source.exists():
        # What comes again is the same file, with the arrival time that it had.
        world.write_lines(source, rows)
        os.utime(source, (ARRIVED, ARRIVED))
    return sources.read_events(spark, layers_source(source))


def layers_source(path):
    from nightstream.runtime.settings import EventSource

    return EventSource.model_validate({**world.sources(path.parent)["events"], "path": str(path)})


def feed(layer, payloads, number) -> None:
    """One micro-batch, merged before the test looks at it."""
    layer(parsed(payloads, layer.settings), number)
    layer.settle()


def started(storage, settings, name="stream one"):
    layer = speed_layer.SpeedLayer(storage, settings, lambda: name, clock.utc_now)
    layer.start()
    return layer


def one_batch(spark, night, tmp_path):
    """The state after the same events in one go, refreshed by the batch layer; computed once for all tests."""
    if _ONE_BATCH:
        return _ONE_BATCH[0]
    storage, settings = night("batch")
    record(storage, parsed(payloads(spark, tmp_path, live_events(), "all"), settings), settings).release()
    version = registry.published(storage).model_version
    batch_layer.apply_all(storage, settings, catalogue.load_bundle(storage, version), "another night", 0, NOW)
    _ONE_BATCH.append(state_of(storage))
    return _ONE_BATCH[0]


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.faults)])
def test_any_cut_order_and_repetition_of_the_stream_equals_one_batch(spark, night, tmp_path, seed):
    storage, settings = night("stream")
    rows = live_events()
    rng = random.Random(seed)
    shuffled = rng.sample(rows, len(rows))
    cuts = sorted(rng.sample(range(1, len(rows)), 3))
    parts = [shuffled[a:b] for a, b in zip([0, *cuts], [*cuts, len(rows)], strict=True)]
    layer = started(storage, settings)
    for number, part in enumerate(parts):
        feed(layer, payloads(spark, tmp_path, part, f"part{seed}-{number}"), number)
    # A micro-batch that comes again, as after a failure, changes nothing.
    feed(layer, payloads(spark, tmp_path, parts[-1], f"part{seed}-{len(parts) - 1}"), len(parts) - 1)
    check(storage)
    assert sorted(r.reason for r in storage.read(QUARANTINE).collect()) == ["in_future", "missing", "not_json"]
    window = storage.read(USER_VECTORS).where("user_id = 'u003'").select(F.explode("window.event_id").alias("id"))
    assert "ahead" in {r.id for r in window.collect()}
    assert_same(storage, one_batch(spark, night, tmp_path))
    window = storage.read(USER_VECTORS).where("user_id = 'u001'").select(F.explode("window.event_id").alias("id"))
    assert TAKEN_BACK not in {r.id for r in window.collect()}


@pytest.mark.slow
def test_the_driver_and_the_executors_refresh_alike(spark, night, tmp_path, monkeypatch):
    rows, found = live_events(), []
    for most in (0, commits.LOCAL_USERS):
        monkeypatch.setattr(commits, "LOCAL_USERS", most)
        monkeypatch.setattr(storage_module, "LOCAL_ROWS", most)
        storage, settings = night(f"at most {most}")
        feed(started(storage, settings), payloads(spark, tmp_path, rows, "alike"), 0)
        found.append(storage)
    assert_same(found[0], state_of(found[1]))


@pytest.mark.faults
def test_a_micro_batch_that_refreshes_nobody_is_committed_all_the_same(spark, night, tmp_path):
    storage, settings = night("nobody")
    layer = started(storage, settings)
    first = {"event_id": "n1", "user_id": "u000", "item_id": "i01", "event_time": world.START + 10**6}
    for number, rows in enumerate(([first], ["no json"], [first], [first, "no json"])):
        feed(layer, payloads(spark, tmp_path, rows, f"nobody{number}"), number)
    assert check(storage)["quarantine"] == 2
    assert storage.read(REFRESHES).where("writer = 'stream one'").count() == 1


@pytest.mark.faults
def test_commits_of_driver_and_executors_are_merged_together(spark, night, tmp_path, monkeypatch):
    storage, settings = night("mixed")
    layer = started(storage, settings)
    held, merge = threading.Event(), commits.merge

    def late(*arguments):
        held.wait(300)
        merge(*arguments)

    monkeypatch.setattr(commits, "merge", late)
    rows = [r for r in live_events() if isinstance(r, dict)]
    back = [r for r in rows if r.get("retracts") == TAKEN_BACK]
    for number, (part, most) in enumerate(((rows[:20], commits.LOCAL_USERS), (back, 0), (rows[20:40], 100))):
        monkeypatch.setattr(commits, "LOCAL_USERS", most)
        layer(parsed(payloads(spark, tmp_path, part, f"mixed{number}"), settings), number)
    assert len(layer.background_merge.pending()) == 3
    held.set()
    layer.settle()
    assert_merged(storage)
    stored = {r.user_id for r in storage.read(USER_VECTORS).collect()}
    assert {r["user_id"] for r in [*rows[:40], *back]} <= stored


@pytest.mark.parametrize(
    "most",
    [pytest.param(0, marks=pytest.mark.faults), pytest.param(commits.LOCAL_USERS, marks=pytest.mark.slow)],
)
def test_a_consumed_item_stays_away_when_it_no_longer_fits_into_the_state(spark, night, tmp_path, monkeypatch, most):
    monkeypatch.setattr(commits, "LOCAL_USERS", most)
    storage, settings = night("overflow")
    settings = settings.model_copy(update={"window": settings.window.model_copy(update={"seen_limit": 3})})
    layer = started(storage, settings)
    for number in range(2):
        event = {"event_id": f"o{number}", "user_id": "u000", "item_id": f"i{20 + number}", "event_time": world.START}
        feed(layer, payloads(spark, tmp_path, [event], f"o{number}"), number)
        consumed = {r.item_id for r in storage.read(EVENTS).where("user_id = 'u000'").collect()}
        listed = state_of(storage)[1]["u000"]
        assert len(listed) == settings.serving.top_k
        assert not consumed & {row["item_id"] for row in listed}
    batch_layer.apply_all(storage, settings, layer.bundle, "another night", 0, NOW)
    assert state_of(storage)[1]["u000"] == listed


@pytest.mark.slow
def test_an_item_that_was_taken_back_after_it_overflowed_can_be_recommended_again(spark, night, tmp_path):
    """As in one batch over all events, where it never overflows."""
    storage, settings = night("taken back")
    settings = settings.model_copy(update={"window": settings.window.model_copy(update={"seen_limit": 3})})
    layer = started(storage, settings)
    first = {"event_id": "o0", "user_id": "u000", "item_id": "i20", "event_time": world.START - 10}
    back = {"event_id": "o1", "user_id": "u000", "event_type": "retract", "event_time": 1, "retracts": "o0"}
    later = {"event_id": "o2", "user_id": "u000", "item_id": "i21", "event_time": world.START - 20}
    overflowed = []
    for number, row in enumerate((first, back, later)):
        feed(layer, payloads(spark, tmp_path, [row], f"back{number}"), number)
        rows = storage.read(SEEN_OVERFLOW).where("user_id = 'u000'").collect()
        overflowed.append({"i20", "i21"} & {r.item_id for r in rows})
    assert overflowed == [{"i20"}, set(), {"i21"}]
    listed = state_of(storage)[1]["u000"]
    batch_layer.apply_all(storage, settings, layer.bundle, "another night", 0, NOW)
    assert state_of(storage)[1]["u000"] == listed


@pytest.mark.slow
def test_a_late_merge_hides_no_commit_from_the_next_micro_batch(spark, night, tmp_path, monkeypatch):
    storage, settings = night("late")
    rows, held = live_events(), threading.Event()
    merge = commits.merge
    layer = started(storage, settings)

    def late(*arguments):
        if threading.current_thread().name == "merge":
            held.wait(300)
        merge(*arguments)

    monkeypatch.setattr(commits, "merge", late)
    for number, part in enumerate((rows[:30], rows[30:])):
        layer(parsed(payloads(spark, tmp_path, part, f"late{number}"), settings), number)
    assert len(layer.background_merge.pending()) == 2
    held.set()
    layer.settle()
    assert layer.background_merge.pending() == []
    assert_same(storage, one_batch(spark, night, tmp_path))


def crash(*_args, **_kwargs):
    raise RuntimeError("killed")


@pytest.mark.parametrize(
    "broken",
    [
        "append:refreshes",
        *[
            pytest.param(where, marks=pytest.mark.faults)
            for where in ("commit", "merge", "_merge_states", "_merge_lists")
        ],
    ],
)
def test_killed_between_any_two_writes_it_ends_in_the_undisturbed_state(spark, night, tmp_path, monkeypatch, broken):
    storage, settings = night("stream")
    rows = live_events()
    layer = started(storage, settings)
    feed(layer, payloads(spark, tmp_path, rows[:30], "first"), 0)
    with monkeypatch.context() as patched:
        if broken.startswith("append:"):
            write = Storage.append

            def append(self, spec, frame):
                write(self, spec, frame)
                if spec.name == REFRESHES.name:
                    crash()

            patched.setattr(Storage, "append", append)
        else:
            patched.setattr(commits, broken, crash)
        with pytest.raises(RuntimeError, match="killed"):
            feed(layer, payloads(spark, tmp_path, rows[30:], "second"), 1)
    # The process is gone; a new one gets the same micro-batch from the checkpoint.
    layer = started(storage, settings)
    feed(layer, payloads(spark, tmp_path, rows[30:], "second"), 1)
    check(storage)
    assert_same(storage, one_batch(spark, night, tmp_path))
    counted = storage.read(REFRESHES).where("writer = 'stream one'").groupBy("user_id", "revision").count()
    assert counted.where("count > 1").isEmpty()


@pytest.mark.faults
def test_what_was_half_booked_comes_again_under_another_checkpoint_and_counts_once(spark, night, tmp_path, monkeypatch):
    """Killed when raw_events had the rows and events had not; the new checkpoint brings them in a later batch."""
    storage, settings = night("half")
    rows = live_events()
    layer = started(storage, settings)
    write = Storage.append

    def append(self, spec, frame):
        if spec.name == EVENTS.name:
            crash()
        write(self, spec, frame)

    with monkeypatch.context() as patched:
        patched.setattr(Storage, "append", append)
        with pytest.raises(RuntimeError, match="killed"):
            feed(layer, payloads(spark, tmp_path, rows[30:], "second"), 0)
    layer = speed_layer.SpeedLayer(storage, settings, lambda: "stream two", clock.utc_now)
    layer.start()
    for number, (part, name) in enumerate([(rows[:30], "first"), (rows[30:], "second")]):
        feed(layer, payloads(spark, tmp_path, part, name), number)
    check(storage)
    assert layer._half_booked
    monkeypatch.setattr(layer.snapshots, "take", lambda bundle: (True, None))
    layer.between_batches()
    assert not layer._half_booked
    assert_same(storage, one_batch(spark, night, tmp_path))


def test_everyone_known_has_a_full_list_and_so_has_the_stranger(night):
    storage, settings = night("cold")
    counts = {r.user_id: r["count"] for r in storage.read(RECOMMENDATIONS).groupBy("user_id").count().collect()}
    assert set(counts) >= {"idle-left", "idle-right", settings.serving.default_user}
    eligible = {r.user_id: world.ITEMS - len({s.item_id for s in r.seen}) for r in storage.read(USER_VECTORS).collect()}
    assert counts == {user: min(settings.serving.top_k, count) for user, count in eligible.items()}


def test_an_unknown_user_has_a_list_after_the_first_event_and_an_unknown_item_is_encoded(spark, night, tmp_path):
    storage, settings = night("new")
    new_item = spark.createDataFrame(
        [("i-new", "Item 3", "Item 3", {"group": ["left"]}, {"size": 3.0}, True)], ITEMS.schema
    )
    storage.append(ITEMS, new_item)
    quick = settings.model_copy(update={"stream": settings.stream.model_copy(update={"snapshot_seconds": 0.0})})
    layer = started(storage, quick)
    event = {"event_id": "x1", "user_id": "newcomer", "item_id": "i00", "event_time": world.START + 10**5}
    feed(layer, payloads(spark, tmp_path, [event], "newcomer"), 0)
    rows = storage.read(RECOMMENDATIONS).where("user_id = 'newcomer'").collect()
    assert len(rows) == settings.serving.top_k
    assert "i-new" in layer.bundle.load().catalogue.item_ids
    assert storage.read(EVENTS).where("user_id = 'newcomer'").count() == 1


@pytest.mark.slow
def test_a_newly_published_model_is_taken_over_by_slices_and_rolled_back(spark, night, tmp_path):
    storage, settings = night("handover")
    first = registry.published(storage)
    for table in ("model_artifacts", "item_embeddings"):
        spec = BY_NAME[table]
        storage.append(spec, storage.read(spec).withColumn("model_version", F.lit("other")))
    registry.record(storage, "other", registry.TRAINED, NOW, {}, {}, [])
    stream = settings.stream.model_copy(update={"snapshot_seconds": 0.0, "handover_slice": 30})
    quick = settings.model_copy(update={"stream": stream})
    layer = speed_layer.SpeedLayer(storage, quick, lambda: "stream one", clock.utc_now)
    # As while a stream waits for the tables.
    registry.publish(storage, "other", NOW + timedelta(days=300))
    layer.start()
    assert layer.bundle.model_version == "other"
    for version in ("other", first.model_version):
        for number in range(3):
            name = f"{version}-{number}"
            event = {"event_id": name, "user_id": "u000", "item_id": "i01", "event_time": world.START + 10**5 + number}
            feed(layer, payloads(spark, tmp_path, [event], name), layers_batch(layer))
            versions = {r.model_version for r in storage.read(RECOMMENDATIONS).collect()}
            assert versions <= {"other", first.model_version}
        assert versions == {version}
        assert {r.model_version for r in storage.read(USER_VECTORS).collect()} == {version}
        registry.publish(storage, first.model_version, NOW + timedelta(days=400))


def layers_batch(layer) -> int:
    layer.numbered = getattr(layer, "numbered", -1) + 1
    return layer.numbered
