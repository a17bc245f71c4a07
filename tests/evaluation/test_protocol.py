"""The evaluation job end to end: its written predictions, scored again by hand, give its figures."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import world
from nightstream.errors import SourceError
from nightstream.runtime.settings import load, validate
from nightstream.steps import evaluate

ROOT = Path(__file__).parents[2]


def settings_for(folder, rows):
    world.write_lines(folder / "events.jsonl", rows)
    world.write_lines(folder / "items.jsonl", world.items())
    world.write_lines(folder / "users.jsonl", world.users())
    overrides = ["training.encoders=[gru]", "training.epochs=3", "window.length=10"]
    document = load([ROOT / "conf" / "base.yaml"], overrides).model_dump(mode="json")
    return validate(world.placed(document, folder) | {"sources": world.sources(folder)})


@pytest.mark.slow
def test_predictions_scored_again_give_the_same_figures(spark, tmp_path):
    rows = world.events()
    rows.append(
        {**rows[-1], "event_id": "only", "user_id": "u000", "item_id": "never seen", "event_time": world.START + 10**6}
    )
    settings = settings_for(tmp_path, rows)
    out, told = tmp_path / "lists.parquet", tmp_path / "figures.json"
    result = evaluate.run(spark, settings, "leave-one-out", str(out), None, str(told))
    assert json.loads(told.read_text())["scores"] == result["scores"]
    table = pq.read_table(out).to_pylist()
    columns = {"user_id", "target_item_id", "event_time", "delay_s", "rank", "item_id", "score"}
    assert set(table[0]) == columns
    targets = {r["user_id"]: r["target_item_id"] for r in table}
    assert targets["u000"] == "never seen"
    ranks = [
        next((r["rank"] for r in table if r["user_id"] == u and r["item_id"] == t), None) for u, t in targets.items()
    ]
    (everyone,) = [s for s in result["scores"] if s["users"] == "all"]
    assert everyone["events"] == len(targets) == 40
    gains = [1 / math.log2(1 + r) if r is not None and r <= 10 else 0.0 for r in ranks]
    assert everyone["ndcg@10"] == pytest.approx(sum(gains) / len(gains))
    # The next item on the ring is the only unseen one or nearly so: whoever learns anything finds it.
    assert everyone["hr@10"] > 0.5
    history = {(r["user_id"], r["item_id"]) for r in rows if r["event_time"] < world.START + 11 * 3600}
    assert not history & {(r["user_id"], r["item_id"]) for r in table}


def test_a_source_without_a_past_is_refused(spark, tmp_path):
    settings = settings_for(tmp_path, world.events(users=3, per_user=1))
    with pytest.raises(SourceError, match="too few events for leave-one-out"):
        evaluate.run(spark, settings, "leave-one-out")
