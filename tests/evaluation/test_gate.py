"""The gate: the decision over known gains, what it is asked about, and what a rejected model leaves as it was."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
import torch
import world
from nightstream.errors import RejectedError
from nightstream.evaluation import gate
from nightstream.models.artifacts import from_artifacts, to_artifacts
from nightstream.models.bundle import FEATURES_FILE, Bundle
from nightstream.serving import catalogue
from nightstream.steps import nightly, publish
from nightstream.store import registry
from nightstream.store.tables import EVENTS, ITEM_EMBEDDINGS, ITEMS, METRICS, RECOMMENDATIONS, REFRESHES, USER_VECTORS

NEXT = datetime(2024, 1, 2, tzinfo=UTC)
USERS = np.array([f"u{n}" for n in range(400)])


def decided(published, candidate, refitted=None, users=USERS, margin=0.1, min_events=50):
    refitted = candidate if refitted is None else refitted
    return gate.decide(published, candidate, refitted, users, margin, min_events)


def level(value: float, count: int = 400) -> np.ndarray:
    return np.full(count, value)


@pytest.mark.parametrize(
    ("candidate", "refitted", "outcome"),
    [
        (0.50, 0.50, gate.PASSED),
        (0.45, 0.60, gate.PASSED),
        (0.44, 0.60, gate.REJECTED),
        (0.60, 0.44, gate.REJECTED),
        (0.60, 0.45, gate.PASSED),
        (0.90, 0.90, gate.PASSED),
    ],
)
def test_the_lower_figure_of_the_candidate_may_fall_short_by_the_margin(candidate, refitted, outcome):
    verdict = decided(level(0.5), level(candidate), level(refitted))
    assert verdict.outcome == outcome
    assert verdict.numbers == pytest.approx(
        {
            "gate.events": 400,
            "gate.margin": 0.1,
            "gate.published.ndcg@10": 0.5,
            "gate.candidate.ndcg@10": candidate,
            "gate.refitted.ndcg@10": refitted,
            "gate.standard_error": 0.0,
        }
    )


def test_the_reason_tells_both_figures_the_events_and_the_margin():
    reason = decided(level(0.5), level(0.4), level(0.9)).reason
    for told in ("0.4000 against 0.5000", "400 validation events", "20.0% worse", "gate.margin allows 10.0%"):
        assert told in reason


def test_a_shortfall_that_chance_explains_passes():
    # 110 targets lost and 85 gained of 200 found: 12.5 % worse, beyond the margin, and well within two standard errors.
    published = np.repeat([1.0, 0.0], 200)
    candidate = np.repeat([0.0, 1.0, 0.0], [110, 90 + 85, 115])
    assert decided(published, candidate).numbers["gate.standard_error"] == pytest.approx(0.0349, abs=1e-3)
    assert decided(published, candidate).outcome == gate.PASSED
    many = [np.tile(a, 16) for a in (published, candidate)]
    assert decided(*many, users=np.arange(16 * 400)).outcome == gate.REJECTED


def test_too_few_events_are_not_judged_and_none_is_no_defect():
    assert decided(level(0.5, 49), level(0.0, 49), users=USERS[:49]).outcome == gate.UNJUDGED
    assert decided(level(0.5, 50), level(0.0, 50), users=USERS[:50]).outcome == gate.REJECTED
    nothing = decided(level(0, 0), level(0, 0), users=USERS[:0])
    assert nothing.outcome == gate.UNJUDGED
    assert "only 0 validation events" in nothing.reason


def test_a_published_model_that_finds_nothing_is_no_defect_either():
    assert decided(level(0.0), level(0.0)).outcome == gate.PASSED


def test_events_of_one_user_count_as_one_draw():
    differences = np.random.default_rng(1).normal(size=60)
    one_each = gate.clustered_error(differences, np.arange(60))
    assert one_each == pytest.approx(differences.std(ddof=1) / np.sqrt(60))
    repeated = gate.clustered_error(np.repeat(differences, 7), np.repeat(np.arange(60), 7))
    assert repeated == pytest.approx(one_each)


def test_sampled_are_the_same_events_whatever_their_order_and_none_from_outside(spark):
    at = datetime(2024, 1, 1, tzinfo=UTC)
    rows = [(f"e{n:02}", f"u{n % 3}", at + timedelta(seconds=n)) for n in range(40)]
    schema = "event_id string, user_id string, event_time timestamp"
    micros = round(at.timestamp() * 1e6)
    window = (micros + 9_000_000, micros + 29_000_000)

    def ids(rows, limit):
        return [r.event_id for r in gate.sampled(spark.createDataFrame(rows, schema), *window, limit).collect()]

    assert sorted(ids(rows, 100)) == [f"e{n:02}" for n in range(10, 30)]
    assert ids(rows, 7) == ids(rows[::-1], 7)
    assert len(set(ids(rows, 7))) == 7


def damaged(files: dict[str, bytes]) -> dict[str, bytes]:
    """The model with a sequence encoder of random weights, and no ranker to mend it."""
    features = files[FEATURES_FILE]
    model = from_artifacts({k: v for k, v in files.items() if k != FEATURES_FILE})
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.members[0].sequence.parameters():
            parameter.normal_()
    model.ranker = None
    return to_artifacts(model) | {FEATURES_FILE: features}


def trained(storage, version: str, at: datetime, serving_part: bool, early_part: bool) -> None:
    """A version that is the published one over again, damaged in its serving part, in that before the refit, in both
    or in none."""
    published = registry.published(storage)
    serves = registry.load_artifacts(storage, published.model_version)
    early = registry.load_artifacts(storage, published.model_version, gate.FOLDER)
    held_out = early.pop(gate.HELD_OUT_FILE)
    serves = damaged(serves) if serving_part else serves
    early = (damaged(early) if early_part else early) | {gate.HELD_OUT_FILE: held_out}
    registry.save_artifacts(storage, version, serves | {f"{gate.FOLDER}/{k}": v for k, v in early.items()})
    bundle = Bundle(version, "", serves, catalogue.NO_ITEMS)
    storage.append(ITEM_EMBEDDINGS, catalogue.embed(storage.read(ITEMS), bundle))
    registry.record(storage, version, registry.TRAINED, at, {}, {"validation": 0.5}, [])


def small_gate(settings, **changes):
    """The made-up world has 24 validation events."""
    return settings.model_copy(update={"gate": settings.gate.model_copy(update={"min_events": 20, **changes})})


def commits(storage):
    return [storage.version(t) for t in (RECOMMENDATIONS, USER_VECTORS, REFRESHES)]


@pytest.mark.slow
def test_a_worse_model_is_kept_as_rejected_and_nothing_that_serves_changes(spark, night):
    storage, settings = night("gate")
    settings = small_gate(settings)
    first = registry.published(storage).model_version
    before = commits(storage)
    trained(storage, "broken by its refit", NEXT, True, False)
    with pytest.raises(RejectedError, match=r"broken by its refit was not published: NDCG@10 0\.\d+ against [01]\."):
        publish.run(spark, settings, NEXT)
    assert registry.published(storage).model_version == first
    assert commits(storage) == before
    row = registry.newest(storage, registry.REJECTED)
    assert row.model_version == "broken by its refit"
    assert row.metrics["validation"] == 0.5
    assert row.metrics["gate.events"] == 24
    # Before the refit it is the published model over again.
    assert row.metrics["gate.candidate.ndcg@10"] == row.metrics["gate.published.ndcg@10"] > 0.6
    assert row.metrics["gate.refitted.ndcg@10"] < 0.8 * row.metrics["gate.published.ndcg@10"]
    measured = storage.read(METRICS).where("name LIKE 'gate.%' AND labels['outcome'] = 'rejected'").collect()
    assert {r.name: r.value for r in measured} == {k: v for k, v in row.metrics.items() if k.startswith("gate.")}

    trained(storage, "badly trained", NEXT + timedelta(days=1), False, True)
    with pytest.raises(RejectedError, match="badly trained"):
        publish.run(spark, settings, NEXT + timedelta(days=1))
    # Of those that are left, the newest is the one that serves anyway.
    assert publish.run(spark, settings, NEXT + timedelta(days=2))["model_version"] == first

    by_hand = publish.run(spark, settings, NEXT + timedelta(days=3), "badly trained")
    assert by_hand["model_version"] == registry.published(storage).model_version == "badly trained"


@pytest.mark.slow
def test_a_model_as_good_passes_and_with_the_gate_off_any_does(spark, night):
    storage, settings = night("pass")
    trained(storage, "as good", NEXT, False, False)
    told = publish.run(spark, small_gate(settings, margin=0.0), NEXT)
    assert (told["model_version"], told["gate"]["outcome"]) == ("as good", gate.PASSED)
    assert registry.published(storage).model_version == "as good"
    passed = storage.read(METRICS).where("name LIKE 'gate.%' AND labels['outcome'] = 'passed'")
    assert {r.model_version for r in passed.collect()} == {"as good"}

    at = NEXT + timedelta(days=1)
    trained(storage, "broken", at, True, True)
    told = publish.run(spark, small_gate(settings, margin=None), at)
    assert told["gate"] == {"outcome": gate.UNJUDGED, "reason": "gate.margin is null, which switches the gate off"}
    assert registry.published(storage).model_version == "broken"


@pytest.mark.slow
def test_of_the_published_model_too_the_state_before_its_refit_is_judged(spark, night):
    storage, settings = night("both")
    first = registry.published(storage).model_version
    trained(storage, "as good", NEXT, False, False)
    serves = registry.load_artifacts(storage, first)
    early = registry.load_artifacts(storage, first, gate.FOLDER)
    held_out = early.pop(gate.HELD_OUT_FILE)
    early = damaged(early) | {gate.HELD_OUT_FILE: held_out}
    registry.save_artifacts(storage, first, serves | {f"{gate.FOLDER}/{k}": v for k, v in early.items()})
    numbers = gate.judge(storage, small_gate(settings), "as good").numbers
    assert numbers["gate.published.ndcg@10"] < 0.8 * numbers["gate.candidate.ndcg@10"]


@pytest.mark.slow
def test_only_events_newer_than_what_either_model_has_learnt_are_judged(spark, night):
    storage, settings = night("newer")
    first = registry.published(storage).model_version
    trained(storage, "as good", NEXT, False, False)
    files = registry.load_artifacts(storage, first)
    early = registry.load_artifacts(storage, first, gate.FOLDER)
    early.pop(gate.HELD_OUT_FILE)
    times = sorted(r.at for r in storage.read(EVENTS).selectExpr("unix_micros(event_time) AS at").collect())
    # A published model that had held back half as much.
    registry.save_artifacts(storage, first, files | gate.artifacts(early, times[-13], times[-1]))
    assert gate.judge(storage, small_gate(settings, min_events=1), "as good").numbers["gate.events"] == 12
    # One with a source that nobody has registered here.
    about = json.loads(early["model.json"])
    unknown = {"model.json": json.dumps({**about, "sources": [*about["sources"], "weather"]}).encode()}
    registry.save_artifacts(storage, first, files | gate.artifacts(early | unknown, times[-13], times[-1]))
    verdict = gate.judge(storage, small_gate(settings, min_events=1), "as good")
    assert verdict.outcome == gate.UNJUDGED
    assert "weather" in verdict.reason
    # One from before there was a gate.
    registry.save_artifacts(storage, first, files)
    verdict = gate.judge(storage, small_gate(settings), "as good")
    assert verdict.outcome == gate.UNJUDGED
    assert first in verdict.reason


@pytest.mark.slow
def test_after_a_rejected_night_the_published_model_serves_on_with_what_is_new(spark, night, tmp_path, monkeypatch):
    storage, settings = night("night")
    first = registry.published(storage).model_version
    event = {"event_id": "new", "user_id": "newcomer", "item_id": "i00", "event_time": world.START + 10**6}
    settings = small_gate(settings)
    source = world.write_lines(tmp_path / "more.jsonl", [event])
    item = ("i-new", "Item 3", "Item 3", {"group": ["left"]}, {"size": 3.0}, True)
    storage.append(ITEMS, spark.createDataFrame([item], ITEMS.schema))

    def train(spark, settings, as_of):
        trained(storage, "worse", as_of, True, True)
        return {"model_version": "worse", "metrics": {}}

    monkeypatch.setattr(nightly.train, "run", train)
    events = settings.sources.events.model_copy(update={"path": str(source)})
    settings = settings.model_copy(update={"sources": settings.sources.model_copy(update={"events": events})})
    with pytest.raises(RejectedError, match="worse"):
        nightly.run(spark, settings, NEXT)
    assert registry.published(storage).model_version == first
    served = storage.read(RECOMMENDATIONS)
    assert {r.model_version for r in served.select("model_version").distinct().collect()} == {first}
    assert served.where("user_id = 'newcomer'").count() == settings.serving.top_k
    assert storage.read(REFRESHES).where(f"writer = 'nightly 20240102T000000 {first}'").count() > 40
    embedded = storage.read(ITEM_EMBEDDINGS).where("item_id = 'i-new'").select("model_version")
    assert first in {r.model_version for r in embedded.collect()}
