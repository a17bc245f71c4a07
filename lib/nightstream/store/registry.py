"""Model versions as Delta rows: artifacts first, then one commit that publishes.

A version is readable only once a row of `models` names it, and serves only once a row says `published`; the newest
published row is the model that serves, so rolling back is publishing an older version again. A version that the gate
rejected stays, with a row that says so, and can still be published by name.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import pyarrow as pa

from nightstream.errors import ArtifactError, TableError
from nightstream.store.storage import Storage
from nightstream.store.tables import MODEL_ARTIFACTS, MODELS

log = logging.getLogger(__name__)

PART_BYTES = 32 * 1024 * 1024
TRAINED, PUBLISHED, REJECTED = "trained", "published", "rejected"
# From here on it is told: the steps of a night all have its moment.
_AHEAD = timedelta(minutes=10)
_NEWEST = "ORDER BY at DESC, model_version DESC LIMIT 1"


@dataclass(frozen=True)
class ModelRow:
    """One row of `models`: a step in the life of a version."""

    model_version: str
    status: str
    at: datetime
    settings: dict[str, Any]
    metrics: dict[str, Any]
    history: list[dict[str, Any]]


def version_name(as_of: datetime, seed: int) -> str:
    """The name of the version trained as of a moment: sorts by time."""
    return f"{as_of:%Y%m%dT%H%M%S}-{seed}"


def save_artifacts(storage: Storage, version: str, files: dict[str, bytes]) -> None:
    """Write a version's files in parts of at most 32 MB; a version written before (a killed run) is replaced."""
    rows = []
    for name, content in sorted(files.items()):
        parts = [content[i : i + PART_BYTES] for i in range(0, len(content), PART_BYTES)] or [b""]
        digest = hashlib.sha256(content).hexdigest()
        rows += [(version, name, number, len(parts), digest, bytearray(part)) for number, part in enumerate(parts)]
    frame = storage.spark.createDataFrame(rows, MODEL_ARTIFACTS.schema)
    storage.overwrite(MODEL_ARTIFACTS, frame, where=f"model_version = '{version}'")


def load_artifacts(storage: Storage, version: str, folder: str = "") -> dict[str, bytes]:
    """The files of a version, by name; with `folder` those that were saved as "folder/name", else those without one.
    Raises ArtifactError where one is missing, incomplete or damaged.

    The driver holds one model, which is what a worker must hold too.
    """
    inside = "file LIKE :inside" if folder else "file NOT LIKE :inside"
    parts_of = storage.query(
        "SELECT file, part, parts, sha256, content FROM {model_artifacts} "
        f"WHERE model_version = :version AND {inside} ORDER BY file, part",
        MODEL_ARTIFACTS,
        version=version,
        inside=f"{folder}/%" if folder else "%/%",
    ).to_pylist()
    rows = [{**row, "file": row["file"].rpartition("/")[2]} for row in parts_of]
    if not rows:
        what = f"artifacts under {folder}" if folder else "artifacts"
        raise ArtifactError(
            f"model {version} has no {what} in {MODEL_ARTIFACTS.name}; publish another version or train anew"
        )
    files: dict[str, bytes] = {}
    for name in sorted({row["file"] for row in rows}):
        parts = [row for row in rows if row["file"] == name]
        content = b"".join(row["content"] for row in parts)
        if len(parts) != parts[0]["parts"] or hashlib.sha256(content).hexdigest() != parts[0]["sha256"]:
            raise ArtifactError(f"{name} of model {version} is damaged; publish another version or train anew")
        files[name] = content
    return files


def record(
    storage: Storage,
    version: str,
    status: str,
    at: datetime,
    settings: dict[str, Any],
    metrics: dict[str, Any],
    history: list[dict[str, Any]],
) -> ModelRow:
    """The row, appended to `models` in one commit; with status PUBLISHED this is the hand-over.

    Where a row there is as new as `at`, it is the microsecond after that: what is recorded last is the newest, whatever
    a clock or an --as-of once said.
    """
    storage.create(MODELS)
    newest = storage.query("SELECT max(at) AS at FROM {models}", MODELS)["at"][0].as_py()
    if newest is not None and newest >= at:
        if newest - at > _AHEAD:
            log.warning(
                "models has a row of %s, and this one is noted right after it; a clock or an --as-of was ahead",
                f"{newest:%Y-%m-%d %H:%M}",
                extra={"model": version, "status": status},
            )
        at = newest + timedelta(microseconds=1)
    row = (version, status, at, json.dumps(settings, sort_keys=True), json.dumps(metrics), json.dumps(history))
    storage.append_values(MODELS, [row])
    return ModelRow(version, status, at, settings, metrics, history)


def publish(storage: Storage, version: str, at: datetime) -> ModelRow:
    """Publish a trained version, new, old or rejected. Raises TableError where the version is unknown."""
    known = _known(storage, version)
    return record(storage, version, PUBLISHED, at, known.settings, known.metrics, known.history)


def reject(storage: Storage, version: str, at: datetime, numbers: dict[str, float]) -> None:
    """Mark a trained version as rejected, the numbers of the decision among its metrics. Raises TableError where the
    version is unknown."""
    known = _known(storage, version)
    record(storage, version, REJECTED, at, known.settings, {**known.metrics, **numbers}, known.history)


def candidate(storage: Storage) -> ModelRow | None:
    """The newest trained version that is not rejected, None where there is none.

    A rejected version that has been published since is not rejected any more: a person has decided.
    """
    rejected = "SELECT model_version, max(at) AS at FROM {models} WHERE status = :rejected GROUP BY model_version"
    overruled = "SELECT model_version, max(at) AS at FROM {models} WHERE status = :published GROUP BY model_version"
    out = (
        f"SELECT r.model_version FROM ({rejected}) r LEFT JOIN ({overruled}) o ON r.model_version = o.model_version "
        "WHERE o.at IS NULL OR o.at < r.at"
    )
    trained = storage.query(
        f"SELECT * FROM {{models}} WHERE status = :trained AND model_version NOT IN ({out}) {_NEWEST}",
        MODELS,
        trained=TRAINED,
        rejected=REJECTED,
        published=PUBLISHED,
    )
    return _row(trained)


def published(storage: Storage) -> ModelRow:
    """The model that serves. Raises TableError where none has been published."""
    row = newest(storage, PUBLISHED) if storage.exists(MODELS) else None
    if row is None:
        raise TableError("no model has been published yet; run the nightly job first")
    return row


def newest(storage: Storage, status: str | None = None, version: str | None = None) -> ModelRow | None:
    """The newest row with that status and version, None where there is none."""
    wanted = {"status": status, "model_version": version}
    given = {name: value for name, value in wanted.items() if value is not None}
    conditions = " AND ".join(["true", *(f"{name} = :{name}" for name in given)])
    return _row(storage.query(f"SELECT * FROM {{models}} WHERE {conditions} {_NEWEST}", MODELS, **given))


def _known(storage: Storage, version: str) -> ModelRow:
    known = newest(storage, None, version)
    if known is None:
        raise TableError(f"model {version} is not in {MODELS.name}; train it first or name another version")
    return known


def _row(rows: pa.Table) -> ModelRow | None:
    if not rows.num_rows:
        return None
    (row,) = rows.to_pylist()
    try:
        documents = (json.loads(row[name]) for name in ("settings", "metrics", "history"))
        return ModelRow(row["model_version"], row["status"], row["at"], *documents)
    except (TypeError, ValueError) as error:
        raise ArtifactError(
            f"the row of model {row['model_version']} in {MODELS.name} cannot be read; publish another version"
        ) from error
