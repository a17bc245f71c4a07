"""One Spark session for all tests; a fresh installation (settings, storage) for each."""

from __future__ import annotations

import copy
import logging
import os
import random
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest
import world
from nightstream.runtime import session
from nightstream.runtime.settings import Settings, load, validate
from nightstream.steps import nightly
from nightstream.store.storage import Storage

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def spark(tmp_path_factory):
    overrides = ["spark.master=local[2]", "spark.shuffle_partitions=2", "spark.driver_memory=2g"]
    # kafka.yaml adds the package that reads a topic, and nothing else of it concerns a session.
    spark_settings = load([ROOT / "conf" / name for name in ("base.yaml", "kafka.yaml")], overrides).spark
    warehouse = tmp_path_factory.mktemp("warehouse")
    session_ = session.build(
        spark_settings,
        "nightstream tests",
        {
            "spark.sql.warehouse.dir": str(warehouse),
            "spark.sql.adaptive.enabled": "false",
            "spark.default.parallelism": "2",
            # Delta keeps each table that it has read for an hour, some 10 MB each, and no test reads those of others.
            "spark.databricks.delta.delta.log.cacheSize": "40",
            # On small data compiling a stage takes longer than interpreting it.
            "spark.sql.codegen.wholeStage": "false",
            "spark.sql.codegen.factoryMode": "NO_CODEGEN",
        },
    )
    yield session_
    session_.stop()


@pytest.fixture
def settings(tmp_path) -> Settings:
    return load(
        [ROOT / "conf" / "base.yaml"],
        [
            f"storage.root={tmp_path / 'tables'}",
            f"storage.work_dir={tmp_path / 'work'}",
            f"stream.checkpoint={tmp_path / 'checkpoint'}",
            f"stream.path={tmp_path / 'stream'}",
        ],
    )


@pytest.fixture
def restored_logging():
    """What a test configures of logging is undone after it."""
    root = logging.getLogger()
    before = list(root.handlers), root.level
    yield
    root.handlers, root.level = before
    logging.captureWarnings(False)


@pytest.fixture
def storage(spark, settings) -> Storage:
    return Storage(spark, settings.storage)


@pytest.fixture(scope="session")
def night_once(spark, tmp_path_factory) -> tuple[Path, dict]:
    """The tables after one night on the made-up world, trained once for all tests; tests get copies."""
    folder = tmp_path_factory.mktemp("night")
    world.write_lines(folder / "events.jsonl", world.events())
    world.write_lines(folder / "items.jsonl", world.items())
    world.write_lines(folder / "users.jsonl", world.users())
    overrides = ["training.encoders=[gru]", "training.threads=1", "serving.top_k=5", "window.length=10"]
    document = load([ROOT / "conf" / "base.yaml"], overrides).model_dump(mode="json")
    document = world.placed(document, folder) | {"sources": world.sources(folder)}
    nightly.run(spark, validate(document), datetime(2024, 1, 1, tzinfo=UTC))
    return folder, document


@pytest.fixture
def night(spark, night_once, tmp_path):
    """night(name) -> (storage, settings) of a copy of those tables, one per name."""
    folder, document = night_once

    def installed(name: str) -> tuple[Storage, Settings]:
        target = tmp_path / name
        shutil.copytree(folder / "tables", target / "tables")
        own = validate(world.placed(copy.deepcopy(document), target))
        return Storage(spark, own.storage), own

    return installed


@pytest.fixture
def drawn(capsys) -> random.Random:
    """A draw of a short share of the faults: another in each run, by a seed that is printed and can be set."""
    variable = "NIGHTSTREAM_FAULT_SEED"
    seed = int(os.environ.get(variable) or random.SystemRandom().randrange(10**6))
    with capsys.disabled():
        print(f"\n{variable}={seed}")
    return random.Random(seed)
