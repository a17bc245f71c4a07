"""The real processes, killed with SIGKILL at chosen writes and at random moments, end as if nothing had happened."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import pytest
import yaml
from arrivals import Arrivals
from killing import Victim, batches_done, files_taken, kill_at_random
from nightstream.ingest.ledger import check
from nightstream.runtime.settings import Settings, validate
from nightstream.steps import serve
from nightstream.store import registry
from nightstream.store.storage import Storage
from nightstream.store.tables import (
    DUPLICATES,
    EVENTS,
    ITEM_EMBEDDINGS,
    QUARANTINE,
    RAW_EVENTS,
    RECOMMENDATIONS,
    SEEN_OVERFLOW,
    USER_VECTORS,
)
from pyspark.sql import functions as F
from states import assert_merged, assert_same, recomputed, state_of

APPENDS = ("append quarantine", "append events", "append duplicates", "append raw_events", "merge events")
APPENDS += ("append seen_overflow", "append refreshes")
MERGES = ("merge user_vectors", "merge recommendations")


def around(*writes: str) -> list[str]:
    return [f"{when} {write}" for write in writes for when in ("before", "after")]


# Between any two writes of a micro-batch: of those side by side, each is once the first and once the last. The end of
# the batch lies before the MERGEs that follow it, and before Spark notes in the checkpoint that the batch is done.
# The MERGEs come twice: at a start, of what the process before has left, and after a micro-batch, where nothing is.
DEATHS = [[place] for place in (*around(*APPENDS), *around(*MERGES), "after batch stream")]
DEATHS += [["before append refreshes", merge] for merge in around(*MERGES)]
START_SECONDS = 12.0
ENGINES = ("spark", "delta-rs")


def prepared(settings: Settings, folder: Path, **told: object) -> tuple[Settings, Path]:
    """Settings under which everything happens in a micro-batch of the small world, and their file."""
    document = settings.model_dump(mode="json")
    document["stream"] |= {"max_per_trigger": 2, "snapshot_seconds": 1.0}
    document["window"]["seen_limit"] = 8
    document["spark"]["driver_memory"] = "1g"
    document["gate"]["margin"] = None
    document["training"] |= {"epochs": 1, "encoders": ["gru"]}
    for name, value in told.items():
        section, key = name.split("__")
        document[section][key] = value
    file = folder / "base.yaml"
    file.write_text(yaml.safe_dump(document), encoding="utf-8")
    return validate(document), file


@contextmanager
def coming(arrivals: Arrivals, checkpoint: str) -> Iterator[None]:
    """Files keep arriving inside the block, while the stream runs and while it does not."""
    stop, errors = threading.Event(), []

    def feed() -> None:
        try:
            arrivals.keep_coming(lambda: arrivals.files - files_taken(checkpoint), stop)
        except Exception as error:
            errors.append(error)

    feeder = threading.Thread(target=feed, daemon=True)
    feeder.start()
    try:
        yield
    finally:
        stop.set()
        feeder.join()
    assert not errors


def texts(frame) -> list[str]:
    return sorted(r[0] for r in frame.select(F.to_json(F.struct("*"))).collect())


def assert_same_books(storage: Storage, other: Storage) -> None:
    """To the row. Of equal payloads that came in different files, either may be the event and the other the repetition,
    by which of them a micro-batch met first."""
    assert check(storage) == check(other)
    for spec in (RAW_EVENTS, QUARANTINE):
        assert texts(storage.read(spec)) == texts(other.read(spec)), spec.name
    content = [c for c in EVENTS.schema.names if c not in ("raw_id", "arrival_time")]
    assert texts(storage.read(EVENTS).select(*content)) == texts(other.read(EVENTS).select(*content))
    copies = [Counter(r.event_id for r in each.read(DUPLICATES).collect()) for each in (storage, other)]
    assert copies[0] == copies[1]
    booked = [
        sorted(r.raw_id for spec in (EVENTS, DUPLICATES) for r in each.read(spec).select("raw_id").collect())
        for each in (storage, other)
    ]
    assert booked[0] == booked[1]
    # What has overflowed and what has not are cut differently; together they are what was consumed.
    consumed = []
    for each in (storage, other):
        kept = each.read(USER_VECTORS).select("user_id", F.explode("seen.item_id").alias("item_id"))
        gone = each.read(SEEN_OVERFLOW).select("user_id", "item_id")
        consumed.append({tuple(r) for r in kept.unionByName(gone).distinct().collect()})
    assert consumed[0] == consumed[1]


def killed(night, tmp_path, places: list[str], moments: int, seed: int, engine: str = "auto"):
    """A stream killed at these places and at so many random moments, then run to the end; and one over the same files
    without faults."""
    storage, settings = night("killed")
    settings, file = prepared(settings, tmp_path, storage__engine=engine)
    rng, checkpoint = random.Random(seed), settings.stream.checkpoint
    arrivals = Arrivals(Path(settings.stream.path), seed)
    # More than one micro-batch takes.
    for _ in range(2):
        arrivals.drop()
    with Victim(["serve"], file, tmp_path / "serve.log") as stream:
        for place in places:
            arrivals.drop(whole=True)
            stream.start(place)
            stream.died()
        with coming(arrivals, checkpoint):
            for _ in range(moments):
                kill_at_random(stream, checkpoint, rng, START_SECONDS)
    serve.run(storage.spark, settings, until_idle=True)
    assert files_taken(checkpoint) == arrivals.files > 0
    undisturbed, own = night("undisturbed")
    own, _ = prepared(own, tmp_path, stream__path=settings.stream.path, stream__max_per_trigger=100)
    serve.run(storage.spark, own, until_idle=True)
    assert batches_done(own.stream.checkpoint) < batches_done(checkpoint)
    assert_merged(storage)
    assert_same_books(storage, undisturbed)
    assert_same(storage, state_of(undisturbed))


@pytest.mark.slow
def test_killed_at_a_drawn_write_and_a_drawn_moment_it_ends_in_the_undisturbed_state(night, tmp_path, drawn):
    killed(night, tmp_path, drawn.choice(DEATHS), 1, drawn.randrange(10**6), drawn.choice(ENGINES))


@pytest.mark.faults
@pytest.mark.parametrize("engine", ENGINES)
def test_killed_at_every_write_it_ends_in_the_undisturbed_state(night, tmp_path, engine):
    killed(night, tmp_path, [place for death in DEATHS for place in death], 0, 7, engine)


@pytest.mark.faults
@pytest.mark.parametrize("engine", ENGINES)
def test_killed_at_thirty_moments_it_ends_in_the_undisturbed_state(night, tmp_path, engine):
    killed(night, tmp_path, [], 30, 8, engine)


@pytest.mark.faults
def test_night_and_stream_killed_beside_each_other_lose_nothing(night, tmp_path):
    storage, settings = night("both")
    # So long a killed night holds up the stream; and a stream that is away for longer lets the night write.
    settings, file = prepared(settings, tmp_path, serving__lease_seconds=30)
    checkpoint, arrivals = settings.stream.checkpoint, Arrivals(Path(settings.stream.path), 5)
    stop, failures = threading.Event(), []
    of_stream, of_night = random.Random(5), random.Random(6)

    def keep_killing(stream: Victim) -> None:
        try:
            while not stop.is_set():
                # A night that writes the tables may hold up the stream for longer than it waits.
                kill_at_random(stream, checkpoint, of_stream, 2 * START_SECONDS, may_end=(2,))
        except Exception as error:
            failures.append(error)

    with Victim(["serve"], file, tmp_path / "serve.log") as stream, coming(arrivals, checkpoint):
        killer = threading.Thread(target=keep_killing, args=(stream,), daemon=True)
        killer.start()
        try:
            for day in (2, 3):
                the_night(day, file, tmp_path, of_night)
        finally:
            stop.set()
            killer.join()
    assert not failures, failures
    # A stream that is let to live takes over whom neither has brought to the newest model.
    for _ in range(2):
        arrivals.drop(whole=True)
    serve.run(storage.spark, settings, until_idle=True)
    version = registry.published(storage).model_version
    assert version == registry.version_name(datetime(2024, 1, 3), settings.training.seed)
    assert {r.model_version for r in storage.read(RECOMMENDATIONS).collect()} == {version}
    embedded = storage.read(ITEM_EMBEDDINGS).groupBy("model_version", "item_id").count()
    assert embedded.where("count > 1").isEmpty()
    assert_merged(storage)
    assert_same(storage, recomputed(storage, settings, tmp_path / "copy"))
    undisturbed, own = night("undisturbed")
    own, _ = prepared(own, tmp_path, stream__path=settings.stream.path, stream__max_per_trigger=100)
    serve.run(storage.spark, own, until_idle=True)
    assert_same_books(storage, undisturbed)


def the_night(day: int, file: Path, tmp_path: Path, rng: random.Random) -> None:
    """One night, killed at random moments and after what it writes, and started again with the same time each time."""
    with Victim(["nightly", "--as-of", f"2024-01-0{day}T00:00:00"], file, tmp_path / f"night{day}.log") as nightly:
        for _ in range(3):
            nightly.start()
            time.sleep(rng.uniform(0.5, 4) * START_SECONDS)
            assert nightly.exit_code() in (None, 0), nightly.said()
            nightly.kill()
        # When it has trained, when it has published; and in the middle of applying, if the stream leaves it to it.
        for _ in range(2):
            nightly.start("after append models")
            nightly.died()
        nightly.start("after append refreshes")
        assert nightly.ended() in (0, -signal.SIGKILL), nightly.said()
        nightly.start()
        assert nightly.ended() == 0, nightly.said()
