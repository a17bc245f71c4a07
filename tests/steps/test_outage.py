"""After an outage: what has gathered is worked off in bounded micro-batches, within bounded memory."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import world
import yaml
from nightstream.ingest.ledger import check
from nightstream.store.tables import QUARANTINE, USER_VECTORS

ROOT = Path(__file__).parents[2]
EVENTS, FILES, FILES_PER_BATCH = 30_000, 300, 20
MOST_MEMORY_MB = 3_500  # a heap of 1 GB and what a JVM needs beside it, Python with torch, two Python workers


def resident_mb(pid: int) -> float:
    """Resident memory of a process and its descendants in MB; pages that they share count once."""
    total = 0.0
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                total += one.memory_full_info().pss / 2**20
    return total


def run_watched(command: list[str]) -> tuple[dict, list[float]]:
    """What the command told, and its resident memory in MB, twice a second."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    used, done = [], threading.Event()

    def watch():
        while not done.wait(0.5):
            used.append(resident_mb(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    out, err = process.communicate()
    done.set()
    watcher.join()
    assert process.returncode == 0, err[-3000:]
    # Under spark-submit the log comes by stdout, too.
    return json.loads(out[out.rindex("{\n") :]), used


def installed(settings, file: Path, **stream) -> Path:
    document = settings.model_dump(mode="json")
    document["stream"] |= stream
    document["spark"]["driver_memory"] = "1g"
    file.write_text(yaml.safe_dump(document), encoding="utf-8")
    return file


@pytest.mark.slow
def test_a_backlog_is_worked_off_in_bounded_micro_batches_and_memory(night, tmp_path):
    storage, settings = night("backlog")
    before, rng = check(storage), random.Random(3)
    rows = [
        {
            "event_id": f"b{n}",
            "user_id": f"u{rng.randrange(3000):04}",
            "item_id": f"i{rng.randrange(world.ITEMS):02}",
            "event_time": world.START + 10**6 + n,
        }
        for n in range(EVENTS)
    ]
    size = EVENTS // FILES
    for number in range(FILES):
        world.write_lines(Path(settings.stream.path) / f"{number:03}.jsonl", rows[number * size : (number + 1) * size])
    file = installed(settings, tmp_path / "base.yaml", max_per_trigger=FILES_PER_BATCH)
    command = [str(Path(sys.executable).with_name("nightstream")), "serve", "--until-idle", "--settings", str(file)]
    told, used = run_watched(command)
    assert told["events"] == EVENTS
    assert told["batches"] >= FILES // FILES_PER_BATCH
    after = check(storage)
    assert after["events"] - before["events"] == after["raw_events"] - before["raw_events"] == EVENTS
    newest = {r["user_id"]: r["event_id"] for r in rows}
    windows = {r.user_id: r.window[-1].event_id for r in storage.read(USER_VECTORS).collect() if r.window}
    assert {user: windows[user] for user in newest} == newest
    print(f"backlog: {told['batches']} micro-batches, at most {max(used):.0f} MB")
    assert max(used) < MOST_MEMORY_MB


@pytest.mark.faults
def test_a_micro_batch_wider_than_the_driver_takes_stops_nothing(night, tmp_path):
    storage, settings = night("wide")
    rows = [f'{{"user_id":"u000","item_id":"i01","event_time":"soon {n}","pad":"{"x" * 10**6}"}}' for n in range(40)]
    event = {"event_id": "narrow", "user_id": "u001", "item_id": "i01", "event_time": world.START + 10**6}
    world.write_lines(Path(settings.stream.path) / "a.jsonl", [*rows, event])
    file = installed(settings, tmp_path / "base.yaml")
    submit = str(Path(sys.executable).with_name("spark-submit"))
    script = str(ROOT / "streaming" / "serve.py")
    most = ["--conf", "spark.driver.maxResultSize=16m"]
    told, _ = run_watched([submit, *most, script, "--until-idle", "--settings", str(file)])
    assert told["events"] == 1
    assert storage.read(QUARANTINE).where("reason = 'unreadable' AND length(payload) > 1000000").count() == 40
