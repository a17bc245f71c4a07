"""The quality gate: is a newly trained model good enough to take the place of the published one?

Both are judged on the newer model's validation events, by NDCG@10 of the list that the refresh would have served just
before each event: the whole catalogue ranked, seen items removed, items that a model has not met encoded from their
content. What makes that fair:

- Neither model as it serves can be asked. The refit has shown the newer one its validation events, and on data that
  hardly grew overnight the published one has learnt from most of them too: the better memory would win. (On
  MovieLens-100k eight epochs then score 0.18, a single one 0.21; before the refit it is 0.123 and 0.114.)
- The newer model before its refit against the published one as it serves would be no fairer. The one lacks the
  newest tenth of the events (by the default fractions), the other only the last night's: where items are new every day
  the published one would always win, and nothing would be published any more.
- So each version keeps, beside the model that serves, the model as it stood before the refit, and those two meet. Each
  lacks its own newest tenth, so what lies between them is what the new training changed. Only events newer than all
  that either has learnt from are judged. Early stopping has looked at validation events of either, which favours the
  newer model by little.
- The refit itself is checked from the side that can be trusted: having learnt from the events, the model that would
  serve can only look better on them. Where it looks worse, something broke, and that lower figure counts.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from nightstream.errors import ArtifactError
from nightstream.evaluation import offline
from nightstream.evaluation.offline import Served
from nightstream.ingest.history import entering, live
from nightstream.models.bundle import Bundle
from nightstream.runtime.settings import Settings
from nightstream.serving import catalogue
from nightstream.store import registry
from nightstream.store.storage import Storage
from nightstream.store.tables import EVENTS, ITEMS, USERS

log = logging.getLogger(__name__)

PASSED, REJECTED, UNJUDGED = "passed", "rejected", "unjudged"
CUTOFF = 10
# A shortfall counts only beyond what chance makes of so few events: some 2 % of equal models fall this far short.
STANDARD_ERRORS = 2.0
FOLDER = "before_refit"
HELD_OUT_FILE = "held_out.json"


@dataclass(frozen=True)
class Verdict:
    """outcome: PASSED, REJECTED, or UNJUDGED where there was nothing to go by, which passes. reason: a clause for a
    person. numbers: what it rests on, by the names under which models and metrics keep them (NDCG@10, share, events).
    """

    outcome: str
    reason: str
    numbers: dict[str, float]


def decide(
    published: np.ndarray,
    candidate: np.ndarray,
    refitted: np.ndarray,
    users: Sequence[str] | np.ndarray,
    margin: float,
    min_events: int,
) -> Verdict:
    """published, candidate, refitted: float [T], what each of the same T events adds to the NDCG@10 of the published
    model and of the candidate, both before their refit, and of the candidate as it would serve. users: [T].

    Rejected where the lower of the candidate's two means falls short of the published one's by more than
    margin × the latter, and by more than STANDARD_ERRORS of the difference. Fewer than min_events are not judged.
    """
    count = len(published)
    numbers: dict[str, float] = {"gate.events": float(count), "gate.margin": margin}
    if count < min_events:
        reason = f"only {count:,} validation events are new to both models, gate.min_events asks for {min_events:,}"
        return Verdict(UNJUDGED, reason, numbers)
    lower = refitted if refitted.mean() < candidate.mean() else candidate
    before, now = float(published.mean()), float(lower.mean())
    error = clustered_error(lower - published, users)
    numbers |= {
        "gate.published.ndcg@10": before,
        "gate.candidate.ndcg@10": float(candidate.mean()),
        "gate.refitted.ndcg@10": float(refitted.mean()),
        "gate.standard_error": error,
    }
    rejected = before - now > max(margin * before, STANDARD_ERRORS * error)
    change = f"{abs(now / before - 1):.1%} {'worse' if now < before else 'better'}" if before else "not worse"
    reason = (
        f"NDCG@10 {now:.4f} against {before:.4f} on the same {count:,} validation events is {change} "
        f"(standard error {error:.4f}), gate.margin allows {margin:.1%}"
    )
    return Verdict(REJECTED if rejected else PASSED, reason, numbers)


def clustered_error(differences: np.ndarray, users: Sequence[str] | np.ndarray) -> float:
    """The standard error of the mean of differences [T], where those of one user depend on each other (the
    cluster-robust estimate of Liang and Zeger, 1986)."""
    _, cluster = np.unique(np.asarray(users), return_inverse=True)
    sums = np.bincount(cluster, differences - differences.mean())
    groups = len(sums)
    return float(np.sqrt((sums**2).sum() * groups / max(groups - 1, 1)) / len(differences))


def judge(storage: Storage, settings: Settings, version: str) -> Verdict:
    """Compare a trained version with the published one; no table is written.

    Raises ArtifactError where the version's own artifacts are missing or damaged.
    """
    rules = settings.gate
    serving = registry.newest(storage, registry.PUBLISHED)
    if rules.margin is None:
        return Verdict(UNJUDGED, "gate.margin is null, which switches the gate off", {})
    if serving is None or serving.model_version == version:
        return Verdict(UNJUDGED, "no other model is published", {})
    candidate, after, until = _before_refit(storage, version)
    try:
        published, other_after, _ = _before_refit(storage, serving.model_version)
        # A worker that could not decode it would fail the night.
        Bundle(f"{serving.model_version} {FOLDER}", "", published, catalogue.NO_ITEMS).load()
    except ArtifactError as error:
        # A published model that cannot be read is no reason to keep its successor back.
        return Verdict(UNJUDGED, f"the published model {serving.model_version} cannot be judged: {error}", {})
    events = live(storage.read(EVENTS), settings.events.retraction_type)
    items = catalogue.known_items(storage.read_or_empty(ITEMS), events)
    consumed = entering(events, settings.events.window_types)
    targets = sampled(consumed, max(after, other_after), until, rules.sample_events).persist()
    histories = consumed.join(targets.select("user_id").distinct(), "user_id", "left_semi").persist()
    bundle = catalogue.load_bundle(storage, version)
    bundle.load()
    users = storage.read_or_empty(USERS)
    served = Served(bundle, users, settings.window.length, settings.events.window_types)

    def gained(model: Bundle) -> tuple[np.ndarray, np.ndarray]:
        rows = offline.before_each(histories, targets, replace(served, bundle=model))
        # At most gate.sample_events rows.
        table = offline.gains(rows, CUTOFF).select("event_id", "user_id", "gain").toArrow().sort_by("event_id")
        return table["gain"].to_numpy(), table["user_id"].to_numpy()

    try:
        refitted, who = gained(bundle)
        ours, _ = gained(catalogue.bundle_of(f"{version} {FOLDER}", candidate, items))
        theirs, _ = gained(catalogue.bundle_of(f"{serving.model_version} {FOLDER}", published, items))
        return decide(theirs, ours, refitted, who, rules.margin, rules.min_events)
    finally:
        histories.unpersist()
        targets.unpersist()


def sampled(events: DataFrame, after: int, until: int, limit: int) -> DataFrame:
    """event_id and user_id of at most `limit` of the events in (after, until] (microseconds), drawn by a hash of the
    id, so that every model is asked about the same ones."""
    at = F.unix_micros("event_time")
    inside = events.where((at > after) & (at <= until)).select("event_id", "user_id")
    return inside.orderBy(F.xxhash64("event_id"), "event_id").limit(limit)


def artifacts(before_refit: dict[str, bytes], learnt_until: int, newest: int) -> dict[str, bytes]:
    """What a version must keep to be judged, as files to save beside those that serve.

    learnt_until, newest: of splits.held_out_after; what lies between them is the version's validation.
    """
    held_out = json.dumps({"after_micros": learnt_until, "until_micros": newest}).encode()
    return {f"{FOLDER}/{name}": content for name, content in {**before_refit, HELD_OUT_FILE: held_out}.items()}


def _before_refit(storage: Storage, version: str) -> tuple[dict[str, bytes], int, int]:
    """The files of a version before its refit, and the two times that `artifacts` was told."""
    files = registry.load_artifacts(storage, version, FOLDER)
    held_out = json.loads(files.pop(HELD_OUT_FILE))
    return files, held_out["after_micros"], held_out["until_micros"]
